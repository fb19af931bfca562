r"""Regular expressions as llguidance takes them: Rust's syntax, in which `\d` is a digit of any script.

    read      a pattern of a client      \d \w \s, case: ASCII, unless it says (?u)
    read      `pattern` of a schema      the same; what ECMA 262 writes in another way is written Rust's
    written   Rust's                     the classes by their members, the letters in both cases

1. One pass over the text, with a stack of the flags that hold in each group; nothing of a pattern is understood beyond
   that, so that what is broken stays so, and the library says why.
2. Flags `i`, `u` and `x` never come out: each letter and class is written as they make it, white space that stands for
   nothing is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

_DIGITS: Final = "0-9"
_WORD: Final = "0-9A-Za-z_"
_SPACE: Final = r"\t\n\x0b\x0c\r\x20"
# All that ECMA 262 calls white space: `\S` of a schema is none of it, `\s` is only the ASCII of it.
_ANY_SPACE: Final = _SPACE + r"\u{a0}\u{1680}\u{2000}-\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}\u{feff}"
_LINE_ENDS: Final = r"\n\r\u{2028}\u{2029}"
_GROUP_HEAD: Final = re.compile(r"\?(?:P?<[^>]*>|(?P<flags>[a-zA-Z]*(?:-[a-zA-Z]*)?)(?P<end>[:)]))")
_ESCAPE: Final = re.compile(
    r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[xuU]\{[0-9A-Fa-f]+\}|[pP](?:\{[^}]*\}|.)|b\{[^}]*\}|c[A-Za-z]|.)",
    re.DOTALL,
)
_BLANK: Final = re.compile(r"(?:\s|#[^\n]*)+")
# Of a grammar in Lark: strings, special tokens, comments, and what this is about.
_LARK: Final = re.compile(
    r'"(?:\\.|[^"\\\n])*"i?|<[^<>\n]*>|(?://|\#)[^\n]*|/(?P<regex>(?:\\.|[^/\\\n])+)/(?P<flags>[a-z]*)'
)
_POSIX: Final = re.compile(r"\[:\^?[a-z]+:\]")


@dataclass(frozen=True, slots=True)
class _Flags:
    """What holds at a place: `i` ignores case, `u` takes every script, `x` skips white space and comments."""

    i: bool = False
    u: bool = False
    x: bool = False


_PLAIN: Final = _Flags()


def ascii_regex(pattern: str) -> str:
    """Return a client's regular expression as the library is to read it."""
    return _Writer(pattern, is_ecma=False).written()


def ecma_regex(pattern: str) -> str:
    """Return the `pattern` of a schema as the library is to read it."""
    return _Writer(pattern, is_ecma=True).written()


def ascii_lark(text: str) -> str:
    """Return a grammar in Lark whose regular expressions the library is to read as `ascii_regex` has them."""

    def told(found: re.Match[str]) -> str:
        pattern, flags = found["regex"], found["flags"]
        if pattern is None or "u" in flags:
            return found[0]
        writer = _Writer(pattern, is_ecma=False, flags=_Flags(i="i" in flags))
        return f"/{writer.written()}/{flags.replace('i', '')}"

    return _LARK.sub(told, text)


class _Writer:
    def __init__(self, text: str, is_ecma: bool, flags: _Flags = _PLAIN) -> None:
        self._text = text
        self._is_ecma = is_ecma
        self._at = 0
        self._out: list[str] = []
        self._stack: list[_Flags] = []
        self._flags = flags

    def written(self) -> str:
        """Return the whole pattern."""
        while self._at < len(self._text):
            self._out.append(self._next())
        return "".join(self._out)

    def _next(self) -> str:
        char = self._text[self._at]
        if char == "(":
            return self._group()
        if char == ")":
            self._flags = self._stack.pop() if self._stack else self._flags
        elif char == "[":
            return self._cased(self._class(is_inverted=False))
        elif char == "\\":
            return self._escape()
        elif self._flags.x and self._has_blank():
            return ""
        self._at += 1
        if char == "." and self._is_ecma:
            return f"[^{_LINE_ENDS}]"
        return self._letter(char)

    def _has_blank(self) -> bool:
        """Take white space and comments; return whether there was any."""
        found = _BLANK.match(self._text, self._at)
        self._at = self._at if found is None else found.end()
        return found is not None

    # --- groups ---

    def _group(self) -> str:
        head = _GROUP_HEAD.match(self._text, self._at + 1)
        if head is None or head["flags"] is None:
            self._stack.append(self._flags)
            end = self._at + 1 if head is None else head.end()
            self._at, begun = end, self._text[self._at : end]
            return begun
        self._at = head.end()
        if head["end"] == ":":
            self._stack.append(self._flags)
        rest = self._set(head["flags"])
        if head["end"] == ")" and not rest:
            return ""
        return f"(?{rest}{head['end']}"

    def _set(self, flags: str) -> str:
        """Take the flags of a group; return those that the library is told."""
        on, _, off = flags.partition("-")
        for letters, value in ((on, True), (off, False)):
            for letter in set(letters) & {"i", "u", "x"}:
                self._flags = replace(self._flags, **{letter: value})
        kept_on, kept_off = (letters.translate(dict.fromkeys(map(ord, "iux"))) for letters in (on, off))
        return f"{kept_on}-{kept_off}" if kept_off else kept_on

    # --- atoms ---

    def _cased(self, atom: str) -> str:
        return f"(?i:{atom})" if self._flags.i and self._flags.u else atom

    def _letter(self, char: str) -> str:
        if not (self._flags.i and char.isalpha()):
            return char
        return self._cased(char) if self._flags.u else _both_cases(char)

    def _escape(self) -> str:
        found = _ESCAPE.match(self._text, self._at)
        if found is None:
            self._at += 1
            return "\\"
        self._at, escape = found.end(), found[0]
        members = None if self._flags.u else _members(escape, self._is_ecma, is_inverted=False)
        if members is not None:
            return f"[{members}]"
        escape = self._plain(escape)
        letter = _letter_of(escape)
        return escape if letter is None else self._letter(letter)

    def _plain(self, escape: str) -> str:
        r"""Return an escape as Rust has it: \cJ, \0 and an escaped letter that means itself are ECMA's."""
        if not self._is_ecma:
            return escape
        if len(escape) == 3 and escape[1] == "c":
            return f"\\x{ord(escape[2]) % 32:02x}"
        if escape == "\\0":
            return r"\x00"
        return escape

    # --- classes ---

    def _class(self, is_inverted: bool) -> str:
        """Return the class that begins here; `is_inverted`: what it has is what the classes around it do not."""
        start = self._at
        self._at += 1
        out, is_inverted = ["["], is_inverted ^ self._text.startswith("^", self._at)
        if self._text.startswith("^", self._at):
            out.append("^")
            self._at += 1
        if self._text.startswith("]", self._at) and not self._is_ecma:
            out.append("]")
            self._at += 1
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "]":
                self._at += 1
                return self._closed(out, start)
            out.append(self._member(char, is_inverted))
        return "".join(out)  # it is never closed: the library says so

    def _closed(self, out: list[str], start: int) -> str:
        if self._is_ecma and self._at - start == 2:
            return r"[^\x00-\u{10ffff}]"
        if self._is_ecma and self._text[start : self._at] == "[^]":
            return r"[\x00-\u{10ffff}]"
        return "".join(out) + "]"

    def _member(self, char: str, is_inverted: bool) -> str:
        if char == "[" and not self._is_ecma:
            posix = _POSIX.match(self._text, self._at)
            if posix is None:
                return self._class(is_inverted)
            self._at = posix.end()
            return posix[0]
        if self._flags.x and self._has_blank():
            return ""
        if self._text.startswith(("&&", "--", "~~"), self._at) and not self._is_ecma:
            self._at += 2
            return self._text[self._at - 2 : self._at]
        low = self._single(is_inverted)
        if len(low) != 1 or not re.match(r"-[^\]]", self._text[self._at : self._at + 2]):
            return self._several(low)
        if not self._is_ecma and self._text.startswith(("--", "-["), self._at):
            return self._several(low)
        before, self._at = self._at, self._at + 1
        high = self._single(is_inverted)
        if len(high) != 1:
            self._at = before
            return self._several(low)
        return self._range(low, high)

    def _single(self, is_inverted: bool) -> str:
        r"""Take one member of a class: return a character as itself, and what stands for more as it is written."""
        char = self._text[self._at]
        if char != "\\":
            self._at += 1
            return char
        found = _ESCAPE.match(self._text, self._at)
        if found is None:
            self._at += 1
            return "\\\\" if self._is_ecma else "\\ "
        self._at, escape = found.end(), found[0]
        members = None if self._flags.u else _members(escape, self._is_ecma, is_inverted)
        if members is not None:
            return f"[{members}]" if members.startswith("^") else members
        if self._is_ecma and escape == "\\b":
            return "\x08"
        escape = self._plain(escape)
        return _character_of(escape) or escape

    def _several(self, member: str) -> str:
        return member if len(member) != 1 else self._range(member, member)

    def _range(self, low: str, high: str) -> str:
        """Return a range of characters, in both cases where case is ignored."""
        told = _quoted(low) if low == high else f"{_quoted(low)}-{_quoted(high)}"
        if not self._flags.i or self._flags.u:
            return told
        for first, last, shift in (("a", "z", -32), ("A", "Z", 32)):
            begin, end = max(ord(low), ord(first)), min(ord(high), ord(last))
            if begin <= end:
                told += f"{chr(begin + shift)}-{chr(end + shift)}"
        return told


def _members(escape: str, is_ecma: bool, is_inverted: bool) -> str | None:
    r"""Return the members of \d, \w, \s and their opposites; None for any other escape."""
    spaces = _ANY_SPACE if is_ecma and (escape == "\\S") != is_inverted else _SPACE
    sets = {"d": _DIGITS, "w": _WORD, "s": spaces}
    found = sets.get(escape[1].lower()) if len(escape) == 2 else None
    return f"^{found}" if found and escape[1].isupper() else found


def _both_cases(char: str) -> str:
    return f"[{char.lower()}{char.upper()}]" if char.isascii() and char.isalpha() else char


def _character_of(escape: str) -> str | None:
    """Return the character that an escape writes by its number, or by a letter or mark of its own."""
    digits = re.fullmatch(r"\\[xuU]\{?([0-9A-Fa-f]+)\}?", escape)
    if digits is not None:
        number = int(digits[1], 16)
        return chr(number) if number <= 0x10FFFF and not 0xD800 <= number < 0xE000 else None
    if len(escape) != 2:
        return None
    named = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a"}
    if escape[1] in named:
        return named[escape[1]]
    return None if escape[1].isalnum() else escape[1]


def _letter_of(escape: str) -> str | None:
    char = _character_of(escape)
    return char if char is not None and char.isascii() and char.isalpha() else None


def _quoted(char: str) -> str:
    if char.isalnum() and char.isascii():
        return char
    return f"\\u{{{ord(char):x}}}" if char.isascii() or not char.isprintable() else char
