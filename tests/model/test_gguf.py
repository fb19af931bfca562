"""Weights from GGUF: files written by the gguf package in many types, row order undone, errors that name the tensor."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from model.config import ModelConfig, RopeScaling, read_config
from model.dummy_weights import DummyWeights
from model.errors import ModelError, UnsupportedModelError, WeightError
from model.gguf_file import GgufFile
from model.gguf_weights import gguf_name
from model.identity import model_hash
from model.loader import LoadOptions, load_model
from model.source import ModelFiles, resolve
from tests.model.plain import (
    TINY,
    VARIANTS,
    all_tensors,
    batch_of,
    floats,
    load_torch,
    new_cache,
    plain_logits,
    tensor_shapes,
)

TOKENS = [int(t) for t in torch.randint(0, 97, (30,), generator=torch.Generator().manual_seed(8))]
# Every row length of this config is a multiple of 256, so that each quantisation type fits.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
F32 = GGMLQuantizationType.F32


def wide(config: ModelConfig) -> ModelConfig:
    """Widen a tiny config to rows that quantise, one layer deep."""
    return replace(config, num_layers=1, rms_eps=float(np.float32(config.rms_eps)), **WIDE)  # type: ignore[arg-type]


def permuted(tensor: Tensor, num_heads: int) -> Tensor:
    """Order q or k rows as GGUF's llama does: pairs of a rotation side by side."""
    shape = tensor.shape
    return tensor.view(num_heads, 2, shape[0] // num_heads // 2, -1).transpose(1, 2).reshape(shape)


def write_gguf(
    path: Path,
    arch: str,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    kind: GGMLQuantizationType = F32,
    extra: dict[str, Tensor] | None = None,
) -> ModelFiles:
    """Write a model with the gguf package, matrices in the given type, and resolve it."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list([f"token {number}" for number in range(config.vocab_size)])
    writer.add_token_scores([0.5] * config.vocab_size)
    for name, tensor in tensors.items():
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = permuted(tensor, config.num_heads if "q_proj" in name else config.num_kv_heads)
        values = tensor.numpy()
        if tensor.dim() > 1 and kind != F32:
            writer.add_tensor(gguf_name(name), quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return resolve(str(path), path.parent, print)


def logits_of(files: ModelFiles) -> Tensor:
    """Load exactly and run the fixed tokens through the decoder: [T, vocab]."""
    decoder = load_model(files, LoadOptions(dtype="float32"))
    kv_cache, tables = new_cache(decoder, 1, 32, 8)
    return decoder.forward(batch_of([(TOKENS, 0)], tables, 8, all_rows=True), kv_cache)


@pytest.mark.parametrize(
    ("variant", "arch"), [("llama", "llama"), ("smollm2", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_a_written_model_gives_the_logits_of_the_plain_implementation(variant: str, arch: str, tmp_path: Path) -> None:
    config = wide(VARIANTS[variant])
    tensors = all_tensors(config, DummyWeights(1))
    files = write_gguf(tmp_path / "m.gguf", arch, config, tensors)
    assert read_config(files) == config
    torch.testing.assert_close(logits_of(files), plain_logits(config, tensors, TOKENS).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "MXFP4"])
def test_quantised_matrices_load_as_what_they_stand_for(kind: str, tmp_path: Path) -> None:
    config, quantisation = wide(TINY), GGMLQuantizationType[kind]
    tensors = all_tensors(config, DummyWeights(1))
    files = write_gguf(tmp_path / "m.gguf", "llama", config, tensors, quantisation)
    stands_for = {
        name: torch.from_numpy(np.array(dequantize(quantize(t.numpy(), quantisation), quantisation), np.float32))
        if t.dim() > 1
        else t
        for name, t in tensors.items()
    }
    # Undoing the permutation must commute with quantisation, which works along rows.
    wanted = plain_logits(config, stands_for, TOKENS).float()
    torch.testing.assert_close(logits_of(files), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "IQ3_S", "IQ1_M"])
def test_types_that_can_only_be_read_load_too(kind: str, tmp_path: Path) -> None:
    config, quantisation = wide(TINY), GGMLQuantizationType[kind]
    tensors = all_tensors(config, DummyWeights(1))
    down = "model.layers.0.mlp.down_proj.weight"
    block_elements, block_bytes = GGML_QUANT_SIZES[quantisation]
    row_bytes = 512 // block_elements * block_bytes
    raw = np.random.default_rng(0).integers(0, 60, (256, row_bytes), dtype=np.uint8)
    writer_tensors = {name: tensor for name, tensor in tensors.items() if name != down}
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", config, writer_tensors | {down: torch.zeros(256, 512)})
    # Write the same file again with the raw blocks in place of that matrix.
    source = gguf.GGUFReader(str(path))
    writer = gguf.GGUFWriter(str(tmp_path / "raw.gguf"), "llama")
    for field in source.fields.values():
        if field.name.startswith("llama.") and len(field.types) == 1:
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in source.tensors:
        if tensor.name == gguf_name(down):
            writer.add_tensor(tensor.name, raw, raw_dtype=quantisation)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    decoder = load_torch(resolve(str(tmp_path / "raw.gguf"), tmp_path, print))
    assert np.array_equal(floats(decoder.weights.layers[0].down).numpy(), dequantize(raw, quantisation), equal_nan=True)


def test_llama3_factors_come_from_the_file(tmp_path: Path) -> None:
    config = wide(VARIANTS["llama3.1"])
    tensors = all_tensors(config, DummyWeights(1))
    plain = RopeScaling()
    factors = torch.tensor([1.0] * 16 + [8.0] * 16)
    files = write_gguf(tmp_path / "m.gguf", "llama", config, tensors, extra={"rope_freqs.weight": factors})
    decoder = load_torch(files)
    assert decoder.config.rope_scaling.kind == "tensor"
    unscaled = load_torch(write_gguf(tmp_path / "n.gguf", "llama", config, tensors))
    assert unscaled.config.rope_scaling == plain
    assert torch.equal(decoder.rotary[0][:, :16], unscaled.rotary[0][:, :16])
    torch.testing.assert_close(decoder.rotary[0][80, 16:], unscaled.rotary[0][10, 16:], rtol=0, atol=1e-5)


def test_the_header_reader_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    config = wide(TINY)
    tensors = all_tensors(config, DummyWeights(1))
    path = write_gguf(tmp_path / "m.gguf", "llama", config, tensors, GGMLQuantizationType.Q8_0).path
    ours, theirs = GgufFile(path), gguf.GGUFReader(str(path))
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (found.ggml_type, found.offset) == (int(tensor.tensor_type), int(tensor.data_offset))
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores"):
        assert ours.array(key) == theirs.fields[key].contents()
    assert ours.metadata["llama.context_length"] == 256


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    config = wide(TINY)
    path = tmp_path / "m.gguf"
    whole = write_gguf(path, "llama", config, all_tensors(config, DummyWeights(1))).path.read_bytes()
    cases = {
        b"": "m.gguf: cannot be read",
        b"PK\x03\x04" + whole[4:]: "m.gguf: not a GGUF file",
        whole[:4] + b"\x01\0\0\0" + whole[8:]: "version 0x1 is not supported",
        whole[:4] + b"\0\0\0\x03" + whole[8:]: "version 0x3000000 is not supported",
        whole[:300]: "m.gguf: damaged GGUF header near byte",
        whole[:-1000]: "m.gguf: tensor '.*' ends past the end of the file",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(WeightError, match=message):
            load_model(ModelFiles(path, "gguf", (path,), None, None, None, ""))


def test_a_missing_misshaped_or_extra_tensor_is_named(tmp_path: Path) -> None:
    config = wide(TINY)
    tensors = all_tensors(config, DummyWeights(1))
    key = "model.layers.0.self_attn.k_proj.weight"
    without = {name: tensor for name, tensor in tensors.items() if name != key}
    with pytest.raises(WeightError, match=r"a.gguf: tensor 'blk.0.attn_k.weight' is missing.*\(128, 256\)"):
        load_model(write_gguf(tmp_path / "a.gguf", "llama", config, without))
    with pytest.raises(WeightError, match=r"b.gguf: tensor 'blk.0.attn_k.weight' has shape \(256, 256\), expected"):
        load_model(write_gguf(tmp_path / "b.gguf", "llama", config, without | {key: torch.zeros(256, 256)}))
    with pytest.raises(WeightError, match="no place for 1 tensors of this model, as 'blk.0.attn_q.bias'"):
        bias = {"blk.0.attn_q.bias": torch.zeros(256)}
        load_model(write_gguf(tmp_path / "c.gguf", "llama", config, tensors, extra=bias))
    integers = {"output_norm.weight": torch.zeros(256, dtype=torch.int32)}
    no_norm = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(WeightError, match="'output_norm.weight' is of type I32, which cannot be"):
        load_model(write_gguf(tmp_path / "d.gguf", "llama", config, no_norm, extra=integers))


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    config = wide(TINY)
    files = write_gguf(tmp_path / "m.gguf", "gemma", config, {"model.norm.weight": torch.zeros(256)})
    with pytest.raises(UnsupportedModelError, match=r"m.gguf: GGUF architecture 'gemma' is not supported"):
        load_model(files)
    files = write_gguf(tmp_path / "n.gguf", "llama", config, {"model.norm.weight": torch.zeros(256)})
    with pytest.raises(ModelError, match="n.gguf: tensor 'token_embd.weight' is missing"):
        load_model(files)


def test_the_hash_of_a_gguf_file_follows_its_weights(tmp_path: Path) -> None:
    config = wide(TINY)
    tensors = all_tensors(config, DummyWeights(1))
    first = model_hash(write_gguf(tmp_path / "a.gguf", "llama", config, tensors))
    assert first == model_hash(write_gguf(tmp_path / "b.gguf", "llama", config, tensors))
    tensors["model.norm.weight"][0] += 1
    assert first != model_hash(write_gguf(tmp_path / "c.gguf", "llama", config, tensors))


def test_every_tensor_has_a_name_in_gguf() -> None:
    for variant in VARIANTS.values():
        names = [gguf_name(name) for name in tensor_shapes(variant)]
        assert len(set(names)) == len(names)
