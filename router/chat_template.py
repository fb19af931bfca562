"""Turn chat messages into a prompt with the model's own Jinja template.

The template comes with the model or from the operator, the messages from anybody: both are data here. The sandbox lets
a template change nothing and reach no attribute that Python keeps private.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.errors import ConfigError, InvalidRequest

RESERVED = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token", "tools"})


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja text.
        special_tokens: by name, as templates know them: bos_token, eos_token, …

    Raises:
        ConfigError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"chat-template: not a valid Jinja template: {error}") from error

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
        try:
            return self._template.render(context)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
