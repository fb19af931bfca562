#!/usr/bin/env python3
"""Measure what quantised arithmetic costs in quality: perplexity of a model on the text shipped for it.

    python scripts/perplexity.py [MODEL] [--text FILE] [--context 1024] [--json FILE]

The text is cut into windows of `context` tokens; each token after a window's first half is predicted from all before
it in the window, so that every prediction has a context. One table: each arithmetic against float32, with the share of
positions where the likeliest token is the same, and the mean divergence of the distributions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model.batch import ForwardBatch
from model.decoder import Decoder
from model.errors import ModelError
from model.loader import LoadOptions, load_model
from model.source import ModelFiles, resolve
from router.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "bench" / "texts" / "recruiting.txt"
BLOCK = 16
KV_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """One way to compute: the loader's quantisation and dtype, and the type of the KV cache."""

    quantization: str
    kv_dtype: str
    dtype: str = "auto"


# The first one is what the others are compared with.
ARITHMETICS = (
    Arithmetic("none", "float32"),
    Arithmetic("none", "float16"),
    Arithmetic("stored", "float32"),
    Arithmetic("stored", "float16"),
    Arithmetic("stored", "bfloat16"),
    Arithmetic("int8", "float16"),
    Arithmetic("int4", "float16"),
    # What a GPU computes: the sums are float32 there too, so that the figures hold for it.
    Arithmetic("none", "bfloat16", "bfloat16"),
    Arithmetic("fp8", "bfloat16", "bfloat16"),
)


@dataclass(frozen=True, slots=True)
class Quality:
    """What one arithmetic gives.

    Attributes:
        same_top: share of positions whose likeliest token is float32's.
        divergence: mean Kullback-Leibler divergence from float32's distributions, in nats.
    """

    quantization: str
    kv_dtype: str
    arithmetic: str
    num_predicted: int
    perplexity: float
    ratio: float
    same_top: float
    divergence: float


def windows_of(tokens: list[int], context: int) -> list[list[int]]:
    """Cut into overlapping windows whose second halves cover the text once; a short rest is left out."""
    half = context // 2
    return [tokens[start : start + context] for start in range(0, len(tokens) - context + 1, half)]


def predict(decoder: Decoder, window: list[int], kv_dtype: torch.dtype) -> Tensor:
    """Return log probabilities `[n, vocab]` of the tokens in the second half of a window."""
    size, first = len(window), len(window) // 2
    num_blocks = -(-size // BLOCK)
    rows = torch.arange(size)
    batch = ForwardBatch(
        token_ids=torch.tensor(window),
        positions=rows,
        slot_mapping=rows,
        query_start=torch.tensor([0, size], dtype=torch.int32),
        seq_lens=torch.tensor([size], dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        logits_indices=rows[first - 1 : -1].clone(),
        is_decode=False,
    )
    kv_cache = torch.zeros(decoder.kv_shape(num_blocks, BLOCK), dtype=kv_dtype)
    return torch.log_softmax(decoder.forward(batch, kv_cache), dim=-1)


def measure(
    files: ModelFiles, windows: list[list[int]], console: Console, arithmetics: Sequence[Arithmetic] = ARITHMETICS
) -> list[Quality]:
    """Measure each arithmetic on the same windows; the first of them is what the others are compared with."""
    exact_decoder = load_model(files, LoadOptions(quantization="none"))
    exact = [predict(exact_decoder, window, torch.float32) for window in windows]
    found: list[Quality] = []
    for arithmetic in arithmetics:
        decoder = load_model(files, LoadOptions(quantization=arithmetic.quantization, dtype=arithmetic.dtype))
        total = same = divergence = 0.0
        count = 0
        for window, theirs in zip(windows, exact, strict=True):
            ours = predict(decoder, window, KV_DTYPES[arithmetic.kv_dtype])
            answers = torch.tensor(window[len(window) // 2 :])
            total -= float(ours.gather(1, answers[:, None]).sum())
            same += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
            divergence += float((theirs.exp() * (theirs - ours)).sum())
            count += len(answers)
        perplexity = math.exp(total / count)
        ratio = perplexity / found[0].perplexity if found else 1.0
        names = (arithmetic.quantization, arithmetic.kv_dtype, decoder.arithmetic)
        found.append(Quality(*names, count, perplexity, ratio, same / count, divergence / count))
        console.print(f"{decoder.backend}, KV {arithmetic.kv_dtype}: perplexity {perplexity:.4f}")
    return found


def table_of(found: list[Quality]) -> Table:
    """Lay the figures out."""
    table = Table("quantization", "weights", "KV", "perplexity", "against float32", "same top token", "KL, nats")
    for q in found:
        figures = (f"{q.perplexity:.3f}", f"{(q.ratio - 1) * 100:+.2f} %", f"{q.same_top:.1%}", f"{q.divergence:.4f}")
        table.add_row(q.quantization, q.arithmetic, q.kv_dtype, *figures)
    return table


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window (1024)")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "baton")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(1)
    try:
        files = resolve(args.model, args.cache_dir, console.print)
        tokens = Tokenizer(files.path).encode(args.text.read_text(encoding="utf-8"))
        windows = windows_of(list(tokens), args.context)
        if not windows:
            console.print(f"{args.text.name} has {len(tokens)} tokens, fewer than one window of {args.context}")
            return 2
        found = measure(files, windows, console)
    except ModelError as error:
        console.print(str(error))
        return 2
    console.print(table_of(found))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(q) for q in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
