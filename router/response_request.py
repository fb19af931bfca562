"""Body of /v1/responses, and the chat that it comes to. Stateless: nothing is stored, so nothing can be referred to.

1. `instructions` are a system message before all others; `input` is a user's message, or items.
2. Items are messages with parts of text, calls of functions, and their results. Calls that follow each other, and the
   text before them, are one message of the assistant.
3. What would need a memory of earlier answers (`previous_response_id`, `conversation`, `background`, `prompt`) is
   refused, and so are tools that the server itself would have to run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from protocol.errors import InvalidRequest, RequestRejected
from protocol.request import MAX_LOGPROBS
from router.api import MAX_MESSAGES, ChatMessage, ChatRequest, GenerationFields, Scalar, Short, TextPart, Tokens
from router.structured import JsonSchemaFormat, ResponseFormat
from router.tools import (
    MAX_TOOLS,
    CalledFunction,
    FunctionDefinition,
    FunctionName,
    NamedFunction,
    NamedToolChoice,
    ToolCallMessage,
    ToolChoice,
    ToolDefinition,
    WrittenArguments,
)

# Fields of chat, and what they are called in responses.
RENAMED: Final = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
}
LOGPROBS: Final = "message.output_text.logprobs"
# May be asked for, and has nothing to show here.
_EMPTY_INCLUDES: Final = frozenset({"reasoning.encrypted_content"})
_TEXT_PARTS: Final = frozenset({"input_text", "output_text", "text"})


class InputPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of an item's content; only text is understood."""

    type: Annotated[str, Meta(max_length=64)]
    text: str | None = None


Parts = Annotated[list[InputPart], Meta(max_length=MAX_MESSAGES)]


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """One item of `input`: a message, a function_call, or a function_call_output."""

    type: Annotated[str, Meta(max_length=64)] = "message"
    role: Annotated[str, Meta(max_length=64)] | None = None
    content: str | Parts | None = None
    call_id: Short | None = None
    name: FunctionName | None = None
    arguments: WrittenArguments = None
    output: str | Parts | None = None


class ResponseTool(msgspec.Struct, frozen=True, kw_only=True):
    """One of `tools`; only functions are known here, and they are flat, other than in chat."""

    type: Annotated[str, Meta(max_length=64)]
    name: FunctionName | None = None
    description: Annotated[str, Meta(max_length=65_536)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A `tool_choice` that names the one function to call."""

    type: Annotated[str, Meta(max_length=64)]
    name: FunctionName | None = None


class TextFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Form of the text; `schema` is a JSON schema for type json_schema."""

    type: Annotated[str, Meta(max_length=64)]
    name: Annotated[str, Meta(max_length=64)] | None = None
    description: Annotated[str, Meta(max_length=65_536)] | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`text` of a request."""

    format: TextFormat | None = None


class ResponsesRequest(GenerationFields, frozen=True, kw_only=True):
    """Body of /v1/responses."""

    input: str | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    text: TextConfig | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    include: Annotated[list[Short], Meta(max_length=64)] | None = None
    metadata: Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None
    chat_template_kwargs: Annotated[dict[Short, Scalar], Meta(max_length=32)] | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Annotated[str, Meta(max_length=64)] | None = None
    previous_response_id: Short | None = None
    conversation: Any = None
    prompt: Any = None

    @property
    def has_logprobs(self) -> bool:
        """Whether log probabilities are to be reported."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    def to_chat(self) -> ChatRequest:
        """Return the chat that this comes to.

        Raises:
            InvalidRequest: something is not supported, or an item is malformed.
        """
        self._check()
        shared = {name: getattr(self, name) for name in GenerationFields.__struct_fields__}
        if self.text is not None and self.text.format is not None:
            shared["response_format"] = _response_format(self.text.format)
        tools = None if self.tools is None else [_tool(tool, i) for i, tool in enumerate(self.tools)]
        return ChatRequest(
            **shared,
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.has_logprobs,
            top_logprobs=self.top_logprobs if self.has_logprobs else None,
            tools=tools,
            tool_choice=_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def _check(self) -> None:
        for name in ("previous_response_id", "conversation", "prompt"):
            if getattr(self, name) is not None:
                raise InvalidRequest(f"{name} is not supported: this server stores no responses", name)
        if self.background:
            raise InvalidRequest("background is not supported: this server stores no responses", "background")
        if self.truncation not in (None, "disabled"):
            raise InvalidRequest("truncation: only disabled is supported; see truncate_prompt_tokens", "truncation")
        if self.max_tokens is not None:
            raise InvalidRequest("max_tokens: /v1/responses takes max_output_tokens", "max_tokens")
        if self.n not in (None, 1):
            raise InvalidRequest("n: /v1/responses gives one answer", "n")
        if self.return_token_ids:
            raise InvalidRequest("return_token_ids: a response has no place for them", "return_token_ids")
        for asked in self.include or ():
            if asked != LOGPROBS and asked not in _EMPTY_INCLUDES:
                raise InvalidRequest(f"include: {asked!r} is not supported", "include")
        if self.response_format is not None:
            raise InvalidRequest("response_format: /v1/responses takes text.format", "response_format")

    def _messages(self) -> list[ChatMessage]:
        messages: list[ChatMessage] = []
        if self.instructions:
            messages.append(ChatMessage(role="system", content=self.instructions))
        if isinstance(self.input, str):
            return [*messages, ChatMessage(role="user", content=self.input)]
        for i, item in enumerate(self.input):
            _add(messages, item, f"input[{i}]")
        return messages


def renamed(error: RequestRejected) -> RequestRejected:
    """Return an error about a chat as one about the response that it came from."""
    new = RENAMED.get(error.param or "")
    if new is None or type(error).__init__ is not RequestRejected.__init__:
        return error
    return type(error)(str(error).replace(error.param or "", new), new)


def _add(messages: list[ChatMessage], item: InputItem, where: str) -> None:
    """Append what an item says, or add it to the assistant's message that it belongs to."""
    if item.type == "message":
        if item.role is None:
            raise InvalidRequest(f"{where}.role: this field is required", "input")
        messages.append(ChatMessage(role=item.role, content=_text_parts(item.content, f"{where}.content")))
    elif item.type == "function_call":
        if item.call_id is None or item.name is None:
            raise InvalidRequest(f"{where}: a function_call needs call_id and name", "input")
        call = ToolCallMessage(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
        if messages and messages[-1].role == "assistant":
            last = messages.pop()
            calls = last.tool_calls or []
            # The list is ours alone: there may be thousands of calls.
            calls.append(call)
            messages.append(msgspec.structs.replace(last, tool_calls=calls))
        else:
            messages.append(ChatMessage(role="assistant", tool_calls=[call]))
    elif item.type == "function_call_output":
        if item.call_id is None or item.output is None:
            raise InvalidRequest(f"{where}: a function_call_output needs call_id and output", "input")
        content = _text_parts(item.output, f"{where}.output")
        messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=content))
    else:
        raise InvalidRequest(
            f"{where}.type: {item.type!r} is not supported, only message, function_call and function_call_output",
            "input",
        )


def _text_parts(content: str | Iterable[InputPart] | None, where: str) -> str | list[TextPart]:
    if content is None:
        raise InvalidRequest(f"{where}: this field is required", "input")
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part.type not in _TEXT_PARTS or part.text is None:
            raise InvalidRequest(f"{where}: only parts of type input_text and output_text are supported", "input")
        parts.append(TextPart(type="text", text=part.text))
    return parts


def _response_format(form: TextFormat) -> ResponseFormat:
    """Return the form of the text as chat has it: there a schema lies one level deeper."""
    if form.type != "json_schema":
        return ResponseFormat(type=form.type, schema=form.schema)
    if form.schema is None:
        raise InvalidRequest("text.format.schema: this field is required", "text")
    schema = JsonSchemaFormat(name=form.name or "response", schema=form.schema, strict=form.strict)
    return ResponseFormat(type=form.type, json_schema=schema)


def _tool(tool: ResponseTool, i: int) -> ToolDefinition:
    if tool.type != "function":
        raise InvalidRequest(f"tools[{i}].type: {tool.type!r} is not supported, only function", "tools")
    if tool.name is None:
        raise InvalidRequest(f"tools[{i}].name: this field is required", "tools")
    function = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return ToolDefinition(type="function", function=function)


def _choice(choice: Literal["none", "auto", "required"] | ResponseToolChoice | None) -> ToolChoice | None:
    if not isinstance(choice, ResponseToolChoice):
        return choice
    function = None if choice.name is None else NamedFunction(name=choice.name)
    return NamedToolChoice(type=choice.type, function=function)
