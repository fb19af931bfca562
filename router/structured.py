"""How clients ask for structured output, and the one `Grammar` that each way comes to.

    response_format      OpenAI's: text, json_object, json_schema
    structured_outputs   vLLM's: one of json, regex, choice, grammar, json_object
    guided_*             vLLM's older names of the same

1. The fields are typed where they are decoded (router/api.py). 2. `structured_output` allows one way in a request, and
bounds size and nesting. 3. `router/schema_document.py` resolves what a schema refers to. 4. `router/grammar_checks.py`
tries it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Protocol

import msgspec
from msgspec import Meta

from protocol.errors import InvalidRequest
from protocol.request import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from router import exact_json
from router.json_bounds import check_unique
from router.regex_dialect import ascii_regex
from router.schema_document import Document

MAX_NESTING: Final = 64
MAX_LISTED_CHOICES: Final = 1024

Schema = dict[str, Any] | bool | str
Pattern = Annotated[str, Meta(min_length=1, max_length=MAX_GRAMMAR_BYTES)]
Choices = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=MAX_LISTED_CHOICES)]
Whitespace = Annotated[str, Meta(max_length=256)]


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True):
    """A schema as OpenAI's SDKs send it. `strict` changes nothing: what is sampled always obeys."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    schema: dict[str, Any] | bool
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's `response_format`; some servers' `json_object` takes a `schema`, and so it does here."""

    type: Annotated[str, Meta(max_length=64)]
    json_schema: JsonSchemaFormat | None = None
    schema: dict[str, Any] | bool | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's `structured_outputs`. `disable_fallback` changes nothing: there is no fallback."""

    json: Schema | None = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: Whitespace | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None


class StructuredFields(Protocol):
    """The fields of a request that this file reads."""

    @property
    def response_format(self) -> ResponseFormat | None: ...
    @property
    def structured_outputs(self) -> StructuredOutputs | None: ...
    @property
    def guided_json(self) -> Schema | None: ...
    @property
    def guided_regex(self) -> str | None: ...
    @property
    def guided_choice(self) -> list[str] | None: ...
    @property
    def guided_grammar(self) -> str | None: ...
    @property
    def guided_whitespace_pattern(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Structured:
    """A grammar, and the field that asked for it."""

    grammar: Grammar
    field: str


def structured_output(request: StructuredFields) -> Structured | None:
    """Return what a request's output must obey; None for anything.

    Raises:
        InvalidRequest: more than one way is used, or one that is not supported, or a schema is too large or deep.
    """
    pattern = request.guided_whitespace_pattern
    guided: dict[str, Grammar | None] = {
        "guided_json": _json(request.guided_json, "guided_json", pattern),
        "guided_regex": _text(GrammarKind.REGEX, request.guided_regex, "guided_regex"),
        "guided_choice": _choice(request.guided_choice, "guided_choice"),
        "guided_grammar": _text(GrammarKind.LARK, request.guided_grammar, "guided_grammar"),
    }
    ways = {
        "response_format": _of_response_format(request.response_format),
        "structured_outputs": _of_structured_outputs(request.structured_outputs),
        **guided,
    }
    used = [Structured(grammar, name) for name, grammar in ways.items() if grammar is not None]
    if len(used) > 1:
        raise InvalidRequest(f"{used[1].field}: {used[0].field} asks for structured output already", used[1].field)
    if pattern is not None and guided["guided_json"] is None:
        name = "guided_whitespace_pattern"
        raise InvalidRequest(f"{name}: has no meaning without guided_json", name)
    return used[0] if used else None


def _of_response_format(asked: ResponseFormat | None) -> Grammar | None:
    name = "response_format"
    if asked is None:
        return None
    if asked.type not in ("text", "json_object", "json_schema"):
        raise InvalidRequest(f"{name}.type: {asked.type!r} is not supported (text, json_object, json_schema are)", name)
    if asked.schema is not None and asked.json_schema is not None:
        raise InvalidRequest(f"{name}: both json_schema and schema give a schema", name)
    schema = asked.schema if asked.json_schema is None else asked.json_schema.schema
    if asked.type == "text":
        if schema is not None:
            raise InvalidRequest(f"{name}: a schema has no meaning with type text", name)
        return None
    if asked.type == "json_object":
        return _json({"type": "object"} if schema is None else schema, name, None)
    if schema is None:
        raise InvalidRequest(f"{name}.json_schema: this field is required", name)
    return _json(schema, name, None)


def _of_structured_outputs(asked: StructuredOutputs | None) -> Grammar | None:
    name = "structured_outputs"
    if asked is None:
        return None
    if asked.structural_tag is not None:
        raise InvalidRequest(f"{name}.structural_tag is not supported by this server", name)
    pattern = "" if asked.disable_any_whitespace else asked.whitespace_pattern
    schema: Schema | None = {"type": "object"} if asked.json_object else None
    ways = (asked.json, asked.regex, asked.choice, asked.grammar, schema)
    if sum(way is not None for way in ways) != 1:
        raise InvalidRequest(f"{name}: give exactly one of json, regex, choice, grammar, json_object", name)
    schema = schema if asked.json is None else asked.json
    if schema is None and (asked.whitespace_pattern is not None or asked.disable_additional_properties):
        raise InvalidRequest(f"{name}: whitespace_pattern and disable_additional_properties need a schema", name)
    return (
        _json(schema, name, pattern, is_closed=bool(asked.disable_additional_properties))
        or _text(GrammarKind.REGEX, asked.regex, name)
        or _choice(asked.choice, name)
        or _text(GrammarKind.LARK, asked.grammar, name)
    )


def _json(schema: Schema | None, name: str, pattern: str | None, *, is_closed: bool = False) -> Grammar | None:
    if schema is None:
        return None
    if isinstance(schema, str):
        schema = _decoded(schema, name)
    _check_nesting(schema, name)
    if isinstance(schema, dict):
        document = Document(schema, name)
        if is_closed:
            document.close()
        schema = document.moved()
    text = exact_json.encode(schema).decode()
    pattern = None if pattern is None else ascii_regex(pattern)
    return _bounded(Grammar(kind=GrammarKind.JSON_SCHEMA, text=text, whitespace_pattern=pattern), name)


def _decoded(text: str, name: str) -> dict[str, Any] | bool:
    try:
        found: dict[str, Any] | bool = exact_json.decoder(dict[str, Any] | bool).decode(text)
        check_unique(text.encode())  # as in the body: it has seen this text as one string
        return found
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError, InvalidRequest) as error:
        raise InvalidRequest(f"{name}: the text is no JSON schema: {error}", name) from error


def _text(kind: GrammarKind, text: str | None, name: str) -> Grammar | None:
    return None if text is None else _bounded(Grammar(kind=kind, text=text), name)


def _choice(choices: list[str] | None, name: str) -> Grammar | None:
    if choices is None:
        return None
    return _bounded(Grammar(kind=GrammarKind.CHOICE, text=msgspec.json.encode(choices).decode()), name)


def _bounded(grammar: Grammar, name: str) -> Grammar:
    try:
        num_bytes = len(grammar.text.encode()) + len((grammar.whitespace_pattern or "").encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name}: contains lone surrogates: it is not valid Unicode", name) from error
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{name}: {num_bytes} bytes; at most {MAX_GRAMMAR_BYTES} are taken", name)
    return grammar


def _check_nesting(schema: Any, name: str) -> None:
    """Raise InvalidRequest where lists and objects lie more than MAX_NESTING deep in each other."""
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_NESTING:
            raise InvalidRequest(f"{name}: the schema is nested more than {MAX_NESTING} deep", name)
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
        level = [value for value in inner if isinstance(value, dict | list)]
