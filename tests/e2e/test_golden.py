"""The same tokens as transformers in float32: in both modes, from either file format, alone and eight at once.

The default run takes every prompt eight at once in the disaggregated server, and as many in the others as its time
allows; `make test-golden` (`-m matrix`) takes every prompt in every combination, in about a quarter of an hour.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from router.tokenizer import Tokenizer
from tests.e2e.client import complete, completion, gather_limited, session
from tests.e2e.server import Server, serving
from tests.golden.export_safetensors import export_safetensors

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow]

# The prompts are sorted by length: so many are shorter than 30 and 400 tokens.
NUM_SHORT, NUM_MIDDLE = 4, 14
# Between two correct float32 implementations logits differ by some 1e-5; differences of log probabilities likewise.
LOGPROB_TOLERANCE = 1e-3
# Eight long prompts at once in float32 take longer than a server of the default settings lets a newcomer wait.
EXACT = ("--dtype", "float32", "--max-wait-s", "600")


@pytest.fixture(scope="module")
def safetensors_copy(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Hugging Face directory with the same weights in float32."""
    folder = tmp_path_factory.mktemp("copy") / "SmolLM2-copy"
    return export_safetensors(gguf, folder, Tokenizer(gguf).to_json())


@pytest.fixture(scope="module")
def exact(gguf: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A disaggregated server that computes in float32."""
    with serving("smollm2", tmp_path_factory.mktemp("exact"), cache_dir, *EXACT) as server:
        yield server


@pytest.fixture(params=[(m, f) for m in ("disaggregated", "colocated") for f in ("gguf", "safetensors")], ids="-".join)
def any_server(
    request: pytest.FixtureRequest, gguf: Path, safetensors_copy: Path, cache_dir: Path, tmp_path: Path
) -> Iterator[Server]:
    """Every combination of mode and file format."""
    mode, file_format = request.param
    model = gguf if file_format == "gguf" else safetensors_copy
    options = ("--mode", mode, "--served-model-name", "smollm2", *EXACT)
    with serving(str(model), tmp_path, cache_dir, *options) as server:
        yield server


async def _answers(server: Server, golden: list[dict[str, Any]], limit: int) -> list[Any]:
    async with session() as http:
        bodies = [completion(g["prompt"], max_tokens=len(g["tokens"]), ignore_eos=True, logprobs=5) for g in golden]
        return await gather_limited(limit, [complete(http, server.url, body) for body in bodies])


def _check(answers: list[Any], golden: list[dict[str, Any]]) -> None:
    wrong = [g["name"] for a, g in zip(answers, golden, strict=True) if a["token_ids"] != g["tokens"]]
    assert wrong == []


def _check_logprobs(answers: list[Any], golden: list[dict[str, Any]]) -> None:
    """Compare differences of log probabilities with those of the golden logits: the normaliser cancels."""
    num_compared = 0
    for answer, expected in zip(answers, golden, strict=True):
        for step, best in enumerate(expected.get("top_logits", [])):
            ours = sorted(answer["logprobs"]["top_logprobs"][step].values(), reverse=True)
            theirs = best["values"]
            for rank in range(1, min(len(ours), 5)):
                assert ours[0] - ours[rank] == pytest.approx(theirs[0] - theirs[rank], abs=LOGPROB_TOLERANCE)
                num_compared += 1
    assert num_compared >= 3 * 4 * 3


def test_the_golden_prompts_are_what_they_claim_to_be(golden: list[dict[str, Any]]) -> None:
    lengths = [len(g["prompt"]) for g in golden]
    assert len(golden) == 24 and min(lengths) == 5 and max(lengths) == 3000 and lengths == sorted(lengths)
    assert all(len(g["tokens"]) == 64 for g in golden)
    prompts = [g["prompt"] for g in golden]
    assert any(a[:600] == b[:600] for i, a in enumerate(prompts) for b in prompts[:i] if len(a) > 600 < len(b))


async def test_disaggregated_eight_at_once(exact: Server, golden: list[dict[str, Any]]) -> None:
    answers = await _answers(exact, golden, 8)
    _check(answers, golden)
    _check_logprobs(answers, golden)


async def test_disaggregated_one_by_one(exact: Server, golden: list[dict[str, Any]]) -> None:
    _check(await _answers(exact, golden[:NUM_MIDDLE], 1), golden[:NUM_MIDDLE])


async def test_colocated_eight_at_once(
    gguf: Path, cache_dir: Path, golden: list[dict[str, Any]], tmp_path: Path
) -> None:
    with serving("smollm2", tmp_path, cache_dir, "--mode", "colocated", *EXACT) as server:
        _check(await _answers(server, golden[:NUM_MIDDLE], 8), golden[:NUM_MIDDLE])


async def test_a_safetensors_copy_eight_at_once(
    cache_dir: Path, safetensors_copy: Path, golden: list[dict[str, Any]], tmp_path: Path
) -> None:
    # Floats in the file: float32 is the default here.
    with serving(str(safetensors_copy), tmp_path, cache_dir, "--served-model-name", "smollm2") as server:
        _check(await _answers(server, golden[:NUM_MIDDLE], 8), golden[:NUM_MIDDLE])


async def test_torch_kernels_give_the_golden_tokens_too(
    gguf: Path, cache_dir: Path, golden: list[dict[str, Any]], tmp_path: Path
) -> None:
    with serving("smollm2", tmp_path, cache_dir, "--kernels", "torch") as server:
        _check(await _answers(server, golden[:NUM_SHORT], 4), golden[:NUM_SHORT])


async def test_quantised_tokens_are_the_same_alone_eight_at_once_and_colocated(
    disaggregated: Server, colocated: Server, golden: list[dict[str, Any]]
) -> None:
    """The default arithmetic rounds, but always in the same way: nothing depends on batch, chunk, phase or mode."""
    short = golden[:NUM_MIDDLE]
    runs = [await _answers(*run) for run in ((disaggregated, short, 8), (disaggregated, short, 1))]
    runs.append(await _answers(colocated, short, 8))
    first, *others = ([answer["token_ids"] for answer in answers] for answers in runs)
    assert all(other == first for other in others)


@pytest.mark.matrix
async def test_every_mode_and_format_alone_and_eight_at_once(any_server: Server, golden: list[dict[str, Any]]) -> None:
    for limit in (8, 1):
        _check(await _answers(any_server, golden, limit), golden)
