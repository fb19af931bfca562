"""Bodies that clients send, good and bad: what becomes of them before any worker hears of it."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from protocol.errors import ContextTooLong, InvalidRequest, RequestRejected, UnknownModel
from protocol.request import SamplingParams
from router.api import ChatRequest, CompletionRequest, parse
from router.intake import Intake, Job
from router.tokenizer import Tokenizer
from tests.router.tiny import EOS_ID, byte_ids

MAX_MODEL_LEN = 64
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def intake(tokenizer: Tokenizer) -> Intake:
    """Intake for a context of 64 tokens."""
    return Intake(tokenizer, ("m", "alias"))


def chat(intake: Intake, **fields: Any) -> Job:
    """Admit a chat request."""
    return _admit(intake, {"model": "m", "messages": HI, **fields}, ChatRequest)


def complete(intake: Intake, **fields: Any) -> Job:
    """Admit a completion request."""
    return _admit(intake, {"model": "m", "prompt": "abc", **fields}, CompletionRequest)


def _admit(intake: Intake, body: Any, kind: type[ChatRequest] | type[CompletionRequest]) -> Job:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    parsed: ChatRequest | CompletionRequest = parse(data, kind)
    return intake.job(parsed, MAX_MODEL_LEN)


def sampling(job: Job) -> SamplingParams:
    """Give the sampling parameters of the first choice."""
    return job.choices[0].sampling


# --- what is taken ---


def test_defaults_are_those_of_vllm(intake: Intake) -> None:
    params = sampling(chat(intake))
    num_prompt_tokens = len(chat(intake).prompts[0].token_ids)
    assert params.max_tokens == MAX_MODEL_LEN - num_prompt_tokens
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert params.eos_token_ids == (EOS_ID,) and params.num_logprobs is None
    assert sampling(complete(intake)).max_tokens == 16


def test_a_short_room_cuts_the_default_of_completions(intake: Intake) -> None:
    assert sampling(complete(intake, prompt="x" * 60)).max_tokens == 4


def test_null_means_default_everywhere(intake: Intake) -> None:
    names = [n for n in ChatRequest.__struct_fields__ if n not in ("model", "messages", "seed")]
    job = chat(intake, **dict.fromkeys(names), seed=1)
    assert job == chat(intake, seed=1)


def test_every_sampling_field_arrives(intake: Intake) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": -0.4, "max_tokens": 9, "min_tokens": 2, "seed": 5,
        "ignore_eos": True,
    }  # fmt: skip
    params = sampling(complete(intake, **fields, stop_token_ids=[7], logit_bias={"9": -100, "8": 5.5}, logprobs=3))
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.stop_token_ids == (7,) and params.logit_bias == ((9, -100.0), (8, 5.5)) and params.num_logprobs == 3


@pytest.mark.parametrize(("given", "expected"), [(-1, 0), (0, 0), (5, 5)])
def test_top_k_off_is_minus_one_or_zero(intake: Intake, given: int, expected: int) -> None:
    assert sampling(chat(intake, top_k=given)).top_k == expected


@pytest.mark.parametrize(
    ("given", "expected"), [(0, 0), (7, 7), (2**63 - 1, 2**63 - 1), (-1, 2**63 - 1), (-(2**63), 0)]
)
def test_any_int64_is_a_seed(intake: Intake, given: int, expected: int) -> None:
    assert sampling(chat(intake, seed=given)).seed == expected


def test_choices_have_seeds_of_their_own_and_prompts_the_same(intake: Intake) -> None:
    job = complete(intake, prompt=["ab", "cd"], n=2, seed=2**63 - 1)
    assert [c.index for c in job.choices] == [0, 1, 2, 3]
    assert [c.sampling.seed for c in job.choices] == [2**63 - 1, 0, 2**63 - 1, 0]
    assert [list(c.prompt.token_ids) for c in job.choices] == [byte_ids(t) for t in ("ab", "ab", "cd", "cd")]


def test_unseeded_requests_draw_seeds(intake: Intake) -> None:
    seeds = {sampling(chat(intake)).seed for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= seed < 2**63 for seed in seeds)


def test_tiny_temperatures_are_greedy(intake: Intake) -> None:
    assert sampling(chat(intake, temperature=1e-9)).is_greedy


def test_max_completion_tokens_wins(intake: Intake) -> None:
    assert sampling(chat(intake, max_tokens=5, max_completion_tokens=6)).max_tokens == 6


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [byte_ids("ab")]),
        (["a", "b"], [byte_ids("a"), byte_ids("b")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_the_four_shapes_of_a_prompt(intake: Intake, prompt: Any, expected: list[list[int]]) -> None:
    assert [list(p.token_ids) for p in complete(intake, prompt=prompt).prompts] == expected


def test_content_parts_are_joined_and_developer_is_system(intake: Intake, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts},
                {"role": "assistant", "content": None}]  # fmt: skip
    job = chat(intake, messages=messages, add_generation_prompt=False)
    text = tokenizer.decode(job.prompts[0].token_ids, skip_special=False)
    assert text == "<|start|>system: d<|stop|><|start|>user: a\nb<|stop|><|start|>assistant: <|stop|>"


def test_stops_and_stream_options_arrive(intake: Intake) -> None:
    job = chat(intake, stop="x", stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert job.text.stops == ("x",) and job.is_stream and job.has_usage and job.has_running_usage
    assert chat(intake, stop=["a", "b"]).text.stops == ("a", "b")
    assert not chat(intake, stream=True).has_usage


@pytest.mark.parametrize("options", [{}, {"include_usage": True}])
def test_stream_options_are_for_streams(intake: Intake, options: dict[str, Any]) -> None:
    for asked in (chat, complete):
        for fields in ({}, {"stream": False}, {"stream": None}):
            with pytest.raises(InvalidRequest) as caught:
                asked(intake, stream_options=options, **fields)
            assert str(caught.value) == "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            assert caught.value.param == "stream_options"
        assert asked(intake, stream_options=None)


def test_a_prompt_that_nothing_follows_may_fill_the_context(intake: Intake) -> None:
    for fields in ({"echo": True}, {"echo": True, "logprobs": 1}, {"prompt_logprobs": 0}):
        job = complete(intake, prompt=[9] * 64, max_tokens=0, **fields)
        assert job.is_prompt_only and len(job.prompts[0].token_ids) == 64
    job = complete(intake, prompt=[9] * 70, max_tokens=0, echo=True, truncate_prompt_tokens=-1)
    assert len(job.prompts[0].token_ids) == 64
    for num_tokens, more in ((64, {"max_tokens": 1}), (64, {}), (65, {"max_tokens": 0})):
        with pytest.raises(ContextTooLong):
            complete(intake, prompt=[9] * num_tokens, echo=True, **more)


def test_echo_keeps_the_text_of_the_prompt(intake: Intake) -> None:
    assert complete(intake, prompt=["the", "x"], echo=True).prompts[0].echo == "the"
    assert complete(intake, prompt=byte_ids("yz"), echo=True).prompts[0].echo == "yz"
    assert complete(intake).prompts[0].echo == ""


def test_aliases_are_served(intake: Intake) -> None:
    assert chat(intake, model="alias").model == "alias"


def test_unknown_fields_are_logged_once_and_ignored(intake: Intake, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        chat(intake, froobnicate=1, blah={"x": []}, store=True, metadata={})
    assert [r.getMessage() for r in caplog.records] == ["ignored unknown fields: 'froobnicate', 'blah'"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None}, {"tools": []}, {"tool_choice": "none"}, {"response_format": {"type": "text"}},
        {"modalities": ["text"]}, {"best_of": None}, {"n": 2, "best_of": 2}, {"priority": 0}, {"echo": False},
        {"parallel_tool_calls": True}, {"service_tier": "auto"}, {"truncate_prompt_tokens": None}, {"user": "u"},
        {"top_logprobs": 0}, {"logprobs": True, "top_logprobs": 20}, {"stop": []}, {"logit_bias": {}},
    ],
)  # fmt: skip
def test_fields_that_ask_for_nothing_special_are_accepted(intake: Intake, fields: dict[str, Any]) -> None:
    chat(intake, **fields)


# --- what is refused ---

BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, "messages"),
    ({"model": 5}, "model"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 101}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": []}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10.0}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_tokens": 65}, "max_tokens"),
    ({"max_completion_tokens": 65}, "max_completion_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"seed": -(10**30)}, "seed"),
    ({"n": True}, "n"),
    ({"top_k": 2**63}, "top_k"),
    ({"stop": ["x"] * 1_000_000}, "stop"),
    ({"messages": [{"role": "user", "content": "x" * 10_000_000}]}, "messages"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": 7}, "stop"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"logit_bias": {"foo": 0}}, "logit_bias"),
    ({"logit_bias": {"-1": 0}}, "logit_bias"),
    ({"logit_bias": {"²": 0}}, "logit_bias"),
    ({"logit_bias": {"100000": 0}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": None}}, "logit_bias"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options"),
    ({"user": "u" * 1025}, "user"),
    ({"cache_salt": "s" * 257}, "cache_salt"),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "v"}}, "audio"),
    ({"best_of": 3}, "best_of"),
    ({"priority": 1 << 31}, "priority"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 65}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"echo": True}, "echo"),
    ({"chat_template": "x"}, "chat_template"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_CHAT)
def test_a_bad_chat_field_is_named(intake: Intake, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        chat(intake, **fields)
    assert caught.value.status == 400
    assert caught.value.param == param and param in str(caught.value)


BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": ["a", [5]]}, "prompt"),
    ({"prompt": [5, [5]]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**31]}, "prompt"),
    ({"prompt": [99999]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": {"x": 1}}, "prompt"),
    ({"prompt": "x" * 64}, "prompt"),
    ({"prompt": [7] * 64}, "prompt"),
    ({"prompt": "x" * 100_000}, "prompt"),
    ({"prompt": "x" * 63, "max_tokens": 2}, "max_tokens"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 65, "n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"suffix": "end"}, "suffix"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD_COMPLETIONS)
def test_a_bad_completion_field_is_named(intake: Intake, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        complete(intake, **fields)
    assert caught.value.status == 400
    assert caught.value.param == param and param in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"{} x",
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "m", "temperature": NaN}', b'{"model": "m", "temperature": 1e999}',
        b'{"model": "m", "temperature": Infinity}',
        b'{"model": "m", "messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"model": "m", "x": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        b'{"model": "m", "tools": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"model": "m", "messages": [{"role": "user", "content": "a\x00b"}]}',
        b'{"model": "m", "model": "m", "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "x", "content": "y"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "logit_bias": {"5": 1, "5": 1}}',
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "x": {"a": 1, "\\u0061": 2}}',
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "x": ' + b"9" * 5000 + b"}",
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 1e400}',
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    ],
)  # fmt: skip
def test_bodies_that_are_no_proper_json_are_refused(intake: Intake, body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        _admit(intake, body, ChatRequest)


def test_what_names_tokens_is_looked_at_once_for_all_choices(intake: Intake) -> None:
    prompts = ["a", "bc"]
    job = complete(intake, prompt=prompts, n=64, logit_bias={"5": 1, "6": -1}, stop_token_ids=[7, 8], max_tokens=2)
    first, last = job.choices[0].sampling, job.choices[-1].sampling
    assert first.logit_bias is last.logit_bias and first.stop_token_ids is last.stop_token_ids
    assert len({choice.sampling.seed for choice in job.choices}) == 128


def test_a_conversation_that_cannot_fit_is_refused_before_it_is_rendered(intake: Intake) -> None:
    messages = [{"role": "user", "content": "x" * 4000}] * 2000
    with pytest.raises(ContextTooLong, match="8000000 characters"):
        chat(intake, messages=messages)


def test_an_unknown_model_is_not_found(intake: Intake) -> None:
    with pytest.raises(UnknownModel) as caught:
        chat(intake, model="gpt-9")
    assert caught.value.status == 404 and caught.value.param == "model"


def test_too_long_says_by_how_much(intake: Intake) -> None:
    with pytest.raises(ContextTooLong, match="maximum context length is 64 tokens.*prompt has 70 tokens"):
        complete(intake, prompt=[9] * 70)
    with pytest.raises(ContextTooLong, match=r"requested 103 tokens \(3 in the prompt, 100 in the completion\)"):
        complete(intake, max_tokens=100)


def test_missing_fields_are_named(intake: Intake) -> None:
    for body, param in (({"model": "m"}, "messages"), ({}, "messages")):
        with pytest.raises(InvalidRequest, match="required") as caught:
            _admit(intake, body, ChatRequest)
        assert caught.value.param == param
