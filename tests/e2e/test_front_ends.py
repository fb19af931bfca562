"""HTTP, gRPC and the in-process engine: identical requests, identical tokens; and what a gRPC client's end leaves."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from baton import LLM, SamplingParams
from baton.batch_cli import main as run_batch
from baton.grpc_client import AsyncClient, CallRefused, Client
from tests.e2e.server import Server, serving, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.model]
PROMPT = "The three largest cities of France are"
CHAT = [{"role": "user", "content": "Name three colours."}]
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 24, "logprobs": 3},
    {"seed": 11, "max_tokens": 24, "temperature": 0.9, "top_p": 0.95},
    {"seed": 12, "max_tokens": 16, "top_k": 20, "n": 3, "presence_penalty": 0.5, "logprobs": 0},
    {"seed": 13, "max_tokens": 40, "min_p": 0.02, "repetition_penalty": 1.2, "stop": ["is", "."], "min_tokens": 4},
    {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logit_bias": {30: -50.0, 28: 2.5}},
]


@dataclass(frozen=True)
class Sides:
    """A server, and where its gRPC is."""

    server: Server
    address: str

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Ask over HTTP."""
        request = urllib.request.Request(self.server.url + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    def none_leased(self) -> None:
        """Wait until no worker holds anything for anybody."""
        wait_until(
            lambda: not any(worker["blocks"]["leased"] for worker in self.server.workers()), 15, "no block is leased"
        )


@pytest.fixture(scope="module")
def sides(gguf: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("grpc")
    # A prompt of these tests may well be queued for longer than a grant waits for one that nobody has heard of.
    options = ("--grpc-port", str(port), "--grant-wait-s", "0.5")
    with serving("smollm2", folder, cache_dir, *options) as server:
        yield Sides(server, f"127.0.0.1:{port}")


@pytest.fixture(scope="module")
def llm(gguf: Path, cache_dir: Path) -> Iterator[LLM]:
    with LLM("smollm2", cache_dir=str(cache_dir), num_kv_blocks=256, threads=1) as llm:
        yield llm


def _over_http(sides: Sides, sampling: dict[str, Any], is_chat: bool) -> list[tuple[str, list[int], str]]:
    body = {"model": "smollm2", "return_token_ids": True, **sampling}
    if is_chat and "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    body |= {"messages": CHAT} if is_chat else {"prompt": PROMPT}
    answer = sides.post("/v1/chat/completions" if is_chat else "/v1/completions", body)
    texts = [choice["message"]["content"] if is_chat else choice["text"] for choice in answer["choices"]]
    rest = [(choice["token_ids"], choice["finish_reason"]) for choice in answer["choices"]]
    return [(text, *found) for text, found in zip(texts, rest, strict=True)]


def _over_grpc(sides: Sides, sampling: dict[str, Any], is_chat: bool) -> list[tuple[str, list[int], str]]:
    found: list[tuple[str, list[int], str]] = [("", [], "")] * sampling.get("n", 1)
    asked: dict[str, Any] = {"messages": CHAT} if is_chat else {"prompt": PROMPT}
    with Client(sides.address) as client:
        for message in client.generate(**asked, return_token_ids=True, **sampling):
            for choice in message.choices:
                text, ids, _ = found[choice.index]
                found[choice.index] = (text + choice.text, ids + list(choice.token_ids), choice.finish_reason)
    return found


def _in_process(llm: LLM, sampling: dict[str, Any], is_chat: bool) -> list[tuple[str, list[int], str | None]]:
    params = SamplingParams(**sampling)
    (output,) = llm.chat(CHAT, params) if is_chat else llm.generate(PROMPT, params)
    return [(choice.text, choice.token_ids, choice.finish_reason) for choice in output.outputs]


@pytest.mark.parametrize("is_chat", [False, True], ids=["prompt", "chat"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
def test_all_three_give_the_same_tokens(sides: Sides, llm: LLM, sampling: dict[str, Any], is_chat: bool) -> None:
    over_http = _over_http(sides, sampling, is_chat)
    assert _over_grpc(sides, sampling, is_chat) == over_http
    assert _in_process(llm, sampling, is_chat) == over_http


def test_logprobs_are_those_of_http(sides: Sides, llm: LLM) -> None:
    asked = {"temperature": 0, "max_tokens": 6}
    body = {"model": "smollm2", "prompt": PROMPT, "logprobs": 2, **asked}
    (choice,) = sides.post("/v1/completions", body)["choices"]
    with Client(sides.address) as client:
        messages = list(client.generate(prompt=PROMPT, logprobs=2, **asked))
    logged = [one for message in messages for choice in message.choices for one in choice.logprobs]
    assert [one.logprob for one in logged] == choice["logprobs"]["token_logprobs"]
    assert [{top.token: top.logprob for top in one.top_logprobs} for one in logged] == choice["logprobs"][
        "top_logprobs"
    ]
    ours = llm.generate(PROMPT, SamplingParams(logprobs=2, temperature=0, max_tokens=6))[0].outputs[0]
    assert ours.logprobs is not None
    assert [r[t].logprob for r, t in zip(ours.logprobs, ours.token_ids, strict=True)] == [one.logprob for one in logged]


def test_leaving_a_deadline_and_abort_leave_nothing_leased(sides: Sides) -> None:
    long: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True}
    with Client(sides.address) as client:
        wait_until(client.is_ready, 10, "health")
        for _ in client.generate(**long):
            break
        sides.none_leased()
        with pytest.raises(CallRefused) as caught:
            list(client.generate(timeout_s=1.0, **long))
        assert caught.value.code.name == "DEADLINE_EXCEEDED"
        sides.none_leased()
        stream = client.generate(request_id="mine", **long)
        next(stream)
        assert client.abort("mine")
        with pytest.raises(CallRefused) as caught:
            list(stream)
        assert caught.value.code.name == "ABORTED"
        sides.none_leased()
        with pytest.raises(CallRefused) as caught:
            list(client.generate(prompt=PROMPT, top_p=2.0))
        assert caught.value.field == "top_p"


async def test_a_slow_reader_holds_up_nobody(sides: Sides) -> None:
    async with AsyncClient(sides.address) as client:
        slow = client.generate(prompts=[PROMPT] * 4, n=8, max_tokens=1000, ignore_eos=True, logprobs=20)
        await anext(slow)
        texts: list[str] = []
        async with asyncio.timeout(60):
            async for message in client.generate(messages=CHAT, temperature=0, max_tokens=8):
                texts += [choice.text for choice in message.choices]
        assert texts
        await slow.aclose()
    await asyncio.to_thread(sides.none_leased)


def test_a_batch_against_the_server_has_its_answers(sides: Sides, tmp_path: Path) -> None:
    body = {"model": "smollm2", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body} for i in range(8)]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{}\n")
    assert run_batch([str(source), str(out), "--url", sides.server.url, "--concurrency", "3"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    (choice,) = sides.post("/v1/completions", body)["choices"]
    texts = [one["response"]["body"]["choices"][0]["text"] for one in found if one["response"]]
    assert texts == [choice["text"]] * 8 and len(found) == 9


def test_what_a_prompt_is_read_for_is_the_same(sides: Sides, llm: LLM) -> None:
    body = {"model": "smollm2", "prompt": PROMPT, "prompt_logprobs": 2, "max_tokens": 1, "temperature": 0}
    (told,) = [choice["prompt_logprobs"] for choice in sides.post("/v1/completions", body)["choices"]]
    with Client(sides.address) as client:
        (choice, *_), *_ = (m.choices for m in client.generate(prompt=PROMPT, prompt_logprobs=2, max_tokens=1))
        over_grpc = [one.logprob if one.HasField("logprob") else None for one in choice.prompt_logprobs]
        ids = [one.token_id for one in choice.prompt_logprobs]
        echoed, _ = list(client.generate(prompt=PROMPT, echo=True, logprobs=0, max_tokens=0))
    assert over_grpc == [None] + [one[str(i)]["logprob"] for one, i in zip(told[1:], ids[1:], strict=True)]
    ours = llm.generate(PROMPT, SamplingParams(prompt_logprobs=2, max_tokens=1))[0].prompt_logprobs
    assert ours is not None and [one and one[i].logprob for one, i in zip(ours, ids, strict=True)] == over_grpc
    assert echoed.choices[0].text == PROMPT and len(echoed.choices[0].prompt_logprobs) == len(ids)


QUESTIONS: list[dict[str, Any]] = [
    {"type": "predicate", "instructions": "The text names a country.", "name": "country"},
    {
        "type": "choice",
        "instructions": [{"type": "input_text", "text": "Which is it about?"}],
        "choices": [{"value": "cities"}, {"value": True, "description": "food"}, {"value": "sports"}],
    },
    {"type": "score", "instructions": "How formal?", "levels": [{"label": "low"}, {"label": "high"}]},
]


def test_decisions_are_those_of_http(sides: Sides) -> None:
    told = sides.post("/v1/decisions", {"model": "smollm2", "input": PROMPT, "questions": QUESTIONS})
    questions = [
        {"name": "country", "instructions": {"text": "The text names a country."}, "predicate": {}},
        {
            "instructions": {"parts": [{"type": "input_text", "text": "Which is it about?"}]},
            "choice": {
                "choices": [
                    {"value": {"string_value": "cities"}},
                    {"value": {"bool_value": True}, "description": "food"},
                    {"value": {"string_value": "sports"}},
                ]
            },
        },
        {"instructions": {"text": "How formal?"}, "score": {"levels": [{"label": "low"}, {"label": "high"}]}},
    ]
    with Client(sides.address) as client:
        answer = client.decide(input=PROMPT, questions=questions)
        with pytest.raises(CallRefused) as caught:
            client.decide(input=PROMPT, questions=[{"instructions": {"text": "x"}}])
    assert caught.value.field == "questions"
    predicate, choice, score = answer.answers
    one, other, third = told["answers"]
    assert (predicate.name, predicate.predicate.probability) == ("country", one["probability"])
    assert predicate.option_mass == one["option_mass"] and not choice.HasField("name")
    found = choice.choice.probabilities
    values = [getattr(p.value, p.value.WhichOneof("value")) for p in found]
    assert [{"value": v, "probability": p.probability} for v, p in zip(values, found, strict=True)] == other[
        "probabilities"
    ]
    assert (score.score.score, score.score.confidence) == (third["score"], third["confidence"])
    assert [p.label for p in score.score.probabilities] == ["low", "high"]
    assert answer.usage.input_tokens == told["usage"]["input_tokens"] and answer.model == "smollm2"


def test_prompts_may_be_queued_for_longer_than_a_grant_waits_for_a_stranger(sides: Sides) -> None:
    def ask(number: int) -> int:
        prompt = [1000 + (97 * number + i) % 20_000 for i in range(500)]
        answer = sides.post("/v1/completions", {"model": "smollm2", "prompt": prompt, "max_tokens": 2})
        return int(answer["usage"]["completion_tokens"])

    failed = sides.server.total("baton_kv_transfers_failed_total")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [2] * 8
    assert sides.server.total("baton_kv_transfers_failed_total") == failed, "none was given up and tried again"


def test_vectors_are_those_of_http(sides: Sides, llm: LLM) -> None:
    texts = [PROMPT, "A bicycle."]
    body = {"model": "smollm2", "input": texts, "encoding_format": "float"}
    told = [one["embedding"] for one in sides.post("/v1/embeddings", body)["data"]]
    with Client(sides.address) as client:
        answer = client.embed(input=texts)
        with pytest.raises(CallRefused) as caught:
            client.embed(input=[])
    assert caught.value.field == "input"
    assert [list(one.embedding) for one in answer.data] == told
    assert llm.embed(texts) == told, "and in this process"


def test_structured_output_and_forced_calls_are_the_same(sides: Sides, llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
    body = {"model": "smollm2", "prompt": PROMPT, "structured_outputs": {"json": schema}, **asked}
    (choice,) = sides.post("/v1/completions", body)["choices"]
    tool = {"name": "look_up", "parameters": json.dumps(schema)}
    with Client(sides.address) as client:
        structured = {"json": json.dumps(schema)}
        messages = list(client.generate(prompt=PROMPT, structured_outputs=structured, **asked))
        assert "".join(c.text for m in messages for c in m.choices) == choice["text"]
        forced = list(client.generate(messages=CHAT, tools=[tool], tool_choice={"mode": "required"}, **asked))
    deltas = [delta for m in forced for c in m.choices for delta in c.tool_calls]
    called = {
        "model": "smollm2",
        "messages": CHAT,
        "tools": [{"type": "function", "function": {"name": "look_up", "parameters": schema}}],
        "tool_choice": "required",
        **asked,
    }
    (told,) = sides.post("/v1/chat/completions", called)["choices"]
    (call,) = [call["function"] for call in told["message"]["tool_calls"]][:1]
    assert deltas[0].name == call["name"] and deltas[0].HasField("id")
    assert "".join(delta.arguments for delta in deltas if delta.index == 0) == call["arguments"]
    ends = [c.finish_reason for m in forced for c in m.choices if c.HasField("finish_reason")]
    assert ends == [told["finish_reason"]]
    (ours,) = llm.generate(PROMPT, SamplingParams(structured_outputs={"json": schema}, **asked))
    assert ours.outputs[0].text == choice["text"]
