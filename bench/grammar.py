"""What a grammar costs in a decode step, by each library that is installed: `python -m bench.grammar MODEL`.

1. Each library is made for the model's vocabulary, and compiles each schema: first and again.
2. A document that obeys it is walked token by token: the mask before each token, then its acceptance. Several rounds;
   the first one, in which lexers learn, is counted with the others, and told apart as `first`.
3. The model decodes the same documents, one sequence at a time, with and without their grammar, sampling at temperature
   1: what the grammar adds to a step is the difference of the medians.

Costs are CPU time of one thread, so that they stand on a busy machine too, less what its caches lose.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from engine.batch import BatchItem
from engine.config import EngineConfig
from engine.grammar import GrammarState
from engine.grammar_compiler import open_backend
from engine.loading import LoadedModel, load
from engine.runner import Runner
from engine.sequence import Sequence as TokenSequence
from engine.sequence import num_blocks_for
from model.source import resolve
from protocol.block_hash import root_hash
from protocol.request import Grammar, GrammarKind, SamplingParams
from protocol.vocabulary import TokenBytes

BACKENDS: Final = ("llguidance", "xgrammar")
NUM_ROUNDS: Final = 5

PERSON: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "skills": {"type": "array", "items": {"type": "string"}},
        "level": {"enum": ["junior", "mid", "senior"]},
    },
    "required": ["name", "age", "skills", "level"],
    "additionalProperties": False,
}
JUDGEMENT: Final = {
    "type": "object",
    "properties": {
        "qualifications": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "qualification": {"type": "string"},
                    "meets": {"enum": ["yes", "no", "unclear"]},
                    "evidence": {"type": "array", "items": {"type": "string", "maxLength": 200}},
                    "confidence": {"type": "number", "minimum": 0, "maximum": 1},
                },
                "required": ["qualification", "meets", "evidence", "confidence"],
                "additionalProperties": False,
            },
        },
        "summary": {"type": "string"},
    },
    "required": ["qualifications", "summary"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A grammar and a document that obeys it."""

    name: str
    grammar: Grammar
    text: str


def _schema(name: str, schema: dict[str, object], document: object) -> Case:
    grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))
    return Case(name, grammar, json.dumps(document))


def cases() -> list[Case]:
    """Return what is measured: a short schema, a nested one, any JSON, a regular expression."""
    person = {"name": "Ann Smith", "age": 41, "skills": ["Rust", "distributed systems"], "level": "senior"}
    quote = "Led the migration of the billing platform to Rust over two years."
    item = {"qualification": "5 years of Rust", "meets": "yes", "evidence": [quote, quote], "confidence": 0.85}
    judgement = {"qualifications": [item] * 3, "summary": "A strong candidate with much experience in Rust."}
    date = Grammar(kind=GrammarKind.REGEX, text=r"(\d{4}-\d{2}-\d{2}[,.] )+end")
    return [
        _schema("person", PERSON, person),
        _schema("judgement", JUDGEMENT, judgement),
        _schema("any object", {"type": "object"}, judgement),
        Case("dates by regex", date, "2026-11-28, " * 12 + "2026-01-01. end"),
    ]


def timed(work: Callable[[], object]) -> float:
    """Return how long some work occupies this thread, in microseconds: a busy machine changes little of that."""
    started_s = time.thread_time()
    work()
    return (time.thread_time() - started_s) * 1e6


def walk(case: Case, tokens: list[int], state: GrammarState) -> tuple[list[float], list[float]]:
    """Return the microseconds of each mask and of each acceptance along a document."""
    masks, accepts = [], []
    for token_id in tokens:
        masks.append(timed(state.mask))
        accepts.append(timed(partial(state.accept, token_id)))
    if state.failure is not None:
        raise ValueError(f"{case.name}: {state.failure}")
    return masks, accepts


def measure(name: str, vocabulary: TokenBytes, vocab_size: int) -> None:
    """Print a line for each case."""
    started_s = time.perf_counter()
    backend = open_backend(name, vocabulary, vocab_size)
    print(
        f"{name}: made for the vocabulary of {vocab_size} in {time.perf_counter() - started_s:.2f} s, import included"
    )
    print("  case             compile ms      mask us: p50   mean    p99  worst  first mean   accept us  tokens")
    for case in cases():
        tokens = vocabulary.encode(case.text)
        compiles = [timed(partial(backend.compile, case.grammar)) / 1e3 for _ in range(3)]
        compiled = backend.compile(case.grammar)
        masks, accepts, first = [], [], 0.0
        for number in range(NUM_ROUNDS):
            sampling = SamplingParams(seed=0, eos_token_ids=vocabulary.eos_token_ids, grammar=case.grammar)
            state = GrammarState(compiled.matcher(), sampling, -(-vocab_size // 32))
            of_masks, of_accepts = walk(case, tokens, state)
            masks += of_masks
            accepts += of_accepts
            first = first or float(np.mean(of_masks))
            assert number or first
        p50, p99 = np.percentile(masks, [50, 99])
        print(
            f"  {case.name:<16} {compiles[0]:6.1f} {min(compiles[1:]):6.1f}         {p50:6.1f} {np.mean(masks):6.1f} "
            f"{p99:6.1f} {max(masks):6.0f}      {first:6.1f}      {np.median(accepts):6.1f}  {len(tokens):6}"
        )


class StepRig:
    """Decodes a document that is known beforehand, one token per step, on a loaded model."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._runner = Runner(model.decoder, model.new_kv_cache())

    def steps_us(self, tokens: list[int], sampling: SamplingParams, grammar: GrammarState | None) -> list[float]:
        """Return the microseconds of each step but the first: forward, mask if any, sampling, acceptance."""
        block_size = self._model.fingerprint.block_size
        root = root_hash(self._model.fingerprint.model_hash, "")
        sequence = TokenSequence(1, 1, 0, [1], 1, sampling, root, [], grammar)
        sequence.add_blocks(list(range(num_blocks_for(len(tokens) + 1, block_size))))
        found = []
        for position, token_id in enumerate(tokens):
            item = BatchItem(sequence, position, 1, wants_logits=True)
            taken = timed(partial(self._runner.step, [item]))
            sequence.tokens.append(token_id)
            if grammar is not None:
                taken += timed(partial(grammar.accept, token_id))
            found.append(taken)
        return found[1:]


def measure_steps(name: str, model: LoadedModel, vocabulary: TokenBytes) -> None:
    """Print what the grammar of each case adds to a step of the model."""
    backend, rig = open_backend(name, vocabulary, model.vocab_size), StepRig(model)
    print(f"{name}: steps of one sequence at temperature 1, median us")
    for case in cases():
        tokens = vocabulary.encode(case.text)
        compiled, plain, bound = backend.compile(case.grammar), [], []
        for _ in range(NUM_ROUNDS):
            sampling = SamplingParams(seed=0, temperature=1.0, eos_token_ids=vocabulary.eos_token_ids)
            plain += rig.steps_us(tokens, sampling, None)
            state = GrammarState(compiled.matcher(), sampling, -(-model.vocab_size // 32))
            bound += rig.steps_us(tokens, sampling, state)
        free, taken = float(np.median(plain)), float(np.median(bound))
        print(
            f"  {case.name:<16} free {free:7.0f}   bound {taken:7.0f}   {taken - free:+6.0f} us, "
            f"{100 * (taken - free) / free:+.1f} %"
        )


def _is_usable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: not measured ({error})")
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.grammar", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="as `baton serve` takes it")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "baton")
    parser.add_argument("--no-steps", action="store_true", help="leave out the steps of the model")
    given = parser.parse_args(arguments)
    path = resolve(given.model, given.cache_dir, print).path
    vocabulary = TokenBytes.of_model(path)
    installed = [name for name in BACKENDS if _is_usable(name)]
    for name in installed:
        measure(name, vocabulary, len(vocabulary.tokens))
    if not given.no_steps:
        model = load(EngineConfig(model=str(path), device="cpu"), print, given.cache_dir)
        for name in installed:
            measure_steps(name, model, vocabulary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
