"""From configuration to a loaded model and the KV memory beside it."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.grammar import GrammarBudgets
from engine.grammar_compiler import GrammarCompiler
from engine.kv_cache import KVCache, torch_kernels
from model.decoder import Decoder
from model.encoder_config import is_encoder, read_embedding_settings
from model.errors import ModelError, UnsupportedModelError
from model.identity import model_hash
from model.loader import LoadOptions, keep_packed, load_model
from model.source import ModelFiles, resolve
from model.torch_decoder import TorchDecoder
from protocol.errors import ConfigError
from protocol.kv_layout import DTYPE_BYTES, KVFingerprint
from protocol.readout import MAX_EMBEDDING_FLOATS, EmbeddingCard, Pooling

_CPU_KV_GIB = 2.0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        num_blocks: size of each KV pool made for it.
        max_model_len: bound of prompt plus output tokens: the least of the model's, the user's and the pool's.
        backend: one line saying which kernels run and why.
        enforce_eager: record no CUDA graphs.
        grammars: compiles what outputs must obey, for this model's vocabulary; None takes no such request.
        embedding: what vectors it gives of its last hidden states; None where its files ask for what is not run.
    """

    decoder: Decoder
    fingerprint: KVFingerprint
    device: torch.device
    num_blocks: int
    max_model_len: int
    vocab_size: int
    backend: str
    enforce_eager: bool = False
    grammars: GrammarCompiler | None = None
    embedding: EmbeddingCard | None = None

    def new_kv_cache(self) -> KVCache:
        """Return fresh KV memory of `num_blocks` blocks."""
        # Where Triton was not chosen it may not be there.
        is_plain = isinstance(self.decoder, TorchDecoder) and not self.decoder.kernels.is_capturable
        return KVCache(self.fingerprint, self.num_blocks, self.device, torch_kernels() if is_plain else None)


def pin_process(cores: tuple[int, ...]) -> None:
    """Keep this process on these cores.

    Raises:
        ConfigError: a core does not exist or is not ours.
    """
    if not cores:
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise ConfigError(f"cannot run on cores {sorted(cores)}: {error}") from error


def load(config: EngineConfig, say: Callable[[str], None], cache_dir: Path) -> LoadedModel:
    """Load weights and size the KV memory.

    Args:
        config: what to load and where.
        say: takes one progress line.
        cache_dir: where downloads are kept; unused for local paths.

    Raises:
        ConfigError: model, device or sizes cannot be used; the message names what.
    """
    torch.set_num_threads(config.num_threads)
    device = device_of(config.device)
    if config.grammar_backend == "xgrammar":
        _require_xgrammar()
    try:
        files = resolve(config.model, cache_dir, say)
        decoder = load_model(files, load_options(config, str(device)), _progress_lines(say))
        name = model_hash(files, config.dummy_seed)
        embedding = _embedding_card(files, decoder, say)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # weights were filled on a stream that nobody computes on
        torch.cuda.empty_cache()  # nor will anybody use what loading needed for a while
    shape = decoder.config
    backend = f"{device}: {decoder.backend}"
    say(f"loaded {decoder.load_summary}; {decoder.backend}")
    fingerprint = KVFingerprint(
        model_hash=name,
        dtype=_dtype_name(decoder.kv_dtype) if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        block_size=config.block_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        arithmetic=decoder.arithmetic,
        device=device.type,
    )
    num_blocks = _num_blocks(config, fingerprint, device)
    if device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0]
        pool_bytes = num_blocks * fingerprint.block_bytes
        say(f"KV pool of {_gib(pool_bytes)} of the {_gib(free_bytes)} free on the GPU; {_gib(free_bytes - pool_bytes)} "
            "are left for activations, graphs and slots")  # fmt: skip
    max_model_len = _max_model_len(config, shape.max_context_tokens, num_blocks, say)
    budgets = GrammarBudgets(
        slow_s=config.grammar_slow_ms / 1e3,
        heavy_s=config.grammar_heavy_ms / 1e3,
        mean_s=config.grammar_mean_ms / 1e3,
        worst_s=config.grammar_worst_ms / 1e3,
    )
    grammars = GrammarCompiler(config.grammar_backend, files.path, shape.vocab_size, budgets)
    return LoadedModel(
        decoder,
        fingerprint,
        device,
        num_blocks,
        max_model_len,
        shape.vocab_size,
        backend,
        config.enforce_eager,
        grammars,
        embedding,
    )


def _embedding_card(files: ModelFiles, decoder: Decoder, say: Callable[[str], None]) -> EmbeddingCard | None:
    try:
        settings = read_embedding_settings(files, decoder.config.max_context_tokens, "last")
    except UnsupportedModelError as error:
        say(f"no embeddings: {error}")
        return None
    if settings.pooling == "cls" or decoder.config.hidden_size > MAX_EMBEDDING_FLOATS:
        return None
    return EmbeddingCard(
        size=decoder.config.hidden_size, pooling=Pooling(settings.pooling), normalize=settings.is_normalized
    )


def preload(config: EngineConfig, cache_dir: Path) -> None:
    """Do what can be done of `load` before a fork: pack the weights, where a CPU takes them packed.

    Starts no thread, and looks for no GPU. Raises ModelError.
    """
    torch.set_num_threads(1)
    files = resolve(config.model, cache_dir, lambda _: None)
    if not is_encoder(files):
        keep_packed(files, load_options(config, "cpu"))


def load_options(config: EngineConfig, device: str) -> LoadOptions:
    """Return how a model is loaded for this configuration."""
    return LoadOptions(
        dtype=config.dtype,
        device=device,
        quantization=config.quantization,
        kernels=config.kernels,
        num_threads=config.num_threads,
        dummy_seed=config.dummy_seed,
    )


def _progress_lines(say: Callable[[str], None]) -> Callable[[int, int, str], None]:
    """Return a progress callback that says at most one line a second, so that a quick load says none."""
    last_s = time.monotonic()

    def progress(num_done: int, num_total: int, tensor: str) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= 1.0:
            last_s = time.monotonic()
            say(f"loading weights: {num_done} of {num_total} ({tensor})")

    return progress


def _max_model_len(config: EngineConfig, model_tokens: int, num_blocks: int, say: Callable[[str], None]) -> int:
    wanted = config.max_model_len
    if wanted is not None and wanted > model_tokens:
        raise ConfigError(f"max_model_len: {wanted} tokens exceed the model's context of {model_tokens}")
    max_model_len = wanted or model_tokens
    pool_tokens = num_blocks * config.block_size
    if max_model_len > pool_tokens:
        if wanted is not None:
            raise ConfigError(f"max_model_len: {wanted} tokens do not fit the KV pool of {num_blocks} blocks")
        say(f"context limited to {pool_tokens} tokens by the KV pool of {num_blocks} blocks")
    return min(max_model_len, pool_tokens)


def _require_xgrammar() -> None:
    """Raise ConfigError unless the library is whole: it may be there without what it needs."""
    try:
        importlib.import_module("xgrammar")
    except ImportError as error:
        raise ConfigError(f"grammar_backend: xgrammar cannot be used here ({error}); llguidance comes along") from error


def device_of(name: str) -> torch.device:
    """Return the device that a configuration names; raises ConfigError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch sees no GPU")
    return torch.device(name)


def _dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    assert name in DTYPE_BYTES, name
    return name


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"


def _num_blocks(config: EngineConfig, f: KVFingerprint, device: torch.device) -> int:
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if config.kv_cache_gib is not None:
        num_bytes = config.kv_cache_gib * (1 << 30)
    elif device.type == "cuda":
        num_bytes = torch.cuda.mem_get_info(device)[0] * config.kv_memory_share
    else:
        num_bytes = _CPU_KV_GIB * (1 << 30)
    num_blocks = int(num_bytes) // f.block_bytes
    if num_blocks < 2:
        raise ConfigError(f"kv_cache_gib: room for {num_blocks} blocks of {f.block_bytes} bytes, at least 2 are needed")
    return num_blocks
