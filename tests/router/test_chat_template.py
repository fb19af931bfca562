"""Chat templates: what they may do, and how they refuse."""

from __future__ import annotations

import asyncio
import datetime
import os
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from protocol.errors import ConfigError, InvalidRequest, RequestFailed
from router.chat_template import ChatTemplate, RendersElsewhere
from router.template_child import new_environment
from router.template_rules import is_plain
from router.tokenizer import Tokenizer
from tests.router.tiny import byte_level_gguf
from tests.router.workers import CHAT, HI, LENGTH, answer, staged

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


# --- templates that take their time ---

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are helpful.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    CHATML,
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set rest = "
    "messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if "
    "(m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content.strip() ~ ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}",
    "{% set ns = namespace(found=false, count=0) %}{% for m in messages %}{% set ns.found = m.role == 'tool' %}"
    "{% set ns.count = ns.count + 1 %}{% for call in m.tool_calls %}{{ call.function | tojson(indent=2) }}{% endfor %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endfor %}{{ ns.count }}",
    "{% for tool in tools %}{{ tool | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}"
    "{{ strftime_now('%d %b %Y') }}",
)
# Each costs more than a conversation is long, or nobody knows.
NOT_PLAIN = (
    "{% for i in range(10) %}x{% endfor %}",
    "{{ 'a' * 3 }}",
    "{{ 2 ** 3 }}",
    "{{ '%d' % 1 }}",
    "{{ messages[0].content % 1 }}",
    "{{ 'a' | center(9) }}",
    "{{ 'a'.center(9) }}",
    "{{ 'a'.replace('', messages[0].content) }}",
    "{{ messages | tojson(indent=99) }}",
    "{{ strftime_now('%9Y') }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1) }}",
    "{% for m in messages %}{{ messages[0].content }}{% endfor %}",
    "{% for m in messages %}{% for n in messages %}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for c in m.content %}{{ m.content }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% if messages[0].content == messages[1].content %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if 'x' in messages[0].content %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% set rest = messages[1:] %}{% endfor %}",
    "{% for m in messages %}{{ messages[0].content | upper | length }}{% endfor %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% set x = messages[0].content %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "{% set x = [messages] %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}",
    "{% set n = namespace(x='a') %}{% for m in messages %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for m in messages %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for m in messages %}{% set n.x = m.content %}{{ n.x }}{% endfor %}",
    "{% set x %}{{ messages }}{% endset %}{{ x }}",
    "{% filter upper %}{{ messages }}{% endfilter %}",
    "{{ lipsum(100) }}",
    "{{ messages | map('upper') | list }}",
    "{{ messages | selectattr('role', 'in', messages[0].content) | list }}",
    "{{ [1] | batch(9, 0) | list }}",
    "{{ f(*messages) }}",
    "x" * 70_000,
)
HOSTILE = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "{{ 'a' * 10**9 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ 10 ** (10 ** 9) }}",
    "{{ (10 ** (10 ** 9)) | string | length }}",
    "{{ [0] * 10**9 }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "{% for i in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
    "{{ lipsum(n=10**7) }}",
    "{% set x = 'a' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
)


def _is_plain(source: str) -> bool:
    return is_plain(new_environment().parse(source), len(source), frozenset({"bos_token", "eos_token"}))


@pytest.mark.parametrize("source", PLAIN)
def test_ordinary_templates_are_plain(source: str) -> None:
    assert _is_plain(source)


@pytest.mark.parametrize("source", NOT_PLAIN, ids=lambda source: source[:60])
def test_what_may_cost_more_than_its_conversation_is_not(source: str) -> None:
    assert not _is_plain(source)


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: source[:60])
def test_a_hostile_template_fails_its_request_within_its_budget(source: str) -> None:
    started_s, before = time.monotonic(), os.times()
    template = ChatTemplate(source, {})
    with pytest.raises((RequestFailed, InvalidRequest)):
        template.render(USER)
    after = os.times()
    assert (after.user + after.system) - (before.user + before.system) < 0.5, "it was computed here"
    assert time.monotonic() - started_s < 20.0


def test_what_is_not_plain_is_rendered_elsewhere_and_the_same() -> None:
    source = "{% macro f(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}"
    template = ChatTemplate(source + "{{ bos_token }}{{ x }}{{ tools | tojson }}", {"bos_token": "<s>"})
    assert template.knows_tools
    for text in ("hi", "\u2028\x00 \U0001f600", "x" * 3_000_000):
        found = template.render([{"role": "user", "content": text}], True, {"x": [1, None, 2.5]}, [{"a": "é"}])
        assert found == f'<user>{text}<s>[1, None, 2.5][{{"a": "é"}}]'
    with pytest.raises(InvalidRequest, match="must alternate"):
        ChatTemplate("{% macro f() %}{% endmacro %}{{ raise_exception('must alternate') }}", {}).render(USER)


def test_the_next_conversation_is_rendered_after_one_that_took_too_much() -> None:
    template = ChatTemplate(
        "{% for i in range(messages[0].n) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x", {}
    )
    with pytest.raises(RequestFailed, match="chat template of the model took more than"):
        template.render([{"n": 99_999}])
    assert template.render([{"n": 1}]) == "x"


def test_an_unknown_filter_is_told_at_the_start() -> None:
    for source in ("{{ messages | nonsense }}", "{{ 'a' * 2 }}{{ messages is nonsense }}"):
        with pytest.raises(ConfigError, match="nonsense"):
            ChatTemplate(source, {})


async def test_other_requests_go_on_beside_a_hostile_template(tmp_path: Path) -> None:
    model = Tokenizer(byte_level_gguf(tmp_path / "tiny.gguf"), HOSTILE[0])
    async with staged(model, lease_ttl_s=60.0) as stage:
        prefill, decode = await stage.pair()
        patient = aiohttp.ClientTimeout(total=60)
        hostile = asyncio.create_task(stage.post(CHAT, HI, timeout=patient))
        longest_s, last_s = 0.0, time.monotonic()
        while not hostile.done():
            asked = asyncio.create_task(stage.post("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 2}))
            await answer(prefill, decode, "ok", LENGTH)
            assert (await asked)[0] == 200
            longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
        status, body, _ = await hostile
        assert status == 500 and "chat template of the model" in body["error"]["message"]
        assert longest_s < 1.0, "an innocent request waited for the template"


async def test_a_template_that_is_not_plain_serves_every_route(tmp_path: Path) -> None:
    source = "{% macro f(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}"
    model = Tokenizer(byte_level_gguf(tmp_path / "tiny.gguf"), source)
    with pytest.raises(RendersElsewhere):
        model.render_chat(USER)
    async with staged(model) as stage:
        prefill, decode = await stage.pair()
        model.warm()
        asked = asyncio.create_task(stage.post(CHAT, HI))
        await answer(prefill, decode, "ok", LENGTH)
        assert (await asked)[1]["choices"][0]["message"]["content"] == "ok"
        _, told, _ = await stage.post("/tokenize", {"messages": HI["messages"]})
        assert (await stage.post("/detokenize", {"tokens": told["tokens"]}))[1] == {"prompt": "<user>hi"}
