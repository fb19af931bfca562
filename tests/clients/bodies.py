"""Bodies that no client should send: a fixed corpus, and random damage to bodies that are valid.

1. `CORPUS` holds what has hurt servers before: numbers, Unicode, nesting, sizes, repeated names, encodings.
2. `damaged` takes a valid body and does something to it. Some damage leaves it valid; what it generates is one token.
3. `BROKEN_HTTP` is sent as it is, on a connection of its own.
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MODEL = "smollm2"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}}
SAMPLING: dict[str, Any] = {
    "model": MODEL,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 7,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "stop": ["zz"],
    "logit_bias": {"5": 1.0},
    "user": "u",
    "stream": False,
    "min_tokens": 0,
    "ignore_eos": False,
    "priority": 0,
    "n": 1,
}
VALID: dict[str, dict[str, Any]] = {
    CHAT: {
        **SAMPLING,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {
                "role": "assistant",
                "content": "x",
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "y"},
        ],
        "max_completion_tokens": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [TOOL],
        "tool_choice": "auto",
        "stream_options": None,
        "response_format": {"type": "text"},
        "chat_template_kwargs": {"x": 1},
    },
    COMPLETIONS: {**SAMPLING, "prompt": ["one", "two"], "max_tokens": 1, "logprobs": 2, "echo": False},
    RESPONSES: {
        **SAMPLING,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "instructions": "Be brief.",
        "max_output_tokens": 1,
        "text": {"format": {"type": "text"}},
        "metadata": {"a": "b"},
        "tools": [{"type": "function", "name": "look", "parameters": SCHEMA}],
    },
    "/tokenize": {"model": MODEL, "prompt": "hello"},
    "/detokenize": {"model": MODEL, "tokens": [5, 6, 7]},
}

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    -0.0,
    1e308,
    -(2**63),
    2**63,
    2**64,
    10**30,
    "",
    "x",
    "0",
    "\0",
    "💥" * 50,
    "x" * 300,
    [],
    [[]],
    [None],
    [1, "a"],
    ["x"] * 50,
    {},
    {"": ""},
    {"type": "function"},
    {"a": {"b": {"c": []}}},
    [{}] * 20,
)


@dataclass(frozen=True, slots=True)
class Sent:
    """One request.

    Attributes:
        is_surely_bad: whether anything but 4xx is an error; else it may be valid.
    """

    name: str
    path: str
    data: bytes
    headers: dict[str, str] = field(default_factory=dict)
    is_surely_bad: bool = True


def _raw(text: str) -> bytes:
    """Give a chat whose further members are this text."""
    return (
        b'{"model": "smollm2", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, '
        + text.encode()
        + b"}"
    )


def _chat(**fields: Any) -> bytes:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **fields}
    return json.dumps(body).encode()


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def _forced(parameters: dict[str, Any]) -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return {"tools": [tool], "tool_choice": "required"}


def _deep(num_levels: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return b'{"model": "smollm2", "messages": ' + opening * num_levels + closing * num_levels + b"}"


def _nested_tool(num_levels: int) -> bytes:
    parameters: dict[str, Any] = {}
    for _ in range(num_levels):
        parameters = {"not": parameters}
    return _chat(tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}])


_JSON: tuple[tuple[str, bytes], ...] = (
    ("empty", b""),
    ("blank", b" \n"),
    ("null", b"null"),
    ("list", b"[]"),
    ("string", b'"x"'),
    ("number", b"1"),
    ("cut", b'{"model": "smoll'),
    ("trailing", b"{} {}"),
    ("comma", b'{"model": "smollm2",}'),
    ("single", b"{'a': 1}"),
    ("bom", b"\xef\xbb\xbf{}"),
    ("utf16", '{"model": "smollm2"}'.encode("utf-16")),
    ("latin1", b'{"model": "\xe9"}'),
    ("overlong", b'{"model": "\xc0\xaf"}'),
    ("control", b'{"model": "a\x01b"}'),
    ("nul", b"\0" * 100),
    ("surrogate", _raw('"user": "\\ud800"')),
    ("swapped pair", _raw('"user": "\\udc00\\ud800"')),
    ("nan", _raw('"temperature": NaN')),
    ("infinity", _raw('"temperature": Infinity')),
    ("1e400", _raw('"temperature": 1e400')),
    ("-1e400", _raw('"presence_penalty": -1e400')),
    ("many digits", _raw('"seed": ' + "9" * 6000)),
    ("many digits aside", _raw('"xyz": ' + "9" * 6000)),
    ("hex", _raw('"seed": 0x10')),
    ("leading zero", _raw('"seed": 01')),
    ("plus", _raw('"seed": +1')),
    ("twice", _raw('"seed": 1, "seed": 2')),
    ("twice below", _raw('"stream_options": {"a": 1, "a": 2}')),
    ("twice escaped", _raw('"seed": 1, "\\u0073eed": 2')),
    ("true seed", _raw('"seed": true')),
    ("2^63", _raw('"seed": 9223372036854775808')),
    ("2^63 tokens", _raw('"top_k": 9223372036854775808')),
    ("deep list", _deep(100_000)),
    ("deep object", _deep(50_000, b'{"a":', b"}")),
    ("deep open", b"[" * 100_000),
    ("deep tool", _nested_tool(200)),
    ("deeper tool", _nested_tool(450)),
)
_NAMES = ("", "a\nb", "a\x1b[2K", "\u202ea", "a\u2028b", "a\x85b", "caf\xe9", "x" * 129)
_FIELDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("no tokens", {"max_tokens": 0}),
    ("negative tokens", {"max_tokens": -5}),
    ("seed", {"seed": -(10**40)}),
    ("bias", {"logit_bias": {"foo": 0}}),
    ("bias range", {"logit_bias": {"5": 1000}}),
    ("bias ids", {"logit_bias": {"99999999": 1}}),
    ("biases", {"logit_bias": {str(i): 1 for i in range(5000)}}),
    ("stops", {"stop": ["x"] * 100_000}),
    ("long stop", {"stop": "x" * 100_000}),
    ("empty stop", {"stop": ""}),
    ("roles", {"messages": [{"role": "robot", "content": "x"}]}),
    ("no messages", {"messages": []}),
    ("many messages", {"messages": [{"role": "user", "content": "x"}] * 20_000}),
    ("image", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
    ("orphan result", {"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]}),
    ("n", {"n": 10**6}),
    ("best of", {"best_of": 5}),
    ("model", {"model": "m" * 2000}),
    ("no model", {"model": "gpt-9"}),
    ("path model", {"model": "../../etc/passwd"}),
    ("tool name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
    ("tool type", {"tools": [{"type": "web_search"}]}),
    ("tools", {"tools": [TOOL] * 1000}),
    ("choice", {"tools": [TOOL], "tool_choice": "any"}),
    ("choice of none", {"tool_choice": "required"}),
    ("template variable", {"chat_template_kwargs": {"messages": 1}}),
    ("template", {"chat_template": "{{ 1/0 }}"}),
    ("long prompt", {"messages": [{"role": "user", "content": "word " * 200_000}]}),
    ("format", {"response_format": {"type": "yaml"}}),
    ("no schema", {"response_format": {"type": "json_schema"}}),
    (
        "schema",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
    ),
    ("schema beside text", {"response_format": {"type": "text", "schema": {"type": "object"}}}),
    (
        "two schemas",
        {"response_format": {"type": "json_object", "schema": {}, "json_schema": {"name": "x", "schema": {}}}},
    ),
    ("reference", _schema({"$ref": "#/$defs/nowhere"})),
    ("reference abroad", _schema({"$id": "https://example.com/a", "$ref": "b.json"})),
    (
        "reference by chance",
        _schema({"$dynamicRef": "#a", "$defs": {"x": {"$dynamicAnchor": "a"}, "y": {"$dynamicAnchor": "a"}}}),
    ),
    ("reference of a tool", _forced({"properties": {"default": {"$ref": "#/$defs/enum"}}})),
    ("large constant", _schema({"const": 9007199254740993})),
    ("large constant within", _schema({"enum": [{"a": [1234567890123456789]}]})),
    ("large constant of a tool", _forced({"properties": {"a": {"const": 9007199254740993}}, "required": ["a"]})),
    ("no integer", _schema({"type": "integer", "minimum": 9007199254740993, "maximum": 9007199254740993})),
    ("no number", _schema({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0})),
    ("no multiple", _schema({"type": "number", "multipleOf": 0})),
    ("unique", _schema({"type": "array", "uniqueItems": True})),
    ("properties", _schema({"type": "object", "minProperties": 5})),
    ("boundary", {"guided_regex": r"\bword\b"}),
    ("stream options", {"stream_options": {"include_usage": True}}),
    ("no stream options", {"stream_options": {}, "stream": False}),
    (
        "arguments",
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": 5}}],
                }
            ]
        },
    ),
    ("two ways", {"guided_regex": "a", "guided_choice": ["a"]}),
    ("regex", {"guided_regex": "(" * 50}),
    ("logprobs", {"top_logprobs": 5}),
    ("truncate", {"truncate_prompt_tokens": 0}),
    ("guided", {"guided_grammar": "%%%"}),
    *((f"name {name!a}", {"request_id": name}) for name in _NAMES),
    ("continue", {"continue_final_message": True, "add_generation_prompt": True}),
    ("audio", {"audio": {"voice": "x"}}),
)
_OTHERS: tuple[tuple[str, str, Any], ...] = (
    ("previous", RESPONSES, {"model": MODEL, "input": "x", "previous_response_id": "resp_1"}),
    ("background", RESPONSES, {"model": MODEL, "input": "x", "background": True}),
    ("reference", RESPONSES, {"model": MODEL, "input": [{"type": "item_reference", "id": "x"}]}),
    ("no input", RESPONSES, {"model": MODEL}),
    ("unknown tokens", COMPLETIONS, {"model": MODEL, "prompt": [10**6]}),
    ("negative tokens", COMPLETIONS, {"model": MODEL, "prompt": [-1]}),
    ("mixed", COMPLETIONS, {"model": MODEL, "prompt": ["a", 1]}),
    ("prompts", COMPLETIONS, {"model": MODEL, "prompt": ["a"] * 5000}),
    ("no prompt", COMPLETIONS, {"model": MODEL, "prompt": ""}),
    ("long tokens", COMPLETIONS, {"model": MODEL, "prompt": [5] * 300_000}),
    ("suffix", COMPLETIONS, {"model": MODEL, "prompt": "a", "suffix": "b"}),
    ("both", "/tokenize", {"prompt": "a", "messages": []}),
    ("neither", "/tokenize", {}),
    ("tokens", "/detokenize", {"tokens": [10**9]}),
    ("path", "/v1/nonsense", {}),
    ("slashes", "//v1//completions", {}),
    ("dots", "/v1/../../etc/passwd", {}),
    ("percent", "/v1/%00%ff", {}),
)


@functools.cache
def corpus() -> tuple[Sent, ...]:
    """Return the corpus; everything in it is surely bad."""
    found = [Sent(name, CHAT, data) for name, data in _JSON]
    found += [Sent(name, CHAT, _chat(**fields)) for name, fields in _FIELDS]
    found += [Sent(name, path, json.dumps(body).encode()) for name, path, body in _OTHERS]
    good = _chat()
    found.append(Sent("text/plain", CHAT, good, {"Content-Type": "text/plain"}))
    found.append(Sent("form", CHAT, b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}))
    found.append(Sent("gzip bomb", CHAT, gzip.compress(b" " * (32 << 20)), {"Content-Encoding": "gzip"}))
    found.append(Sent("gzip that is none", CHAT, good, {"Content-Encoding": "gzip"}))
    found.append(Sent("many encodings", CHAT, good, {"Content-Encoding": ", ".join(["gzip"] * 100)}))
    found.append(Sent("resume", CHAT, good, {"X-Request-ID": "x", "X-Resume-For": "soon"}))
    return tuple(found)


def large() -> list[Sent]:
    """Return bodies of megabytes; everything in them is surely bad."""
    stops = _chat(stop=["x"] * 1_000_000)
    prompt = json.dumps({"model": MODEL, "prompt": "x" * 10_000_000}).encode()
    return [
        Sent("1e6 stops", CHAT, stops),
        Sent("10 MB prompt", COMPLETIONS, prompt),
        Sent("17 MB", CHAT, b" " * (17 << 20)),
        *(Sent(name, path, data) for name, path, data in _dear()),
    ]


def _dear() -> Iterator[tuple[str, str, bytes]]:
    """Give bodies that are dear to look at, or would be to answer."""
    names = ",".join(f'"{i:x}":0' for i in range(30_000))
    for where in ("metadata", "logit_bias", "chat_template_kwargs", "x"):
        yield f"a name twice in {where}", CHAT, _chat()[:-1] + f', "{where}": {{{names}, "752f": 0}}}}'.encode()
    yield "an escaped name twice", CHAT, _chat()[:-1] + f', "x": [{{{names}, "\\u0030": 0}}]}}'.encode()
    yield "1e6 lists", CHAT, _chat()[:-1] + b', "x": [' + b"[]," * 1_000_000 + b"0]}"
    yield "1e6 objects", CHAT, _chat(tools=[{"type": "function", "function": {"name": "a", "parameters": {"x": 0}}}]
                                     ).replace(b'"x": 0', b'"x": [' + b"{}," * 1_000_000 + b"0]")  # fmt: skip
    yield (
        "1e6 names",
        COMPLETIONS,
        b'{"model": "smollm2", "prompt": "x", "logit_bias": {' + b'"a":0,' * 10**6 + b'"b":0}}',
    )
    prompts = {"model": MODEL, "prompt": ["1" * 60_000] * 128, "max_tokens": 1, "truncate_prompt_tokens": 9}
    yield "texts of 8 MB", COMPLETIONS, json.dumps(prompts).encode()
    wide = {"n": 128, "max_tokens": 4000}
    yield "a wide answer", CHAT, _chat(logprobs=True, top_logprobs=20, **wide)
    yield "a wide completion", COMPLETIONS, json.dumps({"model": MODEL, "prompt": "x", "logprobs": 20, **wide}).encode()
    echo = {"model": MODEL, "prompt": ["x " * 4000] * 32, "max_tokens": 0, "echo": True, "logprobs": 20}
    yield "a wide echo", COMPLETIONS, json.dumps(echo).encode()


def _head(*lines: str, path: str = CHAT) -> bytes:
    kind = ["Host: x", "Content-Type: application/json"]
    return "\r\n".join([f"POST {path} HTTP/1.1", *kind, *lines, "", ""]).encode()


_CHUNKS = b"2\r\n{}\r\n0\r\n\r\n"
_CODINGS = (
    "gzip, chunked", "deflate, chunked", "identity, chunked", "chunked, chunked", "chunked, gzip", "identity", "gzip",
    "", ",chunked", "chunked;q=1", "xchunked", "\x0bchunked",
)  # fmt: skip
BROKEN_HTTP: tuple[tuple[str, bytes], ...] = (
    ("long header", _head("X: " + "x" * 10_000)),
    ("many headers", _head(*(f"X-{i}: 1" for i in range(400)))),
    ("long path", _head("Content-Length: 0", path="/" + "x" * 10_000)),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\r\n\r\n"),
    ("two lengths", _head("Content-Length: 5", "Content-Length: 6") + b"hello!"),
    ("smuggled", _head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n"),
    ("negative length", _head("Content-Length: -5")),
    ("length", _head("Content-Length: five")),
    ("chunks", _head("Transfer-Encoding: chunked") + b"zz\r\nhello\r\n"),
    ("huge chunk", _head("Transfer-Encoding: chunked") + b"ffffffffffffffffff\r\n"),
    ("nul", _head("X: a\0b", "Content-Length: 0")),
    ("method", b"FROB / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("version", b"GET / HTTP/9.9\r\nHost: x\r\n\r\n"),
    ("folded", _head("X: a\r\n b", "Content-Length: 0")),
    (
        "one byte chunks",
        _head("Transfer-Encoding: chunked") + b"".join(b"1\r\n%c\r\n" % c for c in b"{not json") + b"0\r\n\r\n",
    ),
    ("announced", _head(f"Content-Length: {1 << 40}") + b"{}"),
    *((f"coding {coding}", _head(f"Transfer-Encoding: {coding}") + _CHUNKS) for coding in _CODINGS),
    ("two codings", _head("Transfer-Encoding: gzip", "Transfer-Encoding: chunked") + _CHUNKS),
    ("coding of HTTP/1.0", _head("Transfer-Encoding: chunked").replace(b"/1.1", b"/1.0") + _CHUNKS),
    ("coding with length", _head("Transfer-Encoding: chunked", "Content-Length: 2") + _CHUNKS),
    ("blank before colon", _head("Transfer-Encoding : chunked") + _CHUNKS),
    ("length twice", _head("Content-Length: 2", "Content-Length: 2") + b"{}"),
    ("bare line feeds", _head("Content-Length: 2").replace(b"\r\n", b"\n") + b"{}"),
    ("line feeds in chunks", _head("Transfer-Encoding: chunked") + _CHUNKS.replace(b"\r\n", b"\n")),
    *((f"Expect {value}", _head(f"Expect: {value}", "Content-Length: 2") + b"{}") for value in ("foo", "200-ok")),
    (
        "content coding twice",
        _head("Content-Encoding: identity", "Content-Encoding: gzip", "Content-Length: 2") + b"{}",
    ),
    ("much of a head", _head(*(f"X-{i}: {'x' * 4000}" for i in range(30)))[:-4]),
    ("upgrade", _head("Upgrade: websocket", "Connection: Upgrade", path="/control") + b"\x82\xff" + bytes(100_000)),
)


def damaged(dice: random.Random) -> Sent:
    """Return a valid body that something was done to."""
    path = dice.choice(list(VALID))
    body = copy.deepcopy(VALID[path])
    what = dice.choice(
        ("value", "value", "value", "value", "value", "drop", "rename", "bytes", "cut", "insert", "repeat")
    )
    if what in ("value", "drop", "rename"):
        holder, key = dice.choice(list(_places(body)))
        if what == "value":
            holder[key] = copy.deepcopy(dice.choice(ODD_VALUES))
            holder, key = dice.choice(list(_places(body)))
            holder[key] = copy.deepcopy(dice.choice(ODD_VALUES))
        elif what == "drop":
            del holder[key]
        elif isinstance(holder, dict):
            holder[dice.choice(("", "x" * 100, "__class__", "\0", "ключ"))] = holder.pop(key)
        return Sent(f"{what} of {key}", path, json.dumps(body).encode(), is_surely_bad=False)
    data = bytearray(json.dumps(body).encode())
    at = dice.randrange(len(data))
    if what == "bytes":
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
    elif what == "cut":
        return Sent(what, path, bytes(data[:at]))
    elif what == "insert":
        data[at:at] = dice.randbytes(dice.randrange(1, 20))
    else:
        data[at:at] = data[max(0, at - dice.randrange(1, 60)) : at]
    return Sent(what, path, bytes(data), is_surely_bad=False)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (holder, key) in a body."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)
