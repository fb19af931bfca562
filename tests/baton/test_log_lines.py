"""Lines of the log: nobody but us begins one, whatever text it is made of."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import unicodedata
from types import TracebackType

import pytest

from baton.log_lines import LONG, OneLineFormatter, escaped

HOSTILE = (
    "x\n[router] 20:00:00 ERROR router.access: FORGED",
    "x\r\nFORGED",
    "x\x1b[2K\x1b[31mFORGED",
    "\x85FORGED",
    "\u2028FORGED\u2029FORGED",
    "\x0bFORGED\x0cFORGED",
    "\u202eDEGROF\u2066\u200f",
    "\x9b2KFORGED",
    "\x00\x07\x08\x7f",
    "\ud800FORGED",
    "\U000e0001\ufeff\u200b",
    "\tFORGED",
)


def line_of(message: str, *args: object, exc_info: object = None) -> str:
    record = logging.LogRecord("router.server", logging.INFO, "", 0, message, args, exc_info)  # type: ignore[arg-type]
    return OneLineFormatter(LONG).format(record)


def is_plain(text: str) -> bool:
    return not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn") for char in text)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_record_is_one_line_of_what_can_be_printed(text: str) -> None:
    line = line_of("stream %s: connection ended: %s", text, ValueError(text))
    assert is_plain(line) and len(line.splitlines()) == 1
    assert line_of(text).count("\n") == 0


def test_what_can_be_printed_is_left_as_it_is() -> None:
    for text in ("stream x: é \U0001f600 日本 'a' \\n", ""):
        assert escaped(text) == text


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_is_escaped_in_a_line_of_json_is_still_json(text: str) -> None:
    given = json.dumps({"id": text}, ensure_ascii=False)
    assert json.loads(escaped(given)) == {"id": text}


def raised(text: str) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    try:
        try:
            raise KeyError(text)
        except KeyError as error:
            error.add_note(f"note {text}")
            raise ValueError(text) from error
    except ValueError as error:
        return type(error), error, error.__traceback__


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_traceback_keeps_its_lines_and_nobody_elses(text: str) -> None:
    lines = line_of("failed", exc_info=raised(text)).split("\n")
    assert all(is_plain(line) for line in lines)
    assert lines.count("Traceback (most recent call last):") == 2
    assert sum(line.startswith("ValueError: ") for line in lines) == 1
    assert not any(line.lstrip().startswith(("FORGED", "[router]")) for line in lines)
    assert "    raise ValueError(text) from error" in [line.replace("        ", "    ") for line in lines]


def test_a_filename_of_a_syntax_error_begins_no_line() -> None:
    try:
        compile("(", "x\nFORGED", "exec")
    except SyntaxError as error:
        lines = line_of("failed", exc_info=(SyntaxError, error, error.__traceback__)).split("\n")
    assert not any(line.startswith("FORGED") for line in lines)


@pytest.mark.parametrize("start", ["from baton.cli import main; main(['router', 'X'])", "batch"])
def test_every_command_logs_that_way(start: str, tmp_path: object) -> None:
    code = (
        "import logging\nfrom baton import cli, batch_cli, config\n"
        "def stop(*_): logging.getLogger('x').warning('a\\n%s', 'b\\x1b'); raise SystemExit(0)\n"
        "config.resolve_model = stop\nbatch_cli._plan = stop\n"
        + ("batch_cli.main(['in', 'out'])" if start == "batch" else "cli.main(['router', 'X'])")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "x: a\\nb\\u001b\n" in done.stderr and "\x1b" not in done.stderr
