"""Requests that are odd and must be answered all the same, each with what its answer has to be.

    ODD ─► every one is sent once ─► its answer is held against what must be so ─► what is wrong, in words

What was refused wrongly, or answered wrongly, once: special tokens as text, names that are keywords, numbers at their
limits, calls that a stop cut, offsets of characters of several tokens, ASCII classes, and HTTP of before 1.1.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.clients.bodies import CHAT, COMPLETIONS, MODEL

ANSWER_BUDGET_S = 60.0
_ASK = [{"role": "user", "content": "Say something short."}]
_PROMPT = "one 🯸🯸 two é three"


@dataclass(frozen=True, slots=True)
class Odd:
    """One request.

    Attributes:
        fields: of its body, beside the model.
        is_right: whether its answer, a whole one with status 200, is what it must be.
    """

    name: str
    path: str
    fields: dict[str, Any]
    is_right: Callable[[dict[str, Any]], bool]


def _chat(name: str, is_right: Callable[[dict[str, Any]], bool], **fields: Any) -> Odd:
    return Odd(name, CHAT, {"messages": _ASK, "max_tokens": 120, "temperature": 0, **fields}, is_right)


def _says(name: str, text: str, **structured: Any) -> Odd:
    return _chat(name, lambda answer: _content(answer) == text, structured_outputs=structured)


def _obeys(name: str, is_right: Callable[[Any], bool], schema: dict[str, Any]) -> Odd:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return _chat(name, lambda answer: is_right(json.loads(_content(answer))), response_format=asked)


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _forced(parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "tools": [{"type": "function", "function": {"name": "look", "parameters": parameters}}],
        "tool_choice": "required",
    }


def _content(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def _arguments(answer: dict[str, Any]) -> Any:
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    return json.loads(call["function"]["arguments"])


def _is_cut(answer: dict[str, Any]) -> bool:
    choice = answer["choices"][0]
    return (choice["finish_reason"], choice["stop_reason"]) == ("stop", '"arguments"')


def _has_offsets(answer: dict[str, Any]) -> bool:
    text, told = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
    pairs = list(zip(told["tokens"], told["text_offset"], strict=True))
    whole = [(token, at) for token, at in pairs if not token.startswith("bytes:")]
    is_sorted = all(one[1] <= other[1] for one, other in zip(pairs, pairs[1:], strict=False))
    return bool(is_sorted and text.startswith(_PROMPT) and all(text[at:].startswith(token) for token, at in whole))


_KEYWORDS = {
    **_object(default={"$ref": "#/$defs/enum"}, const={"$ref": "#/$defs/const"}),
    "$defs": {"enum": {"enum": ["a"]}, "const": {"const": 7}},
}
_BROKEN_CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": "{not json"}}],
}

ODD: tuple[Odd, ...] = (
    _says("special token as a choice", "<|im_start|>", choice=["<|im_start|>"]),
    _says("special token in a pattern", "<|im_end|>x", regex=r"<\|im_end\|>x"),
    _obeys("special tokens in a schema", lambda v: v == {"<|im_end|>": "<|im_start|>"},
           _object(**{"<|im_end|>": {"const": "<|im_start|>"}})),
    _chat("keywords as names in a tool", lambda a: _arguments(a) == {"default": "a", "const": 7}, **_forced(_KEYWORDS)),
    _obeys("data under const that looks like a schema", lambda v: v == {"a": {"$ref": "#/x", "type": 1}},
           _object(a={"const": {"$ref": "#/x", "type": 1}})),
    _obeys("the largest exact integer", lambda v: v == {"n": 1 << 53}, _object(n={"const": 1 << 53})),
    _obeys("nothing but one", lambda v: v == {"n": 1},
           _object(n={"type": "integer", "exclusiveMinimum": 0, "maximum": 1})),
    _obeys("a multiple within bounds", lambda v: v == {"n": 10},
           _object(n={"type": "integer", "multipleOf": 5, "minimum": 6, "maximum": 14})),
    _chat("a call that a stop cuts", _is_cut, stop='"arguments"', **_forced(_object(a={"type": "integer"}))),
    Odd("offsets of characters of several tokens", COMPLETIONS,
        {"prompt": _PROMPT, "echo": True, "logprobs": 1, "max_tokens": 2}, _has_offsets),
    _chat("digits are ASCII", lambda a: _content(a).isascii() and _content(a).isdigit(),
          structured_outputs={"regex": r"\d{3,5}"}, temperature=1.5, seed=4),
    _chat("letters are ASCII", lambda a: _content(a).isascii(),
          structured_outputs={"regex": r"\w{4}\s\w{2}"}, temperature=1.5, seed=4),
    _obeys("a format that nobody knows", lambda v: isinstance(v["a"], str),
           _object(a={"type": "string", "format": "phone", "maxLength": 5})),
    _obeys("uniqueItems that says nothing", lambda v: v == {"a": [1, 1]},
           _object(a={"type": "array", "uniqueItems": False, "items": {"const": 1}, "minItems": 2, "maxItems": 2})),
    _chat("json_object with a schema", lambda a: json.loads(_content(a)) == {"a": 3},
          response_format={"type": "json_object", "schema": _object(a={"const": 3})}),
    _chat("arguments of the past that are no JSON", lambda a: a["choices"][0]["finish_reason"] in ("stop", "length"),
          messages=[*_ASK, _BROKEN_CALL, {"role": "tool", "tool_call_id": "c", "content": "no"}, *_ASK], max_tokens=3),
)  # fmt: skip


async def wrong_answers(http: aiohttp.ClientSession, url: str) -> list[str]:
    """Ask everything once; return what is wrong with the answers, in words."""
    async with http.get(f"{url}/v1/models") as response:
        num_tokens = (await response.json())["data"][0]["max_model_len"]
    whole = {"prompt": [100] * num_tokens, "echo": True, "max_tokens": 0}
    longest = Odd("an echo as long as the context", COMPLETIONS, whole, lambda a: a["usage"]["completion_tokens"] == 0)
    found = [wrong for odd in (*ODD, longest) if (wrong := await _asked(http, url, odd))]
    return [*found, *await _of_http_1_0(url)]


async def _asked(http: aiohttp.ClientSession, url: str, odd: Odd) -> str:
    async with http.post(f"{url}{odd.path}", json={"model": MODEL, **odd.fields}) as response:
        text = await response.text()
    try:
        is_right = response.status == 200 and odd.is_right(json.loads(text))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        return f"{odd.name}: {error!r} in {text[:500]!r}"
    return "" if is_right else f"{odd.name}: {response.status} {text[:500]!r}"


async def _of_http_1_0(url: str) -> list[str]:
    """Read a stream by HTTP/1.0 with keep-alive: it ends with its connection, and says what its characters are."""
    body = json.dumps({"model": MODEL, "prompt": "é", "max_tokens": 3, "stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.0\r\nConnection: keep-alive\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(ANSWER_BUDGET_S):
            answer = await reader.read()
    except TimeoutError:
        return ["a stream by HTTP/1.0 has no end"]
    finally:
        writer.close()
    is_right = answer.endswith(b"data: [DONE]\n\n") and b"text/event-stream; charset=utf-8" in answer
    return [] if is_right else [f"a stream by HTTP/1.0: {answer[:500]!r}"]
