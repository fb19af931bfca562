"""Streams over HTTP: `baton serve` with both roles in one process, on random weights, and eight clients.

1. A folder gets the model's config and a tokenizer whose every id is a word, since the router counts in text.
2. `baton serve` starts on it, colocated; its weights are drawn on the host, which is why the small model is taken.
3. Eight requests with prompts of ids go in together; the gaps between their chunks are the ITL at the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

import msgspec
import uvloop
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.client import Budgets, Reply, new_session, stream
from bench.gpu.points import Figures, Point, Section, Skip
from bench.gpu.rig import Stage
from bench.gpu.shapes import BenchModel, step_bytes
from bench.gpu.timing import percentile

_BATCH: Final = 8
_CONTEXT_TOKENS: Final = 1024
_NUM_OUTPUT_TOKENS, _NUM_REHEARSED_TOKENS = 256, 48
_NUM_KV_BLOCKS: Final = 2048
_MODEL_NAME: Final = "m"
_READY_BUDGET_S, _STOP_BUDGET_S, _REQUEST_BUDGET_S = 90.0, 20.0, 60.0
_LOOK_S: Final = 0.2
_CHECKOUT: Final = Path(__file__).resolve().parents[2]


def section(stage: Stage, name: str, share_s: float) -> Section:
    """Give the one point: batch 8 at 1k."""
    keys: Figures = {"batch": _BATCH, "context_tokens": _CONTEXT_TOKENS}
    need_s = 45.0 * stage.scale.need_factor
    return Section("http", name, share_s, (Point("batch 8, context 1k", keys, need_s, partial(_measure, stage, name)),))


def write_model(model: BenchModel, folder: Path) -> None:
    """Write config.json, and a tokenizer.json that turns any id of the vocabulary into text."""
    (folder / "config.json").write_text(json.dumps(dict(model.hugging_face)), encoding="utf-8")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    vocabulary |= {f"Ġw{index}": index for index in range(len(letters), model.config.vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def gaps_while_all_ran(streams_s: Sequence[Sequence[float]], num_warm: int) -> list[float]:
    """Return the gaps of every stream, without its first ones, that lie where all of them ran."""
    begin_s, end_s = max(times[0] for times in streams_s), min(times[-1] for times in streams_s)
    return [
        b - a
        for times in streams_s
        for a, b in list(zip(times, times[1:], strict=False))[num_warm:]
        if begin_s <= a and b <= end_s
    ]


def _measure(stage: Stage, name: str) -> Figures:
    peaks = stage.ceilings
    stage.drop_rig()
    scale, model = stage.scale, stage.models[name]
    num_output_tokens = _NUM_OUTPUT_TOKENS if scale.token_divisor == 1 else _NUM_REHEARSED_TOKENS
    num_prompt_tokens = max(1, scale.tokens(_CONTEXT_TOKENS) - num_output_tokens // 2)
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        write_model(model, Path(folder))
        begin_s = time.monotonic()
        with _served(Path(folder), num_prompt_tokens + num_output_tokens + scale.block_size, stage) as url:
            ready_s = time.monotonic() - begin_s
            vocab = model.config.vocab_size
            uvloop.run(_ask(url, vocab, num_prompt_tokens, 4, seed=0))
            replies = uvloop.run(_ask(url, vocab, num_prompt_tokens, num_output_tokens, seed=1))
    if errors := [reply.error for reply in replies if reply.error is not None]:
        raise Skip(f"{len(errors)} of {len(replies)} requests failed: {errors[0]}")
    gaps_s = gaps_while_all_ran([reply.chunk_s for reply in replies], 2)
    if not gaps_s:
        raise Skip("the streams did not run side by side")
    floor_s = step_bytes(model.shape, _BATCH, scale.tokens(_CONTEXT_TOKENS)) / peaks.copy_bytes_per_s
    return {
        "itl_p50_ms": median(gaps_s) * 1e3,
        "itl_p99_ms": percentile(gaps_s, 0.99) * 1e3,
        "over_floor": median(gaps_s) / floor_s,
        "ttft_p50_ms": median(reply.chunk_s[0] - reply.started_s for reply in replies) * 1e3,
        "ready_s": ready_s,
        "num_gaps": len(gaps_s),
    }


async def _ask(url: str, vocab: int, num_prompt_tokens: int, num_output_tokens: int, seed: int) -> list[Reply]:
    draw, replies = random.Random(seed), [Reply() for _ in range(_BATCH)]
    bodies = [
        msgspec.json.encode({
            "model": _MODEL_NAME,
            "prompt": [draw.randrange(3, vocab) for _ in range(num_prompt_tokens)],
            "max_tokens": num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        })
        for _ in replies
    ]  # fmt: skip
    async with new_session(Budgets(request_s=_REQUEST_BUDGET_S)) as http:
        endpoint = f"{url}/v1/completions"
        await asyncio.gather(*(stream(http, endpoint, *pair) for pair in zip(bodies, replies, strict=True)))
    return replies


@contextlib.contextmanager
def _served(folder: Path, max_model_len: int, stage: Stage) -> Iterator[str]:
    """Start the server, yield its address once it is ready, and end it; raises Skip where it does not get ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "mode": "colocated",
        "port": port,
        "device": stage.device.type,
        "served-model-name": _MODEL_NAME,
        "max-model-len": max_model_len,
        "block-size": stage.scale.block_size,
        "num-kv-blocks": _NUM_KV_BLOCKS,
        "log-level": "warning",
    }
    command = [sys.executable, "-m", "baton", "serve", f"dummy:{folder}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    process = subprocess.Popen(command, cwd=_CHECKOUT, stdout=sys.stderr)
    try:
        url, give_up_s = f"http://127.0.0.1:{port}", time.monotonic() + _READY_BUDGET_S
        while not _is_ready(url):
            if process.poll() is not None:
                raise Skip(f"baton serve ended with code {process.returncode}")
            if time.monotonic() > give_up_s:
                raise Skip(f"baton serve was not ready within {_READY_BUDGET_S:.0f} s")
            time.sleep(_LOOK_S)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(_STOP_BUDGET_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
