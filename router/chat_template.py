"""Turn chat messages into a prompt with the model's own Jinja template.

    plain (`router/template_rules.py`) ─► rendered here
    any other ─► on an event loop: `RendersElsewhere`, and again in a thread
                   └ in a thread: rendered by a process with a budget of its own (`router/template_process.py`)

The template comes with the model or from the operator, the messages from anybody: both are data here. The sandbox lets
a template change nothing and reach no attribute that Python keeps private; that it ends, in time and without taking all
memory, is known of plain ones alone. Others are not even compiled here, for that computes what is constant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jinja2
from jinja2 import nodes

from protocol.errors import ConfigError, InvalidRequest
from router.template_child import REFUSALS, new_environment
from router.template_process import TemplateProcess
from router.template_rules import is_plain

MAX_TEMPLATE_CHARS: Final = 1 << 20
MAX_TOKEN_CHARS: Final = 1024
RESERVED = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token", "tools"})


class RendersElsewhere(Exception):
    """A template is not rendered on an event loop: ask again in a thread."""


class ChatTemplate:
    """A template. Safe to share between threads.

    Args:
        source: Jinja text.
        special_tokens: by name, as templates know them: bos_token, eos_token, …

    Raises:
        ConfigError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ConfigError(f"chat-template: longer than {MAX_TEMPLATE_CHARS} characters")
        environment = new_environment()
        self._special_tokens = dict(special_tokens)
        short = {name for name, token in special_tokens.items() if len(token) <= MAX_TOKEN_CHARS}
        self._process: TemplateProcess | None = None
        try:
            tree = environment.parse(source)
            # jinja2.meta would compute what is constant.
            names = tree.find_all(nodes.Name)
            self.knows_tools = any(name.name == "tools" and name.ctx == "load" for name in names)
            _check_names(tree, environment)
            if is_plain(tree, len(source), frozenset(short | {"add_generation_prompt"})):
                self._template = environment.from_string(source)
                # Copied for each rendering: out of jinja2's chain of dicts that takes five times as long.
                self._template.globals = dict(self._template.globals)
            else:
                self._process = TemplateProcess(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise ConfigError(f"chat-template: not a valid Jinja template: {error}") from error

    def warm(self) -> None:
        """Start what renders it elsewhere, if it is not plain."""
        if self._process is not None:
            self._process.warm()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the prompt of a conversation.

        Args:
            messages: each with `role` and `content`, both strings; calls of functions have objects as arguments.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: what else the template may read; reserved names are refused.
            tools: functions that may be called, if the template knows them.

        Raises:
            InvalidRequest: the template refuses these messages.
            RequestFailed: it takes more than its budget for them.
            RendersElsewhere: this is an event loop's thread, and the template is not plain.
        """
        if reserved := RESERVED.intersection(variables or ()):
            raise InvalidRequest(f"chat_template_kwargs may not set {sorted(reserved)[0]}", "chat_template_kwargs")
        context = {
            **self._special_tokens,
            "documents": None,
            **(variables or {}),
            "tools": tools,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        if self._process is not None:
            if _is_on_event_loop():
                raise RendersElsewhere
            return self._process.render(context)
        try:
            return self._template.render(context)
        except REFUSALS as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error


def _check_names(node: nodes.Node, environment: jinja2.Environment) -> None:
    """Raise TemplateError for filters and tests that do not exist, as compiling would: not for those behind an `if`."""
    if isinstance(node, nodes.If | nodes.CondExpr):
        return
    for kind, known in ((nodes.Filter, environment.filters), (nodes.Test, environment.tests)):
        if isinstance(node, kind) and node.name not in known:
            raise jinja2.TemplateError(f"No {kind.__name__.lower()} named {node.name!r}.")
    for inner in node.iter_child_nodes():
        _check_names(inner, environment)


def _is_on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
