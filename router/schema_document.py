"""A JSON schema as a document: what in it is a schema, and what its references mean.

1. `Document` copies a schema, and finds every schema in it by its position in the grammar of JSON Schema: a keyword
   tells what stands under it, and no key is taken for one by its name. A property may be called `enum`; what stands
   under `const` is data, whatever it looks like; what only a reference points to is a schema as well.
2. Base URIs (`$id`), anchors and pointers are resolved here, so that no library has to, and a schema may be moved.
3. Who takes a keyword out calls `keep_reached`: what a reference leads to lives on under `$defs`.
4. `moved` leaves JSON pointers from the root it is moved under, and neither base URIs nor anchors.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, Final
from urllib.parse import quote, unquote, urldefrag, urljoin

from protocol.errors import InvalidRequest
from protocol.request import MAX_GRAMMAR_BYTES

Node = dict[str, Any]
Path = tuple[str | int, ...]

_ONE: Final = frozenset(
    {"additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not"}
    | {"propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"}
)
_LIST: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
_MAP: Final = frozenset({"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"})
_REFERENCES: Final = ("$ref", "$dynamicRef", "$recursiveRef")
_NAMES: Final = ("$id", "$anchor", "$dynamicAnchor", "$recursiveAnchor")
_NOTHING: Final = object()
_NOWHERE: Final = "https://schema.invalid/"
_DRAFTS: Final = {
    f"json-schema.org/{draft}/schema": f"{scheme}://json-schema.org/{draft}/schema{end}"
    for draft, scheme, end in (
        *((f"draft-0{number}", "http", "#") for number in (4, 6, 7)),
        *((f"draft/{year}", "https", "") for year in ("2019-09", "2020-12")),
    )
}
_DRAFT_4: Final = _DRAFTS["json-schema.org/draft-04/schema"]
# What a pointer may have unquoted in the fragment of a URI.
_IN_FRAGMENT: Final = "/~!$&'()*+,;=:@-._"


def inner(schema: Node) -> Iterator[tuple[Path, Any]]:
    """Yield what lies in a schema where a schema belongs, one level down, with the keys that lead there."""
    for key, value in schema.items():
        if key in _LIST and isinstance(value, list):
            for i, item in enumerate(value):
                yield (key, i), item
        elif key in _ONE:
            yield (key,), value
        elif key in _MAP and isinstance(value, dict):
            for name, item in value.items():
                yield (key, name), item


class Document:
    """One schema with all that belongs to it.

    Args:
        schema: is copied.
        name: of the field that it came from, for errors.

    Attributes:
        root: the copy.
        nodes: every object in it that is a schema, the root first.

    Raises:
        InvalidRequest: a reference leads out of it, or to nothing.
    """

    def __init__(self, schema: Node, name: str) -> None:
        self.root: Node = copied(schema)
        self.nodes: list[Node] = []
        self._name = name
        self._bases: dict[int, str] = {}
        self._resources: dict[str, Path] = {}
        self._anchors: dict[tuple[str, str], Path] = {}
        self._dynamic: dict[str, int] = {}
        self._num_recursive = 0
        self._id = "id" if _draft(self.root) == _DRAFT_4 else "$id"
        self._resources[_NOWHERE] = ()
        self._enter(self.root, (), _NOWHERE)
        self._targets = self._resolved()

    def close(self) -> None:
        """Let no object have properties that its schema does not name, unless it says so itself."""
        for node in self.nodes:
            if any(isinstance(node.get(key), dict) for key in ("properties", "patternProperties")):
                node.setdefault("additionalProperties", False)

    def keep_reached(self) -> None:
        """Put what references lead to where they still find it, after keywords were taken out; before `moved`."""
        homes: dict[int, Path] = {}
        for place, (node, key, path, found) in enumerate(self._targets):
            if self._at(path) is found:
                continue
            home = homes.get(id(found))
            if home is None:
                definitions = self.root.setdefault("$defs", {})
                if not isinstance(definitions, dict):
                    continue  # the library says what is wrong
                name = next(name for i in count(len(definitions)) if (name := f"reached_{i}") not in definitions)
                definitions[name] = found
                home = homes[id(found)] = ("$defs", name)
            self._targets[place] = (node, key, home, found)

    def moved(self, home: str = "#") -> Node:
        """Return the root as it reads where it stands at a JSON pointer of another root; called once.

        Raises:
            InvalidRequest: references take more than `MAX_GRAMMAR_BYTES`.
        """
        num_bytes = 0
        for node, key, path, _ in self._targets:
            node.pop(key, None)
            target = {"$ref": home + _fragment(path)}
            num_bytes += len(target["$ref"])
            if num_bytes > MAX_GRAMMAR_BYTES:
                raise InvalidRequest(f"{self._name}: its references are too long", self._name)
            if "$ref" in node:
                others = node.get("allOf")
                node["allOf"] = [*(others if isinstance(others, list) else ()), target]
            else:
                node.update(target)
        for node in self.nodes:
            for key in {*_NAMES, self._id} & node.keys():
                del node[key]
            if "$schema" in node:
                draft = _draft(node)
                # Of a dialect that nobody here knows the words are taken as everybody means them.
                node.update({"$schema": draft}) if draft else node.pop("$schema")
        return self.root

    def _enter(self, schema: Node, path: Path, base: str) -> None:
        """Take in a schema and all below it."""
        waiting: list[tuple[Any, Path, str]] = [(schema, path, base)]
        for value, at, base in waiting:  # it grows while it is read
            if not isinstance(value, dict) or id(value) in self._bases:
                continue
            base = self._named(value, at, base)
            self.nodes.append(value)
            self._bases[id(value)] = base
            waiting.extend((found, at + keys, base) for keys, found in inner(value))

    def _named(self, node: Node, path: Path, base: str) -> str:
        """Take in what a schema calls itself; return the base URI that holds in it."""
        own = node.get(self._id)
        if isinstance(own, str):
            base, anchor = self._joined(base, own)
            self._resources.setdefault(base, path)
            if anchor:
                self._anchors.setdefault((base, anchor), path)
        for key in ("$anchor", "$dynamicAnchor"):
            if isinstance(node.get(key), str):
                self._anchors.setdefault((base, node[key]), path)
        if isinstance(dynamic := node.get("$dynamicAnchor"), str):
            self._dynamic[dynamic] = self._dynamic.get(dynamic, 0) + 1
        self._num_recursive += node.get("$recursiveAnchor") is True
        return base

    def _resolved(self) -> list[tuple[Node, str, Path, Any]]:
        """Return each reference, where it leads and what is there, which is taken in as a schema."""
        targets: list[tuple[Node, str, Path, Any]] = []
        for node in self.nodes:  # it grows while it is read
            for key in _REFERENCES:
                if key not in node:
                    continue
                reference = node[key]
                if not isinstance(reference, str):
                    raise InvalidRequest(f"{self._name}: {key} must be a string", self._name)
                path, base = self._target(key, reference, self._bases[id(node)])
                found = self._at(path)
                if found is _NOTHING:
                    raise self._nowhere(key, reference)
                targets.append((node, key, path, found))
                self._enter(found, path, base)
        return targets

    def _target(self, key: str, reference: str, base: str) -> tuple[Path, str]:
        uri, fragment = self._joined(base, reference)
        found = self._resources.get(uri)
        if found is None:
            raise InvalidRequest(f"{self._name}: {key} {reference[:200]!r}: other schemas are not fetched", self._name)
        fragment = unquote(fragment)
        self._check_dynamic(key, fragment)
        if fragment and not fragment.startswith("/"):
            found = self._anchors.get((uri, fragment))
            if found is None:
                raise self._nowhere(key, reference)
            return found, uri
        tokens = fragment.split("/")[1:]
        return (*found, *(token.replace("~1", "/").replace("~0", "~") for token in tokens)), uri

    def _joined(self, base: str, reference: str) -> tuple[str, str]:
        """Return the URI that a reference means, and its fragment."""
        try:
            uri, fragment = urldefrag(reference)
            return (urljoin(base, uri) if uri else base), fragment
        except ValueError as error:
            raise InvalidRequest(f"{self._name}: {reference[:200]!r} is no URI", self._name) from error

    def _check_dynamic(self, key: str, fragment: str) -> None:
        """Raise InvalidRequest where a reference means another schema each time; with one it could mean it is plain."""
        is_open = key == "$dynamicRef" and self._dynamic.get(fragment, 0) > 1
        if is_open or (key == "$recursiveRef" and self._num_recursive > 1):
            raise InvalidRequest(f"{self._name}: {key} with more than one anchor is not supported", self._name)

    def _at(self, path: Path) -> Any:
        value: Any = self.root
        for token in path:
            if isinstance(value, dict) and token in value:
                value = value[token]
            elif isinstance(value, list) and _index(token) in range(len(value)):
                value = value[_index(token)]
            else:
                return _NOTHING
        return value

    def _nowhere(self, key: str, reference: str) -> InvalidRequest:
        return InvalidRequest(f"{self._name}: {key} {reference[:200]!r} points to nothing in the schema", self._name)


def copied(value: Any) -> Any:
    """Return a copy of JSON, whose nesting has a bound."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def _draft(node: Node) -> str | None:
    """Return the dialect that a schema names, as it is spelt; None for one that is not known."""
    named = node.get("$schema")
    return _DRAFTS.get(named.partition("://")[2].rstrip("#")) if isinstance(named, str) else None


def _index(token: str | int) -> int:
    if isinstance(token, int):
        return token
    return int(token) if token.isascii() and token.isdigit() and len(token) < 10 else -1


def _fragment(path: Path) -> str:
    tokens = (str(token).replace("~", "~0").replace("/", "~1") for token in path)
    return "".join("/" + quote(token, safe=_IN_FRAGMENT, errors="replace") for token in tokens)
