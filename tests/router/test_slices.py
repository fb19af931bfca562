"""Large answers are shaped a little at a time: no step makes many values, and the event loop runs between slices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from protocol.errors import InvalidRequest
from protocol.readout import PromptLogprobs
from protocol.request import FinishReason, TokenLogprobs
from protocol.wire import Reserve
from router import decisions, embeddings, systemone
from router.api import ChatRequest, CompletionRequest, parse
from router.deciding import ReadUsage, Verdict
from router.generated import is_wide
from router.intake import Intake, Job
from router.logprob_lists import STEP_TOKENS
from router.prompt_logprobs import ReadPrompts
from router.questions import Distribution
from router.response_request import ResponsesRequest
from router.response_shape import shape_of
from router.slices import Slices
from router.text import LoggedToken, Piece
from router.tokenizer import Tokenizer
from tests.router.tiny import byte_id, byte_ids
from tests.router.workers import HI, LENGTH, events, staged

NUM_TOP, NUM_TOKENS = 20, 100
TOP = TokenLogprobs(-0.5, tuple((byte_id(chr(65 + i)), -0.5 - i) for i in range(NUM_TOP)), 1)
KINDS: dict[str, Any] = {"chat": ChatRequest, "completions": CompletionRequest, "responses": ResponsesRequest}


def job_of(tokenizer: Tokenizer, kind: str, max_answer_values: int = 1 << 20, **fields: Any) -> Job:
    """Make a job of a request that asks for many log probabilities."""
    asked: dict[str, Any] = {
        "chat": {**HI, "logprobs": True, "top_logprobs": NUM_TOP, "n": 16},
        "completions": {"model": "m", "prompt": "abc", "logprobs": NUM_TOP, "n": 16},
        "responses": {
            "model": "m",
            "input": "hi",
            "top_logprobs": NUM_TOP,
            "include": ["message.output_text.logprobs"],
        },
    }[kind]
    length = "max_output_tokens" if kind == "responses" else "max_tokens"
    body = json.dumps({**asked, length: NUM_TOKENS, **fields}).encode()
    return Intake(tokenizer, ("m",), max_answer_values).job(parse(body, KINDS[kind]), 10_000)


def whole(job: Job) -> list[Piece]:
    """Give each choice of a job whole."""
    ids, logged = [byte_id("x")] * NUM_TOKENS, [LoggedToken(byte_id("x"), TOP, i) for i in range(NUM_TOKENS)]
    return [Piece("x" * NUM_TOKENS, list(ids), list(logged), FinishReason.LENGTH) for _ in job.choices]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the tokens whose text was made: [0] since it was set to 0."""
    count, token_bytes = [0], Tokenizer.token_bytes

    def counted(tokenizer: Tokenizer, token_id: int, skip_special: bool = False) -> bytes:
        count[0] += 1
        return token_bytes(tokenizer, token_id, skip_special)

    monkeypatch.setattr(Tokenizer, "token_bytes", counted)
    return count


def steps(parts: Iterator[bytes], made: list[int]) -> tuple[bytes, list[int]]:
    """Return an answer and what each of its steps made."""
    found, counts = [], []
    made[0] = 0
    for part in parts:
        found.append(part)
        counts.append(made[0])
        made[0] = 0
    return b"".join(found), counts


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_of_an_answer_makes_more_than_a_few_tokens(tokenizer: Tokenizer, made: list[int], kind: str) -> None:
    job = job_of(tokenizer, kind)
    data, counts = steps(shape_of(job, tokenizer, "x").parts(whole(job)), made)
    assert sum(counts) >= len(job.choices) * NUM_TOKENS * NUM_TOP
    assert max(counts) <= STEP_TOKENS * (2 * NUM_TOP + 4)
    answer = json.loads(data)
    if kind == "chat":
        assert [len(choice["logprobs"]["content"]) for choice in answer["choices"]] == [NUM_TOKENS] * 16
        last = answer["choices"][15]["logprobs"]["content"][-1]
        assert last["token"] == "x" and len(last["top_logprobs"]) == NUM_TOP and last["bytes"] == [120]
    elif kind == "completions":
        for choice in answer["choices"]:
            assert choice["logprobs"]["text_offset"] == list(range(NUM_TOKENS))
            assert {len(values) for values in choice["logprobs"].values()} == {NUM_TOKENS}
            assert len(choice["logprobs"]["top_logprobs"][-1]) == NUM_TOP + 1
    else:
        (part,) = answer["output"][0]["content"]
        assert len(part["logprobs"]) == NUM_TOKENS and part["logprobs"][0]["top_logprobs"][1]["token"] == "B"
    assert answer["usage"]


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_what_was_read_off_prompts_is_shaped_in_steps(tokenizer: Tokenizer, made: list[int], kind: str) -> None:
    fields = {"echo": True, "prompt": ["a" * 200, "b" * 200], "n": 2} if kind == "completions" else {"n": 2}
    job = job_of(tokenizer, kind, prompt_logprobs=NUM_TOP, **fields)
    found = []
    for prompt in job.prompts:
        num_rows = len(prompt.token_ids) - 1
        values = np.full((num_rows, 1 + NUM_TOP), -0.5, "<f4")
        integers = np.tile(np.array([2, *[i for i, _ in TOP.top]], "<i4"), (num_rows, 1))
        found.append(PromptLogprobs.of(NUM_TOP, values.tobytes(), integers.tobytes()))
    shape = shape_of(job, tokenizer, "x", ReadPrompts(job.prompts, tuple(found)))
    made[0], counts = 0, []
    for _ in shape.prepare():
        counts.append(made[0])
        made[0] = 0
    assert len(counts) > 1 and max(counts) <= STEP_TOKENS * (2 * NUM_TOP + 4)
    data, counts = steps(shape.parts(whole(job)), made)
    assert max(counts) <= STEP_TOKENS * (2 * NUM_TOP + 4)
    answer = json.loads(data)
    shown = answer if kind == "chat" else answer["choices"][3]
    assert len(shown["prompt_logprobs"]) == len(job.prompts[-1].token_ids) and shown["prompt_logprobs"][0] is None
    if kind == "completions":
        logprobs = answer["choices"][3]["logprobs"]
        assert logprobs["text_offset"] == list(range(300)) and logprobs["tokens"][199:201] == ["b", "x"]
        assert logprobs["token_logprobs"][:2] == [None, -0.5]
        chunk = json.loads(shape.chunk(1, whole(job)[1])[6:])
        assert chunk["choices"][0]["logprobs"] == {**logprobs, "tokens": ["a"] * 200 + ["x"] * 100} | {
            "top_logprobs": answer["choices"][1]["logprobs"]["top_logprobs"]
        }


def test_vectors_and_distributions_are_shaped_one_at_a_time() -> None:
    asked = embeddings.EmbeddingsRequest(model="m", input=["a"] * 300)
    vectors = [np.arange(4, dtype="<f4").tobytes()] * 300
    parts = list(embeddings.parts_of(embeddings.Embedded(asked, vectors, 300)))
    assert len(parts) > 300 and json.loads(b"".join(parts))["data"][299] == {
        "object": "embedding", "index": 299, "embedding": [0.0, 1.0, 2.0, 3.0]
    }  # fmt: skip
    spread = Distribution((0.5, 0.5), 1.0)
    verdict = Verdict([spread] * 9, ReadUsage(10, 2, 5))
    choice = {"type": "choice", "instructions": "?", "choices": [{"value": "a"}, {"value": "b"}]}
    body = {"model": "m", "input": "x", "questions": [choice] * 9}
    parts = list(decisions.parts(parse(json.dumps(body).encode(), decisions.DecisionsRequest), verdict))
    answer = json.loads(b"".join(parts))
    assert len(parts) > 9 and len(answer["answers"]) == 9 and answer["usage"]["total_tokens"] == 10
    questions = {str(i): {"type": "choice", "criteria": {"a": None, "b": None}} for i in range(9)}
    other = parse(json.dumps({"state": "x", "questions": questions}).encode(), systemone.SystemOneRequest)
    parts = list(systemone.parts(other, verdict, "m"))
    answer = json.loads(b"".join(parts))
    assert len(parts) > 9 and list(answer["answers"]) == [str(i) for i in range(9)] and answer["model"] == "m"


# --- turns ---


async def test_however_many_are_shaped_the_loop_runs_between_two_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.slices.SLICE_S", 0.0)  # a step is a slice
    slices, order, is_over = Slices(), [], False

    def work(name: str) -> Iterator[str]:
        for _ in range(20):
            order.append(name)
            yield name

    async def count() -> None:
        while not is_over:
            order.append("loop")
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    found = await asyncio.gather(*(slices.run(work(name)) for name in "abc"))
    is_over = True
    await counting
    assert found == [[name] * 20 for name in "abc"] and slices.num_slices >= 60
    told = "".join("|" if name == "loop" else name for name in order)
    assert max(map(len, told.split("|"))) <= 2, "one slice in a round, and the next in its turn"
    assert abs(told.find("c") - told.find("a")) < 8, "each has its turn"


async def test_a_short_answer_is_shaped_at_once_and_an_error_frees_the_turn() -> None:
    slices = Slices()
    assert await slices.run(iter([1, 2])) == [1, 2] and slices.num_slices == 1

    def broken() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await slices.run(broken())
    assert await slices.run(()) == []


async def test_a_wide_answer_leaves_the_loop_to_others(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer) as stage:
        prefill, decode = await stage.pair(max_model_len=1000, num_blocks=5000, max_num_seqs=64)
        n, length = 32, 20
        body = {"model": "m", "prompt": "q", "n": n, "max_tokens": length, "logprobs": NUM_TOP}
        slices = stage.router.core.slices
        for stream in (False, True):
            before = slices.num_slices
            asked = asyncio.create_task(stage.http.post(f"{stage.url}/v1/completions", json={**body, "stream": stream}))
            for _ in range(n):
                reserve = await decode.hear(Reserve)
                await prefill.first(byte_id("x"), logprobs=TOP)
                decode.emit(reserve, byte_ids("x" * (length - 1)), finish=LENGTH, logprobs=TOP)
            async with await asked as response:
                if stream:
                    chunks = (await events(response))[:-1]
                    told = [c["choices"][0] for c in chunks if c["choices"]]
                    assert sum(len(one["logprobs"]["tokens"]) for one in told) == n * length
                else:
                    choices = (await response.json())["choices"]
                    assert {len(one["logprobs"]["tokens"]) for one in choices} == {length}
            assert slices.num_slices - before > 5


def test_a_narrow_stream_is_written_by_its_session(tokenizer: Tokenizer) -> None:
    for fields, expected in (({"n": 1}, False), ({"n": 12}, False), ({"n": 13}, True)):
        assert is_wide(job_of(tokenizer, "completions", **fields)) is expected
    assert not is_wide(job_of(tokenizer, "completions", n=128, logprobs=None))


# --- how much ---


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("completions", {"n": 128}, "max_tokens"),
        ("completions", {"n": 1, "prompt": ["a"] * 128}, "max_tokens"),
        ("completions", {"max_tokens": 9000, "n": 2}, "max_tokens"),
        ("completions", {"prompt": "a" * 5000, "prompt_logprobs": 20, "logprobs": None, "n": 2}, "prompt"),
        ("completions", {"prompt": ["a" * 5000] * 16, "echo": True, "n": 1, "max_tokens": 0, "logprobs": 1}, "prompt"),
        ("completions", {"prompt": "a" * 9000, "echo": True, "logprobs": None, "n": 16}, "prompt"),
        ("completions", {"prompt": "a" * 9000, "return_token_ids": True, "logprobs": None, "n": 16}, "prompt"),
        ("chat", {"n": 128}, "max_tokens"),
        ("chat", {"n": 128, "max_tokens": None, "max_completion_tokens": 100}, "max_completion_tokens"),
        ("responses", {"max_output_tokens": 7000}, "max_output_tokens"),
    ],
)
def test_a_product_that_is_too_large_is_refused_with_its_factors_and_the_limit(
    tokenizer: Tokenizer, kind: str, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest, match=r"\d+ .* x .* are \d+; one answer may hold 140000") as caught:
        job_of(tokenizer, kind, 140_000, **fields)
    assert caught.value.param == param


def test_where_no_length_is_asked_for_an_answer_ends_where_it_is_full(tokenizer: Tokenizer) -> None:
    job = job_of(tokenizer, "chat", 100_000, max_tokens=None, n=8)
    assert {choice.sampling.max_tokens for choice in job.choices} == {100_000 // (8 * 21)}
    plain = job_of(tokenizer, "chat", 100_000, max_tokens=None, n=8, logprobs=None, top_logprobs=None)
    assert plain.choices[0].sampling.max_tokens > 9000, "text alone is bounded by the context"
