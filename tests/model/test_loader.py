"""Which kernels a model is loaded for, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernels.cpu import native
from model.errors import ModelError
from model.loader import LoadOptions, load_model
from model.native_decoder import NativeDecoder
from model.source import ModelFiles, resolve
from model.torch_decoder import TorchDecoder
from tests.kernels.native_cases import kernels_for
from tests.model.plain import VARIANTS, batch_of, hf_config, new_cache


def files_of(folder: Path, **changes: object) -> ModelFiles:
    """A dummy model of a tiny shape."""
    (folder / "config.json").write_text(json.dumps({**hf_config(VARIANTS["llama"]), **changes}))
    return resolve(f"dummy:{folder}", folder, print)


def test_a_machine_without_the_library_computes_with_torch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "find_library", lambda: None)
    files = files_of(tmp_path)
    decoder = load_model(files)
    assert isinstance(decoder, TorchDecoder)
    assert decoder.backend == "torch operations in float32 (the native library was not built at installation)"
    kv_cache, tables = new_cache(decoder, 1, 8, 8)
    assert decoder.forward(batch_of([([1, 2, 3], 0)], tables, 8), kv_cache).isfinite().all()
    for options in (LoadOptions(kernels="native"), LoadOptions(quantization="int8")):
        with pytest.raises(ModelError, match="the native library was not built"):
            load_model(files, options)


def test_the_native_step_is_the_default_and_names_its_path(tmp_path: Path) -> None:
    kernels = kernels_for()
    decoder = load_model(files_of(tmp_path))
    assert isinstance(decoder, NativeDecoder)
    words = f"one native call per step, {kernels.instruction_set} (the best this processor has), exact float32"
    assert decoder.backend == words
    assert (decoder.arithmetic, decoder.kv_dtype) == ("float32", torch.float32)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (LoadOptions(kernels="torch"), "torch kernels were asked for"),
        (LoadOptions(dtype="bfloat16"), "the dtype is bfloat16"),
    ],
)
def test_torch_says_why_it_computes(options: LoadOptions, reason: str, tmp_path: Path) -> None:
    decoder = load_model(files_of(tmp_path), options)
    assert isinstance(decoder, TorchDecoder) and f"({reason})" in decoder.backend


def test_a_shape_that_the_native_step_cannot_run_goes_to_torch(tmp_path: Path) -> None:
    kernels_for()
    decoder = load_model(files_of(tmp_path, intermediate_size=72))
    assert "(intermediate_size 72 is no multiple of 16)" in decoder.backend


@pytest.mark.parametrize(
    ("quantization", "arithmetic"), [("none", "float32"), ("stored", "float32"), ("int8", "f32+q8_0 by int8")]
)
def test_quantising_on_load_changes_the_name_of_the_arithmetic(
    quantization: str, arithmetic: str, tmp_path: Path
) -> None:
    """Float files hold no quantisation to keep; matrices whose width is no multiple of 32 stay floats."""
    kernels_for()
    decoder = load_model(files_of(tmp_path), LoadOptions(quantization=quantization))
    assert decoder.arithmetic == arithmetic
    assert decoder.kv_dtype == (torch.float32 if arithmetic == "float32" else torch.float16)


@pytest.mark.parametrize("change", [{"quantization": "int3"}, {"kernels": "magic"}, {"dtype": "int4"}])
def test_unknown_choices_are_refused_with_the_known_ones(change: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="supported: auto"):
        load_model(files_of(tmp_path), LoadOptions(**change))  # type: ignore[arg-type]
