"""Readouts through dispatch, and through a router with scripted workers."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.errors import InvalidRequest, RequestRejected
from protocol.readout import PromptLogprobs, ReadLabels, ReadPrompt
from protocol.request import SamplingParams
from protocol.wire import Abort, Declined, Prefill, Readings
from router.dispatch import Dispatch
from router.instructions import Fail, Finish, IdSource, Instruction, Placed, Read, Send, Submission, Terminal
from router.question_prompts import Asked, QuestionPrompts
from router.questions import Distribution, Option, choice, score, yes_no
from router.reading import WINDOW
from router.tokenizer import Tokenizer
from tests.router.cluster import cluster, first_token, key, row, submission
from tests.router.tiny import byte_id, byte_level_gguf
from tests.router.workers import ScriptedWorker, Stage, staged

LABELS = ReadLabels(token_ids=(65, 66))


def readout(request_id: int, kind: ReadLabels | ReadPrompt = LABELS, num_tokens: int = 6) -> Submission:
    prompt = tuple(range(num_tokens))
    return Submission(request_id, prompt, SamplingParams(seed=0, max_tokens=1), 1.0, readout=kind)


def readings(transfer_id: int, *labels: float, prompt: PromptLogprobs | None = None) -> Readings:
    return Readings(
        transfer_id=transfer_id, labels=labels, prompt=prompt, num_cached_tokens=0, queue_s=0.0, prefill_s=0.1
    )


def dispatch(num_prefills: int = 1, **fields: Any) -> Dispatch:
    return Dispatch(cluster(num_prefills, **fields), 3, placement_wait_s=10.0, ids=IdSource(0))


def placed(out: list[Instruction]) -> Prefill:
    """Give the one message that went out: readouts reserve nothing."""
    (message,) = [i.message for i in out if isinstance(i, Send)]
    assert isinstance(message, Prefill) and message.decode_worker_id is None
    return message


def ends(out: list[Instruction]) -> list[Terminal]:
    return [i for i in out if isinstance(i, Terminal)]


# --- dispatch ---


def test_a_readout_goes_to_a_prefill_worker_alone_and_ends_with_its_readings() -> None:
    d = dispatch()
    out = d.submit(readout(1), 0)
    message = placed(out)
    assert message.readout == LABELS and Placed(1, 0, message.transfer_id, "p0", None) in out
    out = d.readings(key("p0"), readings(message.transfer_id, -0.1, -3.0), 1)
    assert [type(i) for i in out] == [Read, Finish], "no abort: the worker holds nothing any more"
    assert d.num_running == d.num_waiting == 0
    assert d.readings(key("p0"), readings(message.transfer_id, -0.1, -3.0), 2) == []


def test_a_readout_lost_with_its_worker_is_read_again_and_ends_once() -> None:
    registry = cluster(2)
    d = Dispatch(registry, 3, placement_wait_s=10.0, ids=IdSource(0))
    first = placed(d.submit(readout(1), 0))
    registry.remove(key("p0"))
    out = d.worker_lost(key("p0"), 1)
    second = placed(out)
    assert second.transfer_id != first.transfer_id and second.epoch == 1 and not ends(out)
    assert d.readings(key("p0"), readings(first.transfer_id, -0.1, -3.0), 2) == [], "the old placement is history"
    out = d.readings(key("p1"), readings(second.transfer_id, -0.1, -3.0), 3)
    assert ends(out) == [i for i in out if isinstance(i, Finish)] and len(ends(out)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": (-0.1,)},
        {"labels": (-0.1, math.nan)},
        {"labels": (), "prompt": PromptLogprobs.of(0, b"1234" * 5, b"1234" * 5)},
    ],
)
def test_readings_that_were_not_asked_for_cost_a_placement(wrong: dict[str, Any]) -> None:
    d = dispatch()
    message = placed(d.submit(readout(1), 0))
    for _ in range(2):
        told = readings(message.transfer_id, *wrong["labels"], prompt=wrong.get("prompt"))
        out = d.readings(key("p0"), told, 1)
        assert not ends(out)
        message = placed(out)
    out = d.readings(key("p0"), readings(message.transfer_id, *wrong["labels"]), 2)
    assert [type(i) for i in ends(out)] == [Fail]


def test_a_first_token_for_a_readout_and_readings_for_a_stream_are_faults_of_the_worker() -> None:
    d = dispatch()
    message = placed(d.submit(readout(1), 0))
    out = d.first_token(key("p0"), first_token(message.transfer_id, row(1, 0, 0)), 1)
    assert any(isinstance(i, Send) and isinstance(i.message, Abort) for i in out) and not ends(out)
    out = d.submit(submission(2), 2)
    prefill = next(i.message for i in out if isinstance(i, Send) and isinstance(i.message, Prefill))
    out = d.readings(key("p0"), readings(prefill.transfer_id, -1.0), 3)
    assert not any(isinstance(i, Read) for i in out) and not ends(out)


def test_rows_of_a_whole_prompt_are_counted() -> None:
    d = dispatch()
    message = placed(d.submit(readout(1, ReadPrompt(num_top=1)), 0))
    told = PromptLogprobs.of(1, b"1234" * 10, b"1234" * 10)
    out = d.readings(key("p0"), readings(message.transfer_id, prompt=told), 1)
    assert [type(i) for i in out] == [Read, Finish]


def test_readouts_leave_half_of_a_prefill_workers_places_to_first_tokens() -> None:
    d = dispatch(max_num_seqs=4)
    out = [i for n in range(3) for i in d.submit(readout(n), 0)]
    assert sum(isinstance(i, Placed) for i in out) == 2 and d.num_waiting == 1
    assert any(isinstance(i, Placed) for i in d.submit(submission(10), 0)), "a stream passes the readout that waits"
    first = next(i.message for i in out if isinstance(i, Send))
    assert isinstance(first, Prefill)
    out = d.readings(key("p0"), readings(first.transfer_id, -1.0, -2.0), 1)
    assert any(isinstance(i, Placed) for i in out) and d.num_waiting == 0


def test_a_declined_readout_waits_and_is_cancelled_without_a_word_to_workers() -> None:
    d = dispatch()
    message = placed(d.submit(readout(1), 0))
    d.declined(key("p0"), Declined(transfer_id=message.transfer_id, reason="full"), 0)
    out = d.cancel(1, 0.01)
    assert len(ends(out)) == 1 and not any(isinstance(i, Send) for i in out)


# --- prompts and answers ---


def asked(*questions: Any) -> list[Asked]:
    return [Asked(question, f"questions[{i}]") for i, question in enumerate(questions)]


def test_questions_share_the_tokens_of_their_state(tokenizer: Tokenizer) -> None:
    prompts = QuestionPrompts(tokenizer, 4000)
    options = [Option("red"), Option("blue", "as the sky")]
    queries = prompts.queries(
        "It is the sea.  \n", asked(choice("Which colour?", options), score("How wet?", options)), "input"
    )
    assert queries[0].shared is queries[1].shared
    texts = [tokenizer.decode(query.shared + query.tokens, skip_special=False) for query in queries]
    assert texts[0].startswith("<|start|>user: It is the sea.\n\nWhich colour?\nA. red\nB. blue: as the sky\nAnswer")
    assert texts[0].endswith("<|stop|><|start|>assistant: ") and "0: red" in texts[1]
    assert queries[0].readout == ReadLabels(token_ids=(byte_id("A"), byte_id("B")))
    assert queries[1].readout == ReadLabels(token_ids=(byte_id("0"), byte_id("1")))


def test_without_a_chat_template_the_prompt_is_plain_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level_gguf(tmp_path / "plain.gguf", chat_template=None))
    (query,) = QuestionPrompts(tokenizer, 4000).queries("State", asked(score("Much?", [Option("a"), Option("b")])), "s")
    text = tokenizer.decode(query.shared + query.tokens, skip_special=False)
    assert text.startswith("State\n\nMuch?\n0: a") and text.endswith("\nAnswer:")


def test_what_has_no_single_token_is_refused(tokenizer: Tokenizer) -> None:
    prompts = QuestionPrompts(tokenizer, 40_000)
    with pytest.raises(InvalidRequest, match=r"questions\[0\].*'Yes'"):
        prompts.queries("s", asked(yes_no("Is it?")), "input")
    many = [Option(str(i)) for i in range(27)]
    with pytest.raises(InvalidRequest, match="27 options.*26 labels"):
        prompts.queries("s", asked(choice("Which?", many)), "input")


def test_a_state_or_question_that_does_not_fit_is_named(tokenizer: Tokenizer) -> None:
    question = score("Much?", [Option("a"), Option("b")])
    for text, param in (("", "input"), (" \n", "input"), ("x" * 100_000, "input"), ("x" * 150, r"questions\[0\]")):
        with pytest.raises(RequestRejected, match=param):
            QuestionPrompts(tokenizer, 200).queries(text, asked(question), "input")


def test_a_distribution_adds_up_and_says_how_much_it_stands_on() -> None:
    found = Distribution.of([math.log(0.3), math.log(0.1), -math.inf])
    assert found.probabilities == pytest.approx((0.75, 0.25, 0.0)) and found.option_mass == pytest.approx(0.4)
    assert found.best == 0 and found.expected == pytest.approx(0.25) and found.confidence == pytest.approx(0.625)
    nothing = Distribution.of([-math.inf, -math.inf])
    assert nothing.probabilities == (0.5, 0.5) and nothing.option_mass == nothing.confidence == 0.0
    sure = Distribution.of([-1e-9, -800.0])
    assert sure.confidence == pytest.approx(1.0)


# --- a router with scripted workers ---


def _question(name: str) -> dict[str, Any]:
    return {"type": "score", "name": name, "instructions": name, "levels": [{"label": "low"}, {"label": "high"}]}


def body_of(num_questions: int) -> dict[str, Any]:
    return {"model": "m", "input": "state", "questions": [_question(f"q{i}") for i in range(num_questions)]}


async def read_next(prefill: ScriptedWorker, *labels: float) -> Prefill:
    """Answer the next readout."""
    message = await prefill.hear(Prefill)
    prefill.say(readings(message.transfer_id, *labels))
    return message


def _num_open(stage: Stage) -> int:
    return stage.router.switchboard.num_requests


async def test_a_window_of_questions_is_out_and_answers_come_in_their_order(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer) as stage:
        prefill, decode = await stage.pair(max_model_len=4000, max_num_seqs=256, num_blocks=1000)
        asking = asyncio.create_task(stage.post("/v1/decisions", body_of(50)))
        await stage.until(lambda: sum(isinstance(m, Prefill) for m in prefill.received) == WINDOW)
        assert _num_open(stage) == 50, "admission counts all of them"
        placements = [m for m in prefill.received if isinstance(m, Prefill)]
        prefill.received.clear()
        for place, message in reversed(list(enumerate(placements))):
            prefill.say(readings(message.transfer_id, math.log(0.9), math.log((place + 1) / 1000)))
        for place in range(WINDOW, 50):
            await read_next(prefill, math.log(0.9), math.log((place + 1) / 1000))
        status, answer, _ = await asking
        assert status == 200 and [a["name"] for a in answer["answers"]] == [f"q{i}" for i in range(50)]
        found = [a["probabilities"][1]["probability"] for a in answer["answers"]]
        assert found == pytest.approx([(i + 1) / (901 + i) for i in range(50)])
        assert _num_open(stage) == 0 and not decode.heard(Prefill)
        async with stage.http.get(f"{stage.url}/metrics") as response:
            text = await response.text()
        assert 'baton_readout_seconds_count{kind="labels"} 50.0' in text
        assert 'baton_inter_token_latency_seconds_count{model_name="m"} 0' in text


async def test_a_client_that_leaves_takes_all_its_questions_with_it(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer) as stage:
        prefill, _ = await stage.pair(max_model_len=4000, max_num_seqs=256, num_blocks=1000)
        asking = asyncio.create_task(stage.post("/v1/decisions", body_of(40)))
        await stage.until(lambda: sum(isinstance(m, Prefill) for m in prefill.received) == WINDOW)
        asking.cancel()
        await stage.until(lambda: sum(isinstance(m, Abort) for m in prefill.received) == WINDOW)
        assert _num_open(stage) == 0 and stage.router.switchboard.idle.is_set()


async def test_questions_of_a_lost_worker_are_asked_again(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer) as stage:
        prefill, _ = await stage.pair(max_model_len=4000, num_blocks=1000)
        other = await stage.worker("p1", max_model_len=4000, num_blocks=1000)
        asking = asyncio.create_task(stage.post("/v1/decisions", body_of(2)))
        lost = await prefill.hear(Prefill)
        await prefill.close()
        seen = [await read_next(other, -1.0, -1.0) for _ in range(2)]
        assert lost.request_id in {m.request_id for m in seen}
        status, answer, _ = await asking
        assert status == 200 and answer["answers"][0]["score"] == pytest.approx(0.5)


async def test_one_question_that_fails_fails_the_request_and_cancels_the_others(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, max_placements=1) as stage:
        prefill, _ = await stage.pair(max_model_len=4000, max_num_seqs=256, num_blocks=1000)
        asking = asyncio.create_task(stage.post("/v1/decisions", body_of(3)))
        await read_next(prefill, -1.0)  # two labels were asked for
        status, answer, _ = await asking
        assert status == 500 and "not asked for" in answer["error"]["message"]
        await stage.until(lambda: sum(isinstance(m, Abort) for m in prefill.received) == 2)
        assert _num_open(stage) == 0


async def test_more_questions_than_the_limit_are_shed_before_any_work(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, max_num_requests=10) as stage:
        prefill, _ = await stage.pair(max_model_len=4000)
        status, answer, headers = await stage.post("/v1/decisions", body_of(11))
        assert status == 429 and int(headers["Retry-After"]) >= 1, answer
        assert not prefill.heard(Prefill) and _num_open(stage) == 0


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/decisions", {"questions": []}, "questions"),
    ("/v1/decisions", {"questions": [_question("q")] * 401}, "questions"),
    ("/v1/decisions", {"questions": [{"type": "rank", "instructions": "x"}]}, "questions"),
    ("/v1/decisions", {"questions": [{"type": "predicate"}]}, "questions"),
    ("/v1/decisions", {"questions": [{**_question("q"), "levels": [{"label": "one"}]}]}, "questions"),
    ("/v1/decisions", {"questions": [{**_question("q"), "instructions": " "}]}, "questions[0]"),
    ("/v1/decisions", {"questions": [{"type": "choice", "instructions": "x", "choices": [{"value": "a"}] * 2}]},
     "questions[0]"),
    ("/v1/decisions", {"input": ""}, "input"),
    ("/v1/decisions", {"input": []}, "input"),
    ("/v1/decisions", {"input": [{"role": "robot", "content": "x"}]}, "input"),
    ("/v1/decisions", {"input": [{"role": "user"}]}, "input"),
    ("/v1/decisions", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
    ("/v1/decisions", {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
    ("/v1/decisions", {"input": "x" * 30_000}, "input"),
    ("/v1/decisions", {"model": "other"}, "model"),
    ("/v1/systemone", {"state": "x", "questions": {}}, "questions"),
    ("/v1/systemone", {"state": "x", "questions": {"a": {"type": "noul"}}}, "questions"),
    ("/v1/systemone", {"state": "x", "questions": {"a": {"type": "choice", "criteria": {"one": None}}}}, "questions"),
    ("/v1/systemone", {"state": 5, "questions": {"a": {"type": "score", "criteria": ["a", "b"]}}}, "state"),
    ("/v1/systemone", {"state": "", "questions": {"a": {"type": "score", "criteria": ["a", "b"]}}}, "state"),
    ("/v1/score", {"text_1": "q"}, "documents"),
    ("/v1/score", {"queries": ["a", "b"], "documents": ["x", "y", "z"]}, "queries"),
    ("/v1/score", {"queries": "a", "text_1": "b", "documents": ["x"]}, "queries"),
    ("/v1/rerank", {"query": "q", "documents": []}, "documents"),
    ("/v1/rerank", {"query": "q", "documents": ["x"], "top_n": -1}, "top_n"),
    ("/v1/rerank", {"documents": ["x"]}, "query"),
]  # fmt: skip


async def test_what_is_wrong_is_named_with_its_field(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer) as stage:
        prefill, _ = await stage.pair(max_model_len=4000)
        for path, fields, param in BAD:
            base = body_of(1) if path == "/v1/decisions" else {"model": "m"}
            status, answer, _ = await stage.post(path, {**base, **fields})
            error = answer["error"]
            assert status in (400, 404) and error["param"] == param, (fields, answer)
            assert param.partition("[")[0] in error["message"] or param == "model", answer
        assert not prefill.heard(Prefill) and _num_open(stage) == 0


async def test_a_conversation_with_calls_becomes_the_state(tokenizer: Tokenizer) -> None:
    items = [
        {"role": "developer", "content": "be fair"},
        {"type": "message", "role": "user", "content": [{"type": "input_json", "data": {"a": [1]}}]},
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "seen"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "ok"}]},
    ]
    async with staged(tokenizer) as stage:
        prefill, _ = await stage.pair(max_model_len=4000, num_blocks=1000)
        asking = asyncio.create_task(stage.post("/v1/decisions", {**body_of(1), "input": items}))
        message = await read_next(prefill, -1.0, -2.0)
        assert (await asking)[0] == 200
        text = tokenizer.decode(message.prompt, skip_special=False)
        said = (
            'developer: be fair\n\nuser: {"a":[1]}\n\ncall of look: {}\n\noutput of look: seen\n\nassistant: ok\n\nq0'
        )
        assert said in text


# --- prompts told about ---


def _rows(num_rows: int, num_top: int) -> PromptLogprobs:
    values = np.full((num_rows, 1 + num_top), -0.5, "<f4")
    integers = np.tile(np.array([2, *[byte_id("x")] * num_top], "<i4"), (num_rows, 1))
    return PromptLogprobs.of(num_top, values.tobytes(), integers.tobytes())


async def test_an_echo_with_logprobs_covers_prompt_and_completion(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer) as stage:
        prefill, _ = await stage.pair(max_model_len=4000)
        body = {"model": "m", "prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 1, "prompt_logprobs": 0}
        asking = asyncio.create_task(stage.post("/v1/completions", body))
        message = await prefill.hear(Prefill)
        assert message.readout == ReadPrompt(num_top=1)
        prefill.say(readings(message.transfer_id, prompt=_rows(2, 1)))
        status, answer, _ = await asking
        assert status == 200, answer
        (only,) = answer["choices"]
        assert only["text"] == "abc" and only["finish_reason"] == "length"
        assert only["logprobs"] == {
            "tokens": ["a", "b", "c"],
            "token_logprobs": [None, -0.5, -0.5],
            "top_logprobs": [None, {"x": -0.5, "b": -0.5}, {"x": -0.5, "c": -0.5}],
            "text_offset": [0, 1, 2],
        }
        shown = {"logprob": -0.5, "rank": 2, "decoded_token": "b"}
        assert only["prompt_logprobs"][:2] == [None, {str(byte_id("b")): shown}]
        assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["prompt_tokens"] == 3
