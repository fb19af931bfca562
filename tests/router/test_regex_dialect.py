r"""Regular expressions: `\d`, `\w`, `\s` and case are ASCII, in a client's pattern and in a schema's."""

from __future__ import annotations

import json
import random
import re

import pytest

from protocol.errors import GrammarError
from protocol.request import Grammar, GrammarKind
from router.regex_dialect import ascii_regex, ecma_regex
from tests.router.guided import Guide

ARABIC, KELVIN, WIDE, LONG_S = "\u0663", "\u212a", "\u3000", "\u017f"


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Guide:
    """The small vocabulary."""
    return Guide(tmp_path_factory.mktemp("guide"))


# pattern, what matches it, what does not
CASES: list[tuple[str, list[str], list[str]]] = [
    (r"\d{3}-\d{4}", ["123-1234"], ["🯸🯸🯸-1234", f"{ARABIC * 3}-1234"]),
    (r"\w+", ["aZ_9"], ["é", "ж", ARABIC]),
    (r"a\sb", ["a b", "a\tb"], [f"a{WIDE}b", "a\u00a0b"]),
    (r"\D", ["a", ARABIC, "é"], ["1"]),
    (r"\W", ["-", "é"], ["a", "_"]),
    (r"\S", ["a", WIDE], [" ", "\n"]),
    (r"[\d\-x]+", ["1-x"], [ARABIC, "y"]),
    (r"[^\d]", ["a", ARABIC], ["1"]),
    (r"[^\D]", ["1"], ["a", ARABIC]),
    (r"[\D\d]", ["1", ARABIC], []),
    (r"[^\w\s]", ["-", "é"], ["a", " "]),
    (r"[\w--\d]", ["a"], ["1", ARABIC]),
    (r"[\w&&[^\d]]", ["a"], ["1", "é"]),
    (r"[]\d]", ["]", "1"], [ARABIC]),
    (r"[\d-z]", ["1", "-", "z"], [ARABIC, "a"]),
    (r"[[:alpha:]\d]", ["a", "1"], ["é", ARABIC]),
    (r"[[:^alpha:]]", ["é", "1"], ["a"]),
    (r"\p{L}\pN", ["é" + ARABIC, "a1"], ["1a"]),
    (r"(?i)sky", ["sky", "SKY", "sKy"], [f"{LONG_S}ky", f"s{KELVIN}y"]),
    (r"(?i)[a-m]", ["k", "K"], [KELVIN, "n", "N"]),
    (r"(?i)[^k]", ["a", KELVIN], ["k", "K"]),
    (r"(?i)\x6b[\x6b]", ["kK"], [KELVIN + "k"]),
    (r"(?i:k)k", ["Kk"], ["KK", KELVIN + "k"]),
    (r"(?i)a(?-i)b", ["Ab"], ["AB"]),
    (r"(?i)é", ["é"], ["É"]),
    (r"(?u)\d+", ["1", ARABIC], ["a"]),
    (r"(?u:\w)\w", ["éa"], ["aé"]),
    (r"(?iu)k", ["k", "K", KELVIN], ["x"]),
    (r"(?u)\d(?-u)\d", [ARABIC + "1"], [ARABIC * 2]),
    (r"(?-u)\d", ["1"], [ARABIC]),
    (r"(?u)[\d]", [ARABIC], ["a"]),
    ("(?x) a \\d # [c\n b", ["a1b"], ["a b"]),
    ("(?x) [a b # c]\n d] \\  +", ["a ", "d  "], ["c ", "  "]),
    (r"(?P<year>\d{4})(?<m>\d)", ["20261"], [ARABIC * 5]),
    (r"(a|\d)(?s:.)", ["1\n", "ax"], [ARABIC + "x"]),
    (r"\\d\.\[\d\]", ["\\d.[1]"], ["1.[1]"]),
    (r"[.*+?^$|()#&~-]+", [".*+?^$|()#&~-"], ["a"]),
    (r"[a-c\x64-f]", ["b", "e"], ["g", "-"]),
]


@pytest.mark.parametrize(("pattern", "good", "bad"), CASES)
def test_classes_and_case_are_ascii(guide: Guide, pattern: str, good: list[str], bad: list[str]) -> None:
    assert guide.by_regex(pattern, *good, *bad) == good


LARK: list[tuple[str, list[str], list[str]]] = [
    (r"start: /\d+/", ["1"], [ARABIC]),
    ('start: D "/d/" // a /w/ here\nD: /\\w\\//  # and /w/', ["a//d/"], ["é//d/"]),
    (r"start: /k[\d\/]/i", ["K1", "k/"], [KELVIN + "1", "k" + ARABIC]),
    (r"start: /\d/u", [ARABIC], ["a"]),
    (r'start: "\\d" | "é"i', [r"\d", "é"], ["1"]),
    (r"root ::= [0-9]+ | [a-c]", ["12", "b"], [ARABIC, "d"]),
]


@pytest.mark.parametrize(("text", "good", "bad"), LARK)
def test_so_are_those_in_a_grammar(guide: Guide, text: str, good: list[str], bad: list[str]) -> None:
    assert guide.accepted(Grammar(kind=GrammarKind.LARK, text=text), *good, *bad) == good


def test_so_is_what_stands_between_tokens_of_json(guide: Guide) -> None:
    texts = ["[ 1]", "[\t1]", f"[{WIDE}1]"]
    assert guide.by_schema({"type": "array"}, *texts, whitespace_pattern=r"\s*") == texts[:2]


# pattern of a schema, what matches it, what does not
ECMA: list[tuple[str, list[str], list[str]]] = [
    (r"^\d+$", ["1"], [ARABIC]),
    (r"^\w$", ["a"], ["é"]),
    (r"^\s$", [" "], [WIDE, "\ufeff"]),
    (r"^\S$", ["a", "é"], [" ", WIDE, "\ufeff", "\u00a0"]),
    (r"^[^\s]$", ["a"], [" ", WIDE]),
    (r"^[^\S]$", [" "], ["a", WIDE]),
    (r"^\W$", ["-", "é"], ["a"]),
    (r"\d$", ["x1"], ["1x", ARABIC]),
    (r"^a|b$", ["ax", "xb"], ["xa"]),
    (r"^.$", ["a", "é"], ["\n", "\r", "\u2028"]),
    (r"^[\b]$", ["\b"], ["b"]),
    (r"^[a&&b[]+$", ["a&b["], ["c"]),
    (r"^[^]$", ["a", "\n"], ["ab"]),
    (r"^\cJ\0$", ["\n\0"], ["J0"]),
    (r"^\/\-\_\u0041$", ["/-_A"], ["A"]),
    (r"^[\w.+-]+@[\w-]+\.\w{2,}$", ["a.b+c@d-e.org"], ["é@d.org", "a@d"]),
    (r"^(?:\+\d{1,3})?[-. ]?\d$", ["+49 5", "5"], [f"+{ARABIC} 5"]),
]


@pytest.mark.parametrize(("pattern", "good", "bad"), ECMA)
def test_patterns_of_schemas_are_ecmas(guide: Guide, pattern: str, good: list[str], bad: list[str]) -> None:
    told = [json.dumps(text, ensure_ascii=False) for text in good + bad]
    assert guide.by_schema({"type": "string", "pattern": pattern}, *told) == told[: len(good)]


@pytest.mark.parametrize("pattern", [r"\bab\b", r"a\B", r"(?=a)a", r"(a)\1", "(", "[a", "a{2", "(?", "(?i", "(?zz)a"])
def test_what_the_library_does_not_know_stays_so(guide: Guide, pattern: str) -> None:
    with pytest.raises(GrammarError):
        guide.by_regex(pattern, "a")
    with pytest.raises(GrammarError):
        guide.by_schema({"type": "string", "pattern": pattern}, '"a"')


def test_no_pattern_ends_the_translation() -> None:
    dice, marks = random.Random(5), r"\dDwWsSbu{}[]()^$-&~|?*+.:iPx#<>=!,0149 azKé" + "\n"
    for _ in range(3000):
        pattern = "".join(dice.choice(marks) for _ in range(dice.randint(1, 12)))
        assert isinstance(ascii_regex(pattern), str) and isinstance(ecma_regex(pattern), str)


def test_plain_patterns_mean_what_they_mean_to_python(guide: Guide) -> None:
    dice = random.Random(6)
    pieces = [r"\d", r"\w", r"\s", r"\D", r"[\da]", r"[^\w-]", "a", "B", "[a-c]", r"\.", "(?:a|1)", "[^x]"]
    texts = ["".join(dice.choice("aB1 .-x\té" + ARABIC) for _ in range(dice.randint(1, 3))) for _ in range(60)]
    for flags in ("", "(?i)"):
        for _ in range(15):
            pattern = "".join(dice.choice(pieces) + dice.choice(["", "?", "+", "{1,2}"]) for _ in range(2))
            expected = [text for text in texts if re.fullmatch(flags + pattern, text, re.ASCII)]
            assert guide.by_regex(flags + pattern, *texts) == expected, flags + pattern
