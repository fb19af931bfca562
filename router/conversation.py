"""From the messages of a chat to the text of a prompt, with the functions that the model may call.

1. Messages become what chat templates know; calls of the past become objects, results name the call that they answer.
2. A template that knows `tools` is given them; any other one gets them said in plain words (router/tools.py).
3. `continue_final_message` cuts the text after the last message's content, so that the answer goes on within it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from protocol.errors import InvalidRequest
from router.api import ChatMessage, ChatRequest
from router.tokenizer import Tokenizer
from router.tools import ToolUse, arguments_of, with_default_prompt


def render(tokenizer: Tokenizer, request: ChatRequest, messages: list[dict[str, Any]], use: ToolUse | None) -> str:
    """Return the prompt of a chat.

    Args:
        tokenizer: of the model, with its chat template.
        request: what was asked.
        messages: its messages, as `router/intake.py:plain_messages` returns them.
        use: functions that may be called.

    Raises:
        InvalidRequest: the template refuses the messages, or the last one cannot be continued.
    """
    messages, tools = told(tokenizer, messages, use)
    goes_on = bool(request.continue_final_message)
    if goes_on and request.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
        )
    opens_turn = not goes_on and request.add_generation_prompt is not False
    text = rendered(tokenizer, messages, opens_turn, request.chat_template_kwargs, tools)
    return _cut_after(text, messages[-1]["content"]) if goes_on else text


def rendered(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    opens_turn: bool,
    variables: Mapping[str, Any] | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Return what the template makes of messages, as `Tokenizer.render_chat` does.

    Many a template looks into the arguments of calls: what a model once wrote amiss is told all the same, as a member
    of an object.
    """
    try:
        return tokenizer.render_chat(messages, opens_turn, variables, tools)
    except InvalidRequest:
        mended = _with_object_arguments(messages)
        if mended == messages:
            raise
        return tokenizer.render_chat(mended, opens_turn, variables, tools)


def told(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], use: ToolUse | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return messages and tools for the template: one that knows no tools finds all of it in the messages."""
    has_calls = any("tool_calls" in message or message["role"] == "tool" for message in messages)
    if not tokenizer.knows_tools and (has_calls or use is not None):
        return with_default_prompt(messages, use), None
    return messages, None if use is None else use.for_template()


def calls_of(message: ChatMessage, i: int) -> list[dict[str, Any]]:
    """Return the calls of an assistant's message, with arguments as templates expect them: objects, if they are.

    Raises:
        InvalidRequest: another role calls, or something else is called than a function.
    """
    if message.role != "assistant":
        raise InvalidRequest(f"messages[{i}].tool_calls: only the assistant calls functions", "messages")
    found = []
    for j, call in enumerate(message.tool_calls or ()):
        where = f"messages[{i}].tool_calls[{j}]"
        if call.type != "function":
            raise InvalidRequest(f"{where}.type: {call.type!r} is not supported, only function", "messages")
        function = {"name": call.function.name, "arguments": arguments_of(call.function)}
        found.append({"id": call.id, "type": "function", "function": function})
    return found


def _with_object_arguments(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose calls all have an object as arguments: any other value becomes its one member."""

    def mended(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, dict):
            return call
        return {**call, "function": {**function, "arguments": {"arguments": arguments}}}

    found = []
    for message in messages:
        calls = [mended(call) for call in message.get("tool_calls", ())]
        found.append({**message, "tool_calls": calls} if calls else message)
    return found


def check_results(messages: Sequence[dict[str, Any]]) -> None:
    """Raise InvalidRequest if a result of a function answers no call before it."""
    known: set[str] = set()
    for i, message in enumerate(messages):
        known.update(call["id"] for call in message.get("tool_calls", ()))
        if message["role"] == "tool" and message.get("tool_call_id") not in known:
            raise InvalidRequest(f"messages[{i}].tool_call_id: must be the id of a call before it", "messages")


def _cut_after(text: str, content: str) -> str:
    inner = content.strip()
    at = text.rfind(inner) if inner else -1
    if at < 0:
        raise InvalidRequest("messages: the last one has no text to go on with", "messages")
    # Templates may strip what they are given; what they left of its end is kept.
    with_end = content.lstrip()
    return text[: at + len(with_end)] if text.startswith(with_end, at) else text[: at + len(inner)]
