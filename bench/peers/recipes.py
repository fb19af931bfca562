"""Every way to start a server that is measured: its command, cores, weights and manners.

A recipe is data. Its command holds `{port}`, which is filled in when it is started; everything else is as one would
type it. "default" keeps a server's own settings but for what the machine and the workloads force on it (threads, slots,
context); "tuned" adds what made it best here in the figures that matter to us.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from bench.peers.layout import CHECKOUT, Layout, PeerName, Weights

Tuning = Literal["default", "tuned"]
ServedBy = Literal["baton"] | PeerName

MODEL_NAME: Final = "m"
# Eight streams, each as long as the longest request of any workload here with room to spare.
_NUM_SLOTS: Final = 8
_SLOT_TOKENS: Final = 3072
_VLLM_MODEL_TOKENS: Final = 4096
# llama.cpp: what is computed between two tokens of a running stream is at most one such batch.
_SMALL_BATCHES: Final = ("-b", "128", "-ub", "128")
# llama.cpp: no copy of a finished prompt's KV into a cache in memory; no prompt here ever comes again.
_NO_COPIES: Final = ("-cram", "0")


@dataclass(frozen=True, slots=True)
class Cores:
    """The cores that servers share: Baton's prefill worker gets one, its decode worker the other."""

    prefill: int = 0
    decode: int = 1

    @property
    def both(self) -> tuple[int, ...]:
        """Both, for servers that spread over them as they like."""
        return (self.prefill, self.decode)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to start one server.

    Attributes:
        label: what tables call it; unique.
        command: program and arguments, with `{port}` for the port.
        cores: what its processes are pinned to.
        extra_body: fields put into each request; a None takes a usual field away.
        ready_path: answers 200 once requests are served.
    """

    label: str
    served_by: ServedBy
    command: tuple[str, ...]
    cores: tuple[int, ...]
    weights: Weights
    tuning: Tuning = "default"
    environment: tuple[tuple[str, str], ...] = ()
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    model: str = MODEL_NAME
    ready_path: str = "/health"

    @property
    def slug(self) -> str:
        """The label as part of a file's name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower().replace("_", "")).strip("-")


def recipes(layout: Layout, cores: Cores) -> dict[str, Recipe]:
    """Return every recipe by its label."""
    made = [*_llama(layout, cores), *_vllm(layout, cores), _transformers(layout, cores), *_baton(layout, cores)]
    return {recipe.label: recipe for recipe in made}


def _llama(layout: Layout, cores: Cores) -> list[Recipe]:
    weights: tuple[Weights, ...] = ("Q4_0", "Q4_1")
    return [
        *(_llama_server(layout, f"{w} default", w, cores.both) for w in weights),
        *(_llama_server(layout, f"{w} tuned", w, cores.both, *_SMALL_BATCHES, *_NO_COPIES) for w in weights),
        *(_llama_server(layout, f"{w} 1 core", w, (cores.decode,), *_NO_COPIES) for w in weights),
        *(_llama_server(layout, f"{w} 1 core, first", w, (cores.prefill,), *_NO_COPIES) for w in weights),
        # One thread computes, the rest (HTTP, streams) may use the other core, as Baton's router may.
        *(_llama_server(layout, f"{w} 1 thread", w, cores.both, *_NO_COPIES, num_threads=1) for w in weights),
    ]


def _llama_server(
    layout: Layout, label: str, weights: Weights, where: tuple[int, ...], *tuned: str, num_threads: int | None = None
) -> Recipe:
    threads = str(num_threads or len(where))
    command = [str(layout.llama_program("llama-server")), "-m", str(layout.gguf(weights)), "--alias", MODEL_NAME]
    command += ["--host", "127.0.0.1", "--port", "{port}", "-t", threads, "-tb", threads]
    command += ["-np", str(_NUM_SLOTS), "-c", str(_NUM_SLOTS * _SLOT_TOKENS), "-cb", *tuned]
    return Recipe(
        f"llama {label}",
        "llama",
        tuple(command),
        where,
        weights,
        "tuned" if tuned else "default",
        # The same tokens as with temperature 0 alone, without sorting the whole vocabulary for each of them.
        extra_body={"samplers": ["top_k"], "top_k": 1} if tuned else {},
    )


def _vllm(layout: Layout, cores: Cores) -> list[Recipe]:
    # As its documentation asks; where the allocator could not be had, it runs with the system's.
    preload = ":".join(str(path) for path in (layout.allocator, layout.openmp) if path.exists())
    environment = (
        ("LD_PRELOAD", preload),
        ("VLLM_CPU_KVCACHE_SPACE", "2"),
        ("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores.both))),
        ("VLLM_CACHE_ROOT", str(layout.folder("vllm") / "cache")),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("HF_HUB_OFFLINE", "1"),
    )

    def server(label: str, *tuned: str) -> Recipe:
        command = [str(layout.program("vllm", "vllm")), "serve", str(layout.hugging_face)]
        command += ["--served-model-name", MODEL_NAME, "--dtype", "float32", "--host", "127.0.0.1", "--port", "{port}"]
        command += ["--max-model-len", str(_VLLM_MODEL_TOKENS), "--max-num-seqs", "16", *tuned]
        tuning: Tuning = "tuned" if tuned else "default"
        return Recipe(f"vLLM {label}", "vllm", tuple(command), cores.both, "F32", tuning, environment)

    return [server("default"), server("tuned", "--max-num-batched-tokens", "256")]


def _transformers(layout: Layout, cores: Cores) -> Recipe:
    command = [str(layout.program("transformers", "transformers")), "serve", str(layout.hugging_face)]
    command += ["--device", "cpu", "--dtype", "float32", "--attn-implementation", "sdpa", "--continuous-batching"]
    command += ["--cb-block-size", "32", "--cb-num-blocks", "1400", "--cb-max-batch-tokens", "2304"]
    command += ["--host", "127.0.0.1", "--port", "{port}"]
    return Recipe(
        "transformers",
        "transformers",
        tuple(command),
        cores.both,
        "F32",
        environment=(("OMP_NUM_THREADS", str(len(cores.both))), ("HF_HUB_OFFLINE", "1")),
        # It knows no `ignore_eos` and refuses fields that it does not know.
        extra_body={
            "ignore_eos": None,
            "skip_special_tokens": None,
            "stream_options": None,
            "generation_config": '{"eos_token_id": -1, "do_sample": false}',
        },
        model=str(layout.hugging_face),
    )


def _baton(layout: Layout, cores: Cores) -> list[Recipe]:
    split = ("--prefill-cores", str(cores.prefill), "--decode-cores", str(cores.decode))

    def server(label: str, weights: Weights, *options: str) -> Recipe:
        command = [sys.executable, "-m", "baton", "serve", str(layout.gguf(weights)), "--served-model-name", MODEL_NAME]
        command += ["--host", "127.0.0.1", "--port", "{port}", *options]
        return Recipe(f"Baton {weights} {label}", "baton", tuple(command), cores.both, weights)

    weights: tuple[Weights, ...] = ("Q4_0", "Q4_1")
    make = ("make", "-C", str(CHECKOUT), "serve", "PORT={port}")
    return [
        *(server("split", w, *split) for w in weights),
        *(server("colocated", w, "--mode", "colocated", "--threads", "2") for w in weights),
        *(server("colocated, 1 thread", w, "--mode", "colocated", "--threads", "1") for w in weights),
        Recipe("make serve", "baton", make, cores.both, "Q4_1", model="smollm2"),
    ]
