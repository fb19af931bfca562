"""A schema as llguidance holds to it: the same answers, in words that it takes as JSON Schema means them.

1. What says nothing by itself goes: an unknown `format`, `uniqueItems: false`, `then` without `if`, and their like.
2. What the library would hold to in another way is rewritten: numbers (`router/schema_numbers.py`), patterns
   (`router/regex_dialect.py`), counts written as `1.0`.
3. What it would not hold is refused by its name. The rest of what it does not implement, it refuses itself.

Runs in the expendable child: nothing here is bounded in time but by the schema's size.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any, Final

import msgspec

from protocol.errors import GrammarError, InvalidRequest
from router import exact_json
from router.json_bounds import check_unique
from router.regex_dialect import ecma_regex
from router.schema_document import Document, Node
from router.schema_numbers import check_merged_multiples, hold_numbers

_FORMATS: Final = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
_COUNTS: Final = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# What asks for nothing with these values; `{}` and true are the schema that everything obeys.
_ANYTHING: Final[tuple[Any, ...]] = (True, {})
_IDLE: Final[dict[str, tuple[Any, ...]]] = {
    "uniqueItems": (False,),
    "not": (False,),
    "propertyNames": _ANYTHING,
    "unevaluatedItems": _ANYTHING,
    "unevaluatedProperties": _ANYTHING,
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
}
_COMBINING: Final = ("allOf", "anyOf", "oneOf", "$ref")
_ASIDE: Final = frozenset(
    {"$defs", "definitions", "$schema", "$comment", "title", "description", "default", "examples", "deprecated"}
    | {"readOnly", "writeOnly"}
)

# Of a grammar in Lark: strings, special tokens, comments and patterns, in which nothing begins, and schemas.
_EMBEDDED: Final = re.compile(
    r'"(?:\\.|[^"\\\n])*"|<[^<>\n]*>|(?://|\#)[^\n]*|/(?:\\.|[^/\\\n])+/|(?P<json>%json\s*)(?=\{)'
)
_ANY_JSON: Final = json.JSONDecoder(parse_int=str, parse_float=str)


def exact_schema(text: str) -> str:
    """Return the text of a schema as the library is to have it. Raises GrammarError with what cannot be held."""
    try:
        schema = exact_json.decoder(dict[str, Any] | bool).decode(text)
        if isinstance(schema, bool):
            if not schema:
                raise GrammarError("no output obeys it")
            return "{}"  # the library takes no schema but an object
        document = Document(schema, "schema")
        for node in document.nodes:
            _drop_idle(node)
        document.keep_reached()
        root = document.moved()
    except (InvalidRequest, msgspec.MsgspecError) as error:
        raise GrammarError(str(error)) from error
    is_merged = any(_is_merged(node) for node in document.nodes)
    for node in document.nodes:
        _mend(node)
        hold_numbers(node, is_merged)
    if is_merged:
        check_merged_multiples(node.get("multipleOf") for node in document.nodes)
    return exact_json.encode(root).decode()


def exact_lark(text: str) -> str:
    """Return a grammar in Lark with each `%json {...}` as `exact_schema` has it. Raises GrammarError as that does."""
    out, at = [], 0
    while (found := _EMBEDDED.search(text, at)) is not None:
        out.append(text[at : found.end()])
        at = found.end()
        if found["json"] is None:
            continue
        try:
            end = _ANY_JSON.raw_decode(text, at)[1]
            check_unique(text[at:end].encode())
        except (ValueError, InvalidRequest) as error:
            raise GrammarError(f"%json: {error}") from error
        out.append(exact_schema(text[at:end]))
        at = end
    return "".join((*out, text[at:]))


def _is_merged(node: Node) -> bool:
    """Whether a schema and others, or several others, hold for the same value."""
    if "allOf" in node:
        return True
    return any(key in node for key in _COMBINING) and len(node.keys() - _ASIDE) > 1


def _drop_idle(node: Node) -> None:
    for key, values in _IDLE.items():
        # By type too: 0 equals False.
        if any(type(node.get(key)) is type(value) and node[key] == value for value in values):
            del node[key]
    if isinstance(node.get("format"), str) and node["format"] not in _FORMATS:
        del node["format"]
    if node.get("uniqueItems") is True and _count(node.get("maxItems")) in (0, 1):
        del node["uniqueItems"]
    if "if" not in node or not {"then", "else"} & node.keys():
        for key in ("if", "then", "else"):
            node.pop(key, None)
    if "contains" not in node:
        for key in ("minContains", "maxContains"):
            node.pop(key, None)
    elif _count(node.get("minContains")) == 0 and "maxContains" not in node:
        del node["contains"], node["minContains"]
    if not isinstance(node.get("items"), list):
        # By no draft does it mean anything then, and the library would forget prefixItems.
        node.pop("additionalItems", None)


def _mend(node: Node) -> None:
    for key in _COUNTS:
        if (count := _count(node.get(key))) is not None:
            node[key] = count
    if isinstance(node.get("pattern"), str):
        node["pattern"] = ecma_regex(node["pattern"])
    least, required = node.get("minProperties"), node.get("required")
    num_required = len(set(required)) if isinstance(required, list) and all(isinstance(r, str) for r in required) else 0
    if isinstance(least, int) and least > num_required + 1:
        # Two names that the schema does not know may be the same one.
        raise GrammarError("minProperties: at most one more than are required is supported")


def _count(value: Any) -> int | None:
    """Return a count, also one that is written with a point; None for anything else."""
    if isinstance(value, Decimal) and value == value.to_integral_value() and abs(value) < 1 << 53:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
