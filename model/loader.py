"""Load a model: config, then weights from whatever format the files are in, then the decoder.

1. `read_config` says what must be there.
2. The source for the format gives single tensors; `assemble` checks, converts and packs them.
3. The decoder builds its rotary tables and is ready; `LoadSummary` says what it took.
"""

import time
from collections.abc import Callable

import torch

from model.config import ModelConfig, read_config
from model.decoder import Decoder
from model.dummy_weights import DummyWeights
from model.errors import ModelError
from model.gguf_file import GgufFile
from model.gguf_weights import GgufWeights
from model.safetensors_weights import SafetensorsWeights
from model.source import ModelFiles
from model.weights import LoadSummary, WeightSource, assemble

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(name: str, device: str) -> torch.dtype:
    """Turn a dtype's name into the dtype: `auto` is float32 on the CPU and bfloat16 on a GPU; raises ModelError."""
    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not supported (supported: auto, {', '.join(DTYPES)})")
    return DTYPES[name]


def load_model(
    files: ModelFiles,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
    dummy_seed: int = 0,
    max_context_tokens: int | None = None,
) -> Decoder:
    """Load a resolved model; `progress(done, total, tensor_name)` is called after each tensor.

    Blocking: seconds to minutes. `max_context_tokens` bounds the rotary tables below the model's own context length.
    `decoder.load_summary` says what it took. Raises ModelError and its children.
    """
    started_s = time.monotonic()
    config = read_config(files)
    wanted = choose_dtype(dtype, device)
    weights = assemble(config, _open(files, config, dummy_seed), wanted, torch.device(device), progress)
    name = str(wanted).removeprefix("torch.")
    summary = LoadSummary(weights.num_bytes(), time.monotonic() - started_s, name, device)
    return Decoder(config, weights, summary, max_context_tokens or config.max_context_tokens)


def _open(files: ModelFiles, config: ModelConfig, dummy_seed: int) -> WeightSource:
    if files.format == "dummy":
        return DummyWeights(dummy_seed)
    if files.format == "gguf":
        return GgufWeights(GgufFile(files.weight_files[0]), config)
    return SafetensorsWeights(files.weight_files)
