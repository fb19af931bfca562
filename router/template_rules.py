"""Which chat templates are plain: what they cost grows with the conversation and no faster, whatever it says.

A template comes with a model, from anybody. Rendering a plain one here is safe: it copies each part of a conversation a
few times at most. Any other is rendered by a process that may die of it (`router/template_child.py`).

Each value has a size, at most `weight` times what it was taken from, and a level: the depth of the loop whose variable
that is, 0 for all that comes from outside of loops. Work on a whole value ("touching" it) is allowed in its own loop
only: done in a deeper one, it would be done again and again. Weights are bounded, so that no chain of assignments grows
a value beyond measure; so are kinds of nodes, filters, tests and methods, and what is not known here is not plain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from jinja2 import nodes

MAX_SOURCE_CHARS: Final = 64 << 10
MAX_WEIGHT: Final = 64
NO_LEVEL: Final = 1 << 30
_LOOP_NUMBERS: Final = frozenset({"index", "index0", "revindex", "revindex0", "first", "last", "length", "depth"})
_LOOP_NEIGHBOURS: Final = frozenset({"previtem", "nextitem"})
# By how much they may lengthen what they are given.
_FILTERS: Final = {
    "trim": 1, "upper": 3, "lower": 3, "title": 3, "capitalize": 3, "string": 8, "list": 16, "reverse": 1, "items": 4,
    "dictsort": 4, "first": 1, "last": 1, "tojson": 8, "safe": 1, "selectattr": 1, "rejectattr": 1, "default": 1,
    "int": 1, "float": 1, "abs": 1,
}  # fmt: skip
_METHODS: Final = {
    "strip": 1, "lstrip": 1, "rstrip": 1, "upper": 3, "lower": 3, "title": 3, "capitalize": 3, "startswith": 1,
    "endswith": 1, "split": 16, "rsplit": 16, "splitlines": 16, "items": 4, "keys": 1, "values": 1, "get": 1, "find": 1,
    "rfind": 1,
}  # fmt: skip
_TESTS: Final = frozenset(
    {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "boolean", "number", "integer",
     "float", "true", "false", "odd", "even"}
)  # fmt: skip
MAX_INDENT: Final = 8


class Size(NamedTuple):
    """How large a value may be, and in which loop it may be worked on."""

    weight: int
    level: int


_SMALL: Final = Size(1, NO_LEVEL)
_DATA: Final = Size(1, 0)


class _NotPlain(Exception):
    """Something of which the cost is not known."""


def is_plain(tree: nodes.Template, num_chars: int, small_names: frozenset[str]) -> bool:
    """Whether a template is plain.

    Args:
        tree: the parsed template.
        num_chars: of its source.
        small_names: of variables that are short, whatever the conversation.
    """
    if num_chars > MAX_SOURCE_CHARS:
        return False
    try:
        _Rules(small_names).body(tree.body, {}, 0)
    except (_NotPlain, RecursionError):
        return False
    return True


_Names = dict[str, Size | None]
"""Variables that the template has set; None stands for a namespace."""


class _Rules:
    def __init__(self, small_names: frozenset[str]) -> None:
        self._small_names = small_names
        self._rules: dict[type[nodes.Node], Callable[[Any, _Names, int], Size]] = {
            nodes.Const: self._constant,
            nodes.Name: self._name,
            nodes.Getattr: self._attribute,
            nodes.Getitem: self._item,
            nodes.Add: self._sum,
            nodes.Concat: self._sum,
            nodes.Compare: self._compare,
            nodes.Not: self._negation,
            nodes.And: self._either,
            nodes.Or: self._either,
            nodes.CondExpr: self._choice,
            nodes.Test: self._test,
            nodes.Filter: self._filter,
            nodes.Call: self._call,
            nodes.List: self._sequence,
            nodes.Tuple: self._sequence,
            nodes.Dict: self._mapping,
            **dict.fromkeys((nodes.Sub, nodes.Mod, nodes.Mul, nodes.Neg, nodes.Pos), self._number),
        }

    def body(self, body: list[nodes.Node], names: _Names, depth: int) -> None:
        for node in body:
            if isinstance(node, nodes.Output):
                for part in node.nodes:
                    if not isinstance(part, nodes.TemplateData):
                        self._touched(part, names, depth)
            elif isinstance(node, nodes.If):
                self._value(node.test, names, depth)
                for branch in (node.body, *(inner.body for inner in node.elif_), node.else_):
                    self.body(branch, names, depth)
                for inner in node.elif_:
                    self._value(inner.test, names, depth)
            elif isinstance(node, nodes.For):
                self._loop(node, names, depth)
            elif isinstance(node, nodes.Assign):
                self._assign(node, names, depth)
            elif not isinstance(node, nodes.Continue | nodes.Break):
                raise _NotPlain

    def _loop(self, node: nodes.For, names: _Names, depth: int) -> None:
        if node.recursive or depth >= 4:
            raise _NotPlain
        self._touched(node.iter, names, depth)
        inner = dict(names)
        for target in node.target.find_all(nodes.Name) if not isinstance(node.target, nodes.Name) else [node.target]:
            inner[target.name] = Size(1, depth + 1)
        if node.test is not None:
            self._value(node.test, inner, depth + 1)
        self.body(node.body, inner, depth + 1)
        self.body(node.else_, dict(names), depth)

    def _assign(self, node: nodes.Assign, names: _Names, depth: int) -> None:
        if isinstance(node.target, nodes.NSRef):
            # It lives on from one turn of a loop to the next, and must not grow there.
            if not self._is_steady(node.node):
                raise _NotPlain
            self._value(node.node, names, depth)
            return
        if not isinstance(node.target, nodes.Name):
            raise _NotPlain
        name = node.target.name
        if depth == 0 and (given := _of_namespace(node.node)) is not None:
            if any(self._value(value, names, depth).level != NO_LEVEL for value in given):
                raise _NotPlain
            names[name] = None
            return
        found, before = self._value(node.node, names, depth), names.get(name, _SMALL)
        if before is None:
            raise _NotPlain
        # The other branch of an `if` may have left what was there.
        names[name] = _sized(max(found.weight, before.weight), min(found.level, before.level))

    def _is_steady(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Add | nodes.Sub):
            sides = (node.left, node.right)
            return any(isinstance(side, nodes.Const) and isinstance(side.value, int) for side in sides)
        return isinstance(node, nodes.Const | nodes.Compare | nodes.Not | nodes.Test) or _is_number(node)

    def _touched(self, node: nodes.Node, names: _Names, depth: int) -> Size:
        """Return the size of a value that is worked on as a whole."""
        found = self._value(node, names, depth)
        if found.level < depth:
            raise _NotPlain
        return found

    def _value(self, node: nodes.Node, names: _Names, depth: int) -> Size:
        """Return the size of a value that is only referred to."""
        rule = self._rules.get(type(node))
        if rule is None:
            raise _NotPlain
        return rule(node, names, depth)

    def _constant(self, node: nodes.Const, names: _Names, depth: int) -> Size:
        return _SMALL

    def _sum(self, node: nodes.Add | nodes.Concat, names: _Names, depth: int) -> Size:
        parts = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
        return _joined([self._touched(part, names, depth) for part in parts])

    def _negation(self, node: nodes.Not, names: _Names, depth: int) -> Size:
        self._value(node.node, names, depth)
        return _SMALL

    def _either(self, node: nodes.And | nodes.Or, names: _Names, depth: int) -> Size:
        return _joined([self._value(node.left, names, depth), self._value(node.right, names, depth)])

    def _choice(self, node: nodes.CondExpr, names: _Names, depth: int) -> Size:
        self._value(node.test, names, depth)
        sides = [node.expr1] if node.expr2 is None else [node.expr1, node.expr2]
        return _joined([self._value(side, names, depth) for side in sides])

    def _sequence(self, node: nodes.List | nodes.Tuple, names: _Names, depth: int) -> Size:
        return _joined([_SMALL, *(self._value(item, names, depth) for item in node.items)])

    def _mapping(self, node: nodes.Dict, names: _Names, depth: int) -> Size:
        parts = [part for pair in node.items for part in (pair.key, pair.value)]
        return _joined([_SMALL, *(self._value(part, names, depth) for part in parts)])

    def _name(self, node: nodes.Name, names: _Names, depth: int) -> Size:
        name = node.name
        if name in names:
            found = names[name]
            return _SMALL if found is None else found
        if name == "loop":
            raise _NotPlain
        return _SMALL if name in self._small_names else _DATA

    def _attribute(self, node: nodes.Getattr, names: _Names, depth: int) -> Size:
        if isinstance(node.node, nodes.Name) and node.node.name == "loop" and "loop" not in names and depth:
            if node.attr in _LOOP_NUMBERS:
                return _SMALL
            if node.attr in _LOOP_NEIGHBOURS:
                return Size(1, depth)
            raise _NotPlain
        return self._value(node.node, names, depth)

    def _item(self, node: nodes.Getitem, names: _Names, depth: int) -> Size:
        if isinstance(node.arg, nodes.Slice):
            for bound in (node.arg.start, node.arg.stop, node.arg.step):
                if bound is not None:
                    self._value(bound, names, depth)
            return self._touched(node.node, names, depth)
        self._value(node.arg, names, depth)
        return self._value(node.node, names, depth)

    def _number(self, node: nodes.Node, names: _Names, depth: int) -> Size:
        for part in node.iter_child_nodes():
            self._touched(part, names, depth)
        # Of text, the first two would be a format and a repetition.
        if isinstance(node, nodes.Mod | nodes.Mul) and not _is_number(node):
            raise _NotPlain
        return _SMALL

    def _compare(self, node: nodes.Compare, names: _Names, depth: int) -> Size:
        left, is_small = node.expr, False
        for operand in node.ops:
            sizes = [self._value(side, names, depth) for side in (left, operand.expr)]
            is_small = any(size.level == NO_LEVEL for size in sizes)
            if operand.op in ("in", "notin") or not is_small:
                self._touched(left, names, depth)
                self._touched(operand.expr, names, depth)
            left = operand.expr
        return _SMALL

    def _test(self, node: nodes.Test, names: _Names, depth: int) -> Size:
        if node.name not in _TESTS or node.args or node.kwargs or node.dyn_args or node.dyn_kwargs:
            raise _NotPlain
        self._value(node.node, names, depth)
        return _SMALL

    def _filter(self, node: nodes.Filter, names: _Names, depth: int) -> Size:
        if node.node is None or node.dyn_args or node.dyn_kwargs:
            raise _NotPlain
        if node.name in ("length", "count") and not node.args and not node.kwargs:
            self._value(node.node, names, depth)
            return _SMALL
        growth = _FILTERS.get(node.name)
        if growth is None:
            raise _NotPlain
        if node.name == "tojson" and not all(_is_modest(given.value) for given in node.kwargs):
            raise _NotPlain
        if node.name not in ("default", "tojson") and node.kwargs or node.name == "tojson" and node.args:
            raise _NotPlain
        if node.name in ("selectattr", "rejectattr") and not all(isinstance(arg, nodes.Const) for arg in node.args):
            raise _NotPlain
        others = [self._touched(given, names, depth) for given in node.args]
        others += [self._touched(given.value, names, depth) for given in node.kwargs]
        found = _joined([self._touched(node.node, names, depth), *others])
        return _sized(growth * found.weight, found.level)

    def _call(self, node: nodes.Call, names: _Names, depth: int) -> Size:
        if node.kwargs or node.dyn_args or node.dyn_kwargs:
            raise _NotPlain
        if isinstance(node.node, nodes.Name) and node.node.name not in names:
            if node.node.name == "raise_exception" and len(node.args) == 1:
                return self._touched(node.args[0], names, depth)
            if node.node.name == "strftime_now" and len(node.args) == 1 and _is_date(node.args[0]):
                return _SMALL
            raise _NotPlain
        if not isinstance(node.node, nodes.Getattr) or (growth := _METHODS.get(node.node.attr)) is None:
            raise _NotPlain
        if node.node.attr == "get":
            return _joined([self._value(part, names, depth) for part in (node.node.node, *node.args)])
        found = _joined([self._touched(part, names, depth) for part in (node.node.node, *node.args)])
        return _sized(growth * found.weight, found.level)


def _of_namespace(node: nodes.Node) -> list[nodes.Expr] | None:
    """Return what a call of `namespace` begins with; None if it is no such call."""
    if not isinstance(node, nodes.Call) or not isinstance(node.node, nodes.Name) or node.node.name != "namespace":
        return None
    has_others = node.args or node.dyn_args or node.dyn_kwargs
    return None if has_others else [given.value for given in node.kwargs]


def _joined(sizes: list[Size]) -> Size:
    return _sized(sum(size.weight for size in sizes), min(size.level for size in sizes))


def _sized(weight: int, level: int) -> Size:
    if weight > MAX_WEIGHT:
        raise _NotPlain
    return Size(weight, level)


def _is_number(node: nodes.Node) -> bool:
    """Whether it is a number that no turn of a loop makes longer."""
    if isinstance(node, nodes.Const):
        return isinstance(node.value, int | float)
    if isinstance(node, nodes.Filter):
        return node.name in ("length", "count")
    if isinstance(node, nodes.Getattr):
        return isinstance(node.node, nodes.Name) and node.node.name == "loop" and node.attr in _LOOP_NUMBERS
    if isinstance(node, nodes.Add | nodes.Sub | nodes.Mul | nodes.Mod):
        return _is_number(node.left) and _is_number(node.right)
    return isinstance(node, nodes.Neg | nodes.Pos) and _is_number(node.node)


def _is_modest(node: nodes.Node) -> bool:
    """Whether it is an option of `tojson` that lengthens nothing much."""
    return isinstance(node, nodes.Const) and (
        node.value in (None, True, False) or isinstance(node.value, int) and 0 <= node.value <= MAX_INDENT
    )


def _is_date(node: nodes.Node) -> bool:
    """Whether it is a form of a date without widths, which may be as wide as memory."""
    return (
        isinstance(node, nodes.Const) and isinstance(node.value, str) and not any(char.isdigit() for char in node.value)
    )
