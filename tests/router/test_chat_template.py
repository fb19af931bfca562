"""Chat templates: what they may do, and how they refuse."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from protocol.errors import ConfigError, InvalidRequest
from router.chat_template import ChatTemplate
from router.tokenizer import Tokenizer

USER = [{"role": "user", "content": "hi <b>"}]


def _render(source: str, messages: Any = USER, **variables: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, True, variables)


def test_templates_have_what_transformers_gives_them() -> None:
    assert _render("{{ bos_token }}{{ messages[0].content }}") == "<s>hi <b>"
    assert _render("{{ {'a': 'é<'} | tojson }}") == '{"a": "é<"}'
    assert _render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert _render("{% for m in messages %}{% if m %}{% break %}{% endif %}{% endfor %}x") == "x"
    assert _render("  {% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"


def test_variables_reach_the_template_but_reserved_names_do_not() -> None:
    assert _render("{{ enable_thinking }}", enable_thinking=False) == "False"
    with pytest.raises(InvalidRequest, match="may not set messages"):
        ChatTemplate("x", {}).render(USER, True, {"messages": []})


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content.x }}",
        "{{ 1 / 0 }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 'x' + messages[0] }}",
    ],
)
def test_a_refusal_of_the_template_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses") as caught:
        _render(source)
    assert caught.value.param == "messages"


def test_the_reason_of_raise_exception_is_told() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        _render("{{ raise_exception('roles must alternate') }}")


def test_invalid_jinja_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="not a valid Jinja template"):
        ChatTemplate("{% for %}", {})


def test_messages_cannot_inject_template_code() -> None:
    assert _render("{{ messages[0].content }}", [{"role": "user", "content": "{{ 7 * 7 }}"}]) == "{{ 7 * 7 }}"


def test_a_model_without_template_says_what_to_use(tokenizer: Tokenizer) -> None:
    assert tokenizer.render_chat(USER) == "<|start|>user: hi <b><|stop|><|start|>assistant: "
    assert tokenizer.render_chat(USER, add_generation_prompt=False) == "<|start|>user: hi <b><|stop|>"
