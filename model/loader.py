"""Load a model: config, then weights from whatever format the files are in, then the decoder.

1. `read_config` says what must be there; `_plan` chooses native or torch kernels, and why.
2. The source for the format gives single tensors, as stored or as floats.
3. `pack_model` packs them for the native step, or `assemble` for torch.
4. The decoder is ready; `LoadSummary` says what it took.

A process that others are forked from may do 1. to 3. before (`keep_packed`): they share its packed weights.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.cpu.native import NativeKernels, NativeLibrary, NativeUnavailableError
from kernels.cpu.native import load as load_native
from kernels.cpu.step import StepModel
from kernels.table import REFERENCE, KernelTable
from model.config import ModelConfig, read_config
from model.decoder import Decoder
from model.dummy_weights import DummyWeights
from model.errors import ModelError
from model.gguf_file import GgufFile
from model.gguf_weights import GgufWeights
from model.native_decoder import QUANTIZATIONS, NativeDecoder, pack_model, why_not
from model.safetensors_weights import SafetensorsWeights
from model.source import ModelFiles
from model.torch_decoder import TorchDecoder
from model.weights import LoadSummary, WeightSource, assemble

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS = ("auto", "native", "triton", "torch")
FP8 = "fp8"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        dtype: of weights and activations; "auto" is float32 on the CPU and bfloat16 on a GPU.
        device: "cpu" or a CUDA device.
        quantization: "auto" keeps a GGUF file's own on the CPU and floats elsewhere, and is "none" where dtype says
            float32; "none" computes in dtype; "stored", "int8" and "int4" need the native kernels; "fp8" is for the
            others.
        kernels: "auto" takes the native ones on a CPU and Triton's on a GPU, where they can run; "native" and "triton"
            insist on them; "torch" avoids both.
        num_threads: of the native kernels.
        dummy_seed: of a dummy model's weights.
        max_context_tokens: bounds the rotary tables below the model's own context length.
    """

    dtype: str = "auto"
    device: str = "cpu"
    quantization: str = "auto"
    kernels: str = "auto"
    num_threads: int = 1
    dummy_seed: int = 0
    max_context_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    library: NativeLibrary | None
    quantization: str
    reason: str
    table: KernelTable = REFERENCE


def choose_dtype(name: str, device: str) -> torch.dtype:
    """Turn a dtype's name into the dtype: `auto` is float32 on the CPU and bfloat16 on a GPU; raises ModelError."""
    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not supported (supported: auto, {', '.join(DTYPES)})")
    return DTYPES[name]


def load_model(
    files: ModelFiles,
    options: LoadOptions = LoadOptions(),  # noqa: B008 - frozen
    progress: Callable[[int, int, str], None] | None = None,
) -> Decoder:
    """Load a resolved model; `progress(done, total, tensor_name)` is called after each tensor.

    Blocking: a fraction of a second to minutes. Raises ModelError and its children.
    """
    started_s = time.monotonic()
    config = read_config(files)
    dtype = choose_dtype(options.dtype, options.device)
    plan = _plan(config, files, options, dtype)
    num_positions = min(options.max_context_tokens or config.max_context_tokens, config.max_context_tokens)
    if plan.library is not None:
        kernels = NativeKernels(plan.library, options.num_threads)
        key = _key(files, options, plan.quantization, num_positions)
        packed = _kept.get(key) or _pack(files, options, plan, num_positions, progress)
        num_bytes = sum(matrix.data.nbytes for matrix in packed.matrices())
        summary = LoadSummary(num_bytes, time.monotonic() - started_s, plan.quantization, "cpu")
        return NativeDecoder(config, packed, kernels, summary)
    is_fp8 = plan.quantization == FP8
    source = _open(files, config, options.dummy_seed)
    weights = assemble(config, source, dtype, torch.device(options.device), progress, is_fp8=is_fp8)
    summary = LoadSummary(weights.num_bytes(), time.monotonic() - started_s, weights.arithmetic, options.device)
    return TorchDecoder(config, weights, summary, num_positions, plan.reason, plan.table)


def keep_packed(files: ModelFiles, options: LoadOptions) -> None:
    """Pack a model for the native step and keep it: `load_model` takes it, here and in processes forked from here.

    Nothing is kept where other kernels would be chosen. Starts no thread. Blocking; raises as `load_model` does.
    """
    config = read_config(files)
    plan = _plan(config, files, options, choose_dtype(options.dtype, options.device))
    if plan.library is not None:
        num_positions = min(options.max_context_tokens or config.max_context_tokens, config.max_context_tokens)
        key = _key(files, options, plan.quantization, num_positions)
        _kept[key] = _pack(files, options, plan, num_positions, None)


_kept: dict[tuple[object, ...], StepModel] = {}


def _key(files: ModelFiles, options: LoadOptions, quantization: str, num_positions: int) -> tuple[object, ...]:
    """Name what is packed: these files as they are now, in this way."""
    stats = [(path, path.stat()) for path in files.weight_files]
    contents = tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in stats)
    return str(files.path), files.format, contents, options.dummy_seed, quantization, num_positions


def _pack(
    files: ModelFiles,
    options: LoadOptions,
    plan: _Plan,
    num_positions: int,
    progress: Callable[[int, int, str], None] | None,
) -> StepModel:
    assert plan.library is not None
    config = read_config(files)
    return pack_model(
        config,
        _open(files, config, options.dummy_seed),
        plan.library,
        quantization=plan.quantization,
        max_context_tokens=num_positions,
        progress=progress,
    )


def _plan(config: ModelConfig, files: ModelFiles, options: LoadOptions, dtype: torch.dtype) -> _Plan:
    """Choose the kernels and the quantisation; raises ModelError where what was asked for cannot be had."""
    if options.quantization not in ("auto", *QUANTIZATIONS, FP8):
        known = ", ".join(("auto", *QUANTIZATIONS, FP8))
        raise ModelError(f"quantization {options.quantization!r} is not supported (supported: {known})")
    if options.kernels not in KERNELS:
        raise ModelError(f"kernels {options.kernels!r} is not supported (supported: {', '.join(KERNELS)})")
    against = _against_native(config, options, dtype)
    if isinstance(against, NativeLibrary):
        return _Plan(against, _quantization(files, options), "")
    if options.kernels == "native":
        raise ModelError(f"kernels: native was asked for, but {against}")
    if options.quantization not in ("auto", "none", FP8):
        raise ModelError(f"quantization {options.quantization} needs the native kernels, but {against}")
    table, why = _table(options)
    return _Plan(None, FP8 if options.quantization == FP8 else "none", why or against, table)


def _table(options: LoadOptions) -> tuple[KernelTable, str]:
    """Choose between Triton's kernels and the reference, and say why where it is not self-evident."""
    is_cpu = torch.device(options.device).type == "cpu"
    if options.kernels == "torch" or (is_cpu and options.kernels == "auto"):
        return REFERENCE, ""
    try:
        from kernels.gpu.table import is_interpreted, triton_table
    except ImportError as error:
        if options.kernels == "triton":
            raise ModelError(f"kernels: triton was asked for, but it cannot be imported ({error})") from error
        return REFERENCE, f"triton cannot be imported: {error}"
    if is_cpu and not is_interpreted():
        raise ModelError("kernels: triton was asked for, but the device is a CPU")
    return triton_table(), f"the device is {options.device}"


def _against_native(config: ModelConfig, options: LoadOptions, dtype: torch.dtype) -> NativeLibrary | str:
    """Give the native library, or say what speaks against using it."""
    if torch.device(options.device).type != "cpu":
        return f"the device is {options.device}"
    if options.kernels in ("torch", "triton"):
        return f"{options.kernels} kernels were asked for"
    if options.quantization == FP8:
        return "fp8 weights were asked for"
    if dtype != torch.float32:
        return f"the dtype is {options.dtype}"
    reason = why_not(config)
    if reason is not None:
        return reason
    try:
        return load_native()
    except NativeUnavailableError as error:
        return str(error)


def _quantization(files: ModelFiles, options: LoadOptions) -> str:
    if options.quantization != "auto":
        return options.quantization
    return "stored" if files.format == "gguf" and options.dtype == "auto" else "none"


def _open(files: ModelFiles, config: ModelConfig, dummy_seed: int) -> WeightSource:
    if files.format == "dummy":
        return DummyWeights(dummy_seed)
    if files.format == "gguf":
        return GgufWeights(GgufFile(files.weight_files[0]), config)
    return SafetensorsWeights(files.weight_files)
