"""Weights from safetensors: sharded round trip, tied heads, and errors that name file and tensor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.dummy_weights import DummyWeights
from model.errors import ModelError, WeightError
from model.identity import model_hash
from model.loader import LoadOptions, load_model
from model.source import ModelFiles, resolve
from model.torch_decoder import TorchDecoder
from tests.model.plain import TINY, VARIANTS, all_tensors, floats, hf_config, load_torch


def write_model(folder: Path, config: ModelConfig, tensors: dict[str, Tensor], num_shards: int) -> ModelFiles:
    """Write a Hugging Face directory of so many shards and resolve it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors" if num_shards > 1 else "model.safetensors"
        part = {key: tensors[key].contiguous() for key in names[shard::num_shards]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if num_shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return resolve(str(folder), folder, print)


def tiny_tensors(config: ModelConfig = TINY) -> dict[str, Tensor]:
    """Give random tensors for every name of a config."""
    return all_tensors(config, DummyWeights(0))


@pytest.mark.parametrize("variant", ["llama", "smollm2", "qwen2", "qwen3"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_shards_load_to_the_weights_that_were_written(variant: str, num_shards: int, tmp_path: Path) -> None:
    config = VARIANTS[variant]
    written = tiny_tensors(config)
    calls: list[tuple[int, int, str]] = []
    files = write_model(tmp_path, config, written, num_shards)
    decoder = load_model(files, LoadOptions(kernels="torch"), lambda *call: calls.append(call))
    assert isinstance(decoder, TorchDecoder)
    assert torch.equal(decoder.weights.embedding, written["model.embed_tokens.weight"])
    layer, prefix = decoder.weights.layers[1], "model.layers.1."
    parts = [written[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(floats(layer.qkv), torch.cat(parts))
    assert torch.equal(floats(layer.gate_up)[config.intermediate_size :], written[prefix + "mlp.up_proj.weight"])
    assert (decoder.weights.lm_head is decoder.weights.embedding) == config.tie_embeddings
    assert calls[-1][:2] == (len(written), len(written))
    assert [done for done, _, _ in calls] == list(range(1, len(written) + 1))
    expected_bytes = sum(tensor.numel() * 4 for tensor in written.values())
    assert decoder.load_summary.weight_bytes == expected_bytes
    assert "float32 weights on cpu in" in str(decoder.load_summary)


def test_narrow_weights_widen_on_request_and_wide_ones_narrow(tmp_path: Path) -> None:
    files = write_model(tmp_path, TINY, {name: t.bfloat16() for name, t in tiny_tensors().items()}, 1)
    assert load_torch(files).dtype == torch.float32
    assert floats(load_torch(files, "float16").weights.layers[0].down).dtype == torch.float16
    with pytest.raises(ModelError, match=r"dtype 'int4' is not supported \(supported: auto, float32"):
        load_model(files, LoadOptions(dtype="int4"))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "model.layers.2.mlp.down_proj.weight",
            torch.zeros(48, 81),
            r"model.safetensors: tensor 'model.layers.2.mlp.down_proj.weight' has shape \(48, 81\), "
            r"expected \(48, 80\)",
        ),
        (
            "model.norm.weight",
            torch.zeros(48, dtype=torch.int32),
            "model.safetensors: tensor 'model.norm.weight' has dtype torch.int32, expected a float",
        ),
        (
            "lm_head.weight",
            None,
            r"tensor 'lm_head.weight' is missing from model.safetensors; expected shape \(97, 48\)",
        ),
        (
            "model.layers.0.self_attn.q_proj.bias",
            torch.zeros(96),
            "LlamaForCausalLM has no place for 1 tensors of this model, as 'model.layers.0.self_attn.q_proj.bias'",
        ),
    ],
)
def test_a_wrong_tensor_is_named_with_both_shapes(
    name: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    tensors = tiny_tensors()
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(WeightError, match=message):
        load_model(write_model(tmp_path, TINY, tensors, 1))


def test_a_stored_copy_of_a_tied_head_and_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    config = replace(TINY, tie_embeddings=True)
    tensors = tiny_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    assert load_model(write_model(tmp_path, config, tensors, 1)).config.tie_embeddings


def test_a_cut_off_file_and_a_repeated_tensor_are_named(tmp_path: Path) -> None:
    files = write_model(tmp_path / "cut", TINY, tiny_tensors(), 1)
    whole = files.weight_files[0].read_bytes()
    files.weight_files[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightError, match="model.safetensors: cannot be read as safetensors"):
        load_model(files)
    files = write_model(tmp_path / "twice", TINY, tiny_tensors(), 2)
    save_file({"model.norm.weight": torch.zeros(48)}, files.weight_files[0])
    with pytest.raises(WeightError, match="'model.norm.weight' stands in model-0.*and again in model-0"):
        load_model(files)


def test_the_hash_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    first = model_hash(write_model(tmp_path / "a", TINY, tensors, 2))
    assert first == model_hash(write_model(tmp_path / "b", TINY, tensors, 2))
    assert len(first) == 64
    changed = tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}
    other = {
        model_hash(write_model(tmp_path / "c", TINY, changed, 2)),
        model_hash(write_model(tmp_path / "d", replace(TINY, rope_theta=501.0), tensors, 2)),
        model_hash(write_model(tmp_path / "e", TINY, {n: t.bfloat16() for n, t in tensors.items()}, 2)),
    }
    assert len(other) == 3
    assert first not in other


def test_the_hash_of_a_dummy_follows_config_and_seed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    files = resolve(f"dummy:{tmp_path}", tmp_path, print)
    assert model_hash(files) == model_hash(files, 0) != model_hash(files, 1)


def test_a_damaged_header_cannot_be_hashed(tmp_path: Path) -> None:
    files = write_model(tmp_path, TINY, tiny_tensors(), 1)
    files.weight_files[0].write_bytes(b"\xff" * 64)
    with pytest.raises(WeightError, match="damaged safetensors header"):
        model_hash(files)
