"""Configuration of the engine and of the service shell around it."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.errors import ConfigError
from protocol.kv_layout import DTYPE_BYTES

DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("auto", "none", "stored", "int8", "int4", "fp8")
GRAMMAR_BACKENDS = ("auto", "llguidance", "xgrammar")
KERNELS = ("auto", "native", "triton", "torch")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The model and the memory it computes in.

    Attributes:
        model: resolved model reference: a directory, a GGUF file, or `dummy:<config>`.
        dtype: weights and activations: "auto" is float32 on a CPU and bfloat16 on a GPU.
        quantization: "auto" keeps a GGUF file's own on a CPU; else none, stored, int8 or int4, or fp8 (on a GPU).
        kernels: "auto" takes the native ones on a CPU and Triton's on a GPU; else native, triton or torch.
        kv_cache_dtype: of keys and values: "auto" is float16 where weights are quantised, else dtype.
        device: "auto" takes a GPU where torch sees one.
        num_threads: compute threads on a CPU.
        cores: CPU cores this process is pinned to; empty leaves it alone.
        block_size: tokens per KV block.
        num_kv_blocks: blocks of the pool, or None to derive them from `kv_cache_gib`.
        kv_cache_gib: memory of the pool in GiB, or None for 2 GiB on a CPU and `kv_memory_share` on a GPU.
        kv_memory_share: share of a GPU's memory, free once the weights are loaded, that the pool takes.
        max_model_len: bound of prompt plus output tokens, or None for what model and pool allow.
        dummy_seed: seed of `dummy` weights.
        grammar_backend: library that makes token masks of grammars; auto takes llguidance.
        grammar_slow_ms: what a token of a sequence's grammar may cost on the average (CPU time, of its last few) before
            that is done aside from the compute thread, and the sequence sits out steps.
        grammar_heavy_ms: what it may cost before that gets only what everything else leaves of the machine.
        grammar_mean_ms: what it may cost on the average before the grammar fails, and its request with it.
        grammar_worst_ms: what a single token may cost before that.
        enforce_eager: launch decode steps kernel by kernel on a GPU instead of recording CUDA graphs; no effect on a
            CPU, which has none.
    """

    model: str
    dtype: str = "auto"
    quantization: str = "auto"
    kernels: str = "auto"
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    num_threads: int = 1
    cores: tuple[int, ...] = ()
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_gib: float | None = None
    kv_memory_share: float = 0.8
    max_model_len: int | None = None
    dummy_seed: int = 0
    grammar_backend: str = "auto"
    grammar_slow_ms: float = 0.5
    grammar_heavy_ms: float = 3.0
    grammar_mean_ms: float = 25.0
    grammar_worst_ms: float = 200.0
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "dtype": ("auto", *DTYPE_BYTES),
            "quantization": QUANTIZATIONS,
            "kernels": KERNELS,
            "kv_cache_dtype": ("auto", *DTYPE_BYTES),
            "device": DEVICES,
            "grammar_backend": GRAMMAR_BACKENDS,
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if self.block_size not in (8, 16, 32, 64, 128):
            raise ConfigError(f"block_size must be 8, 16, 32, 64 or 128 tokens; got {self.block_size}")
        if self.num_threads < 1:
            raise ConfigError(f"num_threads must be at least 1, got {self.num_threads}")
        if not 0.0 < self.kv_memory_share <= 0.95:
            raise ConfigError(f"kv_memory_share must lie in (0, 0.95], got {self.kv_memory_share}")
        budgets = ("grammar_slow_ms", "grammar_heavy_ms", "grammar_mean_ms", "grammar_worst_ms")
        for name in ("num_kv_blocks", "kv_cache_gib", "max_model_len", *budgets):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive, got {value}")


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """How a worker process presents itself.

    Attributes:
        worker_id: unique among the workers of a router.
        router_urls: control addresses of the routers, `http://host:port`.
        secret: the cluster secret.
        admin_host, admin_port: where `/health` and `/census` are served; port 0 takes any, None serves nothing.
        connect_retry_s: longest pause between two attempts to reach a router.
        drain_s: on SIGTERM, how long running work may take to finish.
    """

    worker_id: str
    router_urls: tuple[str, ...]
    secret: bytes = field(repr=False)
    admin_host: str = "127.0.0.1"
    admin_port: int | None = 0
    connect_retry_s: float = 1.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.worker_id or len(self.worker_id) > 64:
            raise ConfigError("worker_id must have 1 to 64 characters")
        if not self.router_urls:
            raise ConfigError("router_urls: a worker needs at least one router")
        if len(self.secret) < 16:
            raise ConfigError("secret: the cluster secret must have at least 16 bytes")
        if self.connect_retry_s <= 0 or self.drain_s < 0:
            raise ConfigError("connect_retry_s must be positive and drain_s not negative")
