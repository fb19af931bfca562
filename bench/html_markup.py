"""HTML and SVG as text, escaped by construction: only `Markup` goes in as it is, every other string is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

# Control characters, lone surrogates and marks that turn the direction of writing: nothing a report should act on.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
_VOID = frozenset({"meta", "br"})

Attribute = str | float | int | None


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(words: str, max_chars: int = 4000) -> Markup:
    """Return words escaped, unshowable characters replaced, and cut to a length."""
    shown = words if len(words) <= max_chars else words[: max_chars - 1] + "…"
    return Markup(escape(_UNSHOWABLE.sub("\ufffd", shown)))


def element(tag: str, /, *children: str, **attributes: Attribute) -> Markup:
    """Return one element; a child that is not Markup is escaped.

    Args:
        tag: its name.
        children: what stands inside.
        attributes: `class_` stands for class, `stroke_width` for stroke-width; None leaves an attribute out.
    """
    opening = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{value if isinstance(value, Markup) else text(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{tag}{opening}>")
    inside = "".join(child if isinstance(child, Markup) else text(child) for child in children)
    return Markup(f"<{tag}{opening}>{inside}</{tag}>")


def join(parts: Iterable[str], separator: str = "") -> Markup:
    """Return parts one after the other; those that are not Markup are escaped."""
    return Markup(separator.join(part if isinstance(part, Markup) else text(part) for part in parts))


def rows(cells: Iterable[Iterable[str]], *, head: bool = False) -> Markup:
    """Return table rows; a cell that is a `td` or `th` already stays, others are wrapped."""
    wrapped = (
        element("tr", *(cell if _is_cell(cell) else element("th" if head else "td", cell) for cell in row))
        for row in cells
    )
    return join(wrapped, "\n")


def table(head: Iterable[Iterable[str]], body: Iterable[Iterable[str]], class_: str | None = None) -> Markup:
    """Return a table that scrolls sideways where the page is narrow."""
    inner = element("table", element("thead", rows(head, head=True)), element("tbody", rows(body)), class_=class_)
    return element("div", inner, class_="scroll")


def details(summary: str, *children: str) -> Markup:
    """Return a part that is folded until somebody opens it."""
    return element("details", element("summary", summary), *children)


def _is_cell(cell: str) -> bool:
    return isinstance(cell, Markup) and cell.startswith(("<td", "<th"))


def _plain(value: str | float | int) -> str:
    # Two decimals of a pixel are more than any screen shows.
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
