"""Functions that a model may call: what clients declare, and how the model hears of it.

1. `ToolUse` is what a request's `tools`, `tool_choice` and `parallel_tool_calls` come to, checked and bounded.
2. Where the model's chat template knows `tools`, the template writes them. Elsewhere `with_default_prompt` writes them
   into the system message, in the style of Hermes, and past calls and their results into the conversation.
3. `tool_choice` required, or one function by its name, binds the answer to `ToolUse.grammar`: a list of calls.
4. `router/tool_calls.py` finds the calls in what the model says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from protocol.errors import InvalidRequest
from protocol.request import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from router import exact_json
from router.schema_document import Document

MAX_TOOLS: Final = 128
MAX_DEPTH: Final = 64

FunctionName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]

# Of calls in one forced answer: a small model might never end the list.
MAX_CALLS: Final = 16
_NO_ARGUMENTS: Final[dict[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}

_PROMPT: Final = """You may call one or more functions to help with the user's request.

The functions, each with a JSON schema of its arguments, stand between <tools></tools>:
<tools>
{tools}
</tools>

To call a function, write a JSON object with its name and arguments between <tool_call></tool_call>:
<tool_call>
{{"name": <function name>, "arguments": <object with the arguments>}}
</tool_call>
{only_one}Results come back between <tool_response></tool_response>. If no function helps, answer as usual."""


class FunctionDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call; `parameters` is a JSON schema of its arguments."""

    name: FunctionName
    description: Annotated[str, Meta(max_length=65_536)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """One of `tools`; only functions are known here."""

    type: Annotated[str, Meta(max_length=64)]
    function: FunctionDefinition | None = None


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function by its name."""

    name: FunctionName


class NamedToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A `tool_choice` that names the one function to call."""

    type: Annotated[str, Meta(max_length=64)]
    function: NamedFunction | None = None


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


WrittenArguments = Annotated[str, Meta(max_length=1 << 20)] | dict[str, Any] | list[Any] | None


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """What was called, and with which arguments: an object written as JSON, or whatever else the model made of it."""

    name: FunctionName
    arguments: WrittenArguments = None


class ToolCallMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A call in a message of the assistant, as it was answered once."""

    id: Annotated[str, Meta(max_length=256)]
    function: CalledFunction
    type: Annotated[str, Meta(max_length=64)] = "function"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions of one request.

    Attributes:
        functions: what may be called; of a choice by name only that one.
        is_forced: the answer is nothing but calls, at least one.
        is_parallel: there may be several calls.
    """

    functions: tuple[FunctionDefinition, ...]
    is_forced: bool = False
    is_parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions."""
        return frozenset(function.name for function in self.functions)

    def for_template(self) -> list[dict[str, Any]]:
        """Return the functions as chat templates know them: like OpenAI's `tools`."""
        return [{"type": "function", "function": _plain(function)} for function in self.functions]

    def grammar(self) -> Grammar | None:
        """Return what the answer must obey: a list of objects with name and arguments; None if it is free.

        Raises:
            InvalidRequest: the schemas are too large, or refer to what is not in them.
        """
        if not self.is_forced:
            return None
        text = exact_json.encode(self._schema()).decode()
        if len(text.encode()) > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(f"tools: their schemas take more than {MAX_GRAMMAR_BYTES} bytes", "tools")
        return Grammar(kind=GrammarKind.JSON_SCHEMA, text=text)

    def _schema(self) -> dict[str, Any]:
        calls: list[dict[str, Any]] = []
        definitions: dict[str, Any] = {}
        for i, function in enumerate(self.functions):
            # The whole schema lies under a name of its own, and what it refers to in itself is found there.
            name = f"arguments_{i}"
            document = Document(function.parameters or _NO_ARGUMENTS, "tools")
            definitions[name] = {"type": "object", **document.moved(f"#/$defs/{name}")}
            properties = {"name": {"const": function.name}, "arguments": {"$ref": f"#/$defs/{name}"}}
            calls.append(
                {
                    "type": "object",
                    "properties": properties,
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
        items = calls[0] if len(calls) == 1 else {"anyOf": calls}
        max_items = MAX_CALLS if self.is_parallel else 1
        return {"type": "array", "items": items, "minItems": 1, "maxItems": max_items, "$defs": definitions}


def tool_use(
    tools: Sequence[ToolDefinition] | None, choice: ToolChoice | None, is_parallel: bool | None
) -> ToolUse | None:
    """Return what a request may call; None where it may call nothing.

    Raises:
        InvalidRequest: a tool is no function, two have one name, or the choice names none of them.
    """
    functions = _functions(tools or ())
    if not functions:
        if choice in (None, "none", "auto"):
            return None
        raise InvalidRequest("tool_choice: there are no tools to choose from", "tool_choice")
    may_repeat = is_parallel is not False
    if choice is None or choice == "auto":
        return ToolUse(functions, is_parallel=may_repeat)
    if choice == "none":
        return None
    if choice == "required":
        return ToolUse(functions, is_forced=True, is_parallel=may_repeat)
    assert isinstance(choice, NamedToolChoice)
    if choice.type != "function" or choice.function is None:
        raise InvalidRequest(f"tool_choice: type {choice.type!r} is not supported, only function", "tool_choice")
    named = tuple(f for f in functions if f.name == choice.function.name)
    if not named:
        raise InvalidRequest(f"tool_choice: {choice.function.name!r} is not among the tools", "tool_choice")
    return ToolUse(named, is_forced=True, is_parallel=False)


def arguments_of(call: CalledFunction) -> Any:
    """Return the arguments of a past call: an object if they are one; what is no JSON, or too deep, as its text.

    The model made them and its client hands them back, so that they are nothing to be refused.
    """
    written = call.arguments
    if not isinstance(written, str):
        written = exact_json.encode(written or {}).decode()
    try:
        found = msgspec.json.decode(written or "{}")
        check_depth(found, "arguments", "messages")
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError, InvalidRequest):
        return written
    return {} if found is None else found


def check_depth(value: Any, name: str, param: str, max_depth: int = MAX_DEPTH) -> None:
    """Raise InvalidRequest if JSON is nested more deeply than templates and grammars are asked to bear."""
    level = [value]
    for _ in range(max_depth):
        level = [inner for item in level for inner in _inside(item)]
        if not level:
            return
    raise InvalidRequest(f"{name}: nested more than {max_depth} levels deep", param)


def with_default_prompt(messages: Sequence[dict[str, Any]], use: ToolUse | None) -> list[dict[str, Any]]:
    """Return a conversation for a template that knows no tools: all of it is said in `content`.

    Args:
        messages: as for a template that knows them.
        use: what may be called now; None leaves the system message alone.
    """
    plain: list[dict[str, Any]] = []
    responses: list[str] | None = None
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if responses is None:
                responses = []
                plain.append({"role": "user", "content": responses})
            responses.append(text)
            continue
        responses = None
        if "tool_calls" in message:
            calls = [_written(call["function"]) for call in message["tool_calls"]]
            said = [message["content"]] if message["content"] else []
            plain.append({"role": message["role"], "content": "\n".join([*said, *calls])})
        else:
            plain.append(dict(message))
    for message in plain:
        if isinstance(message["content"], list):
            message["content"] = "\n".join(message["content"])
    return plain if use is None else _with_system(plain, _default_prompt(use))


def _default_prompt(use: ToolUse) -> str:
    tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in use.for_template())
    return _PROMPT.format(tools=tools, only_one="" if use.is_parallel else "Call at most one function.\n")


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _written(function: dict[str, Any]) -> str:
    arguments = function["arguments"]
    told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function["name"])
    return f'<tool_call>\n{{"name": {name}, "arguments": {told}}}\n</tool_call>'


def _functions(tools: Sequence[ToolDefinition]) -> tuple[FunctionDefinition, ...]:
    functions: list[FunctionDefinition] = []
    for i, tool in enumerate(tools):
        if tool.type != "function":
            raise InvalidRequest(f"tools[{i}].type: {tool.type!r} is not supported, only function", "tools")
        if tool.function is None:
            raise InvalidRequest(f"tools[{i}].function: this field is required", "tools")
        if tool.function.name.endswith("\n"):
            raise InvalidRequest(f"tools[{i}].function.name: ends with a line break", "tools")
        if any(tool.function.name == other.name for other in functions):
            raise InvalidRequest(f"tools[{i}].function.name: {tool.function.name!r} is there twice", "tools")
        check_depth(tool.function.parameters, f"tools[{i}].function.parameters", "tools")
        if (tool.function.parameters or {}).get("type", "object") != "object":
            raise InvalidRequest(f"tools[{i}].function.parameters.type: arguments are an object", "tools")
        functions.append(tool.function)
    return tuple(functions)


def _plain(function: FunctionDefinition) -> dict[str, Any]:
    plain: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        plain["description"] = function.description
    plain["parameters"] = exact_json.as_doubles(function.parameters or {"type": "object", "properties": {}})
    return plain


def _inside(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()
