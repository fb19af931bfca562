"""The expendable process in which clients' grammars are compiled and tried: it may crash, hang or swell unharmed.

1. `main` reads the vocabulary, bounds the memory that it may take beyond that, and says that it is ready.
2. Each `Question` on stdin gets one `Verdict` on stdout, both as JSON behind a length of four bytes.
3. A question that takes long goes on at idle priority. One that takes more than its share of CPU time, however long
   that lasts on a busy machine, ends the process by a signal, in the middle of whatever it is at.
4. The end of stdin ends it: no router, no child.

A grammar is compiled, and then a few dozen tokens that it allows are taken at random: what would meet the library's
limits in the middle of an answer mostly meets them here. Some answers end early, and some never leave their first
string: further ones are begun that shun what closes and that hurry on, as long as that is cheap.
"""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec

from protocol.errors import BatonError, GrammarError
from protocol.request import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from router.regex_dialect import ascii_lark, ascii_regex
from router.schema_exact import exact_lark, exact_schema

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher
    from numpy.typing import NDArray

    from protocol.vocabulary import TokenBytes

    TokenIds = NDArray[np.intp]

MAX_MEMORY_BYTES: Final = 1 << 30
CHECK_CPU_S: Final = 2.0
NUM_PROBED_TOKENS: Final = 48
NUM_WALKS: Final = 4
# No answer but the first goes on once this much CPU time has gone.
MORE_WALKS_CPU_S: Final = 0.3
# What takes more CPU time than this has only what everybody else leaves of the machine from then on.
MODEST_CPU_S: Final = 0.05
LOOK_S: Final = 0.01
NICENESS: Final = 5
_LENGTH_BYTES: Final = 4


class Question(msgspec.Struct, frozen=True):
    """A grammar to be tried."""

    grammar: Grammar


MAX_FAULT_CHARS: Final = 4000
_U_ESCAPE: Final = re.compile(r"\\(?:u(?P<number>[0-9A-Fa-f]{4})|.)", re.DOTALL)


class Verdict(msgspec.Struct, frozen=True):
    """What became of a grammar: the text that workers compile, or what is wrong. The first says whether all is ready.

    Attributes:
        error: empty if it is good.
        is_ours: whether the error is a fault of ours, which says nothing of the grammar.
    """

    text: str = ""
    error: str = ""
    is_ours: bool = False


def write(file: BinaryIO, message: msgspec.Struct) -> None:
    """Write one message."""
    data = msgspec.json.encode(message)
    file.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
    file.flush()


def main(model_path: str) -> None:
    """Answer questions until stdin ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C and a terminal that closes are the router's to answer
        signal.signal(number, signal.SIG_IGN)
    reader, writer = sys.stdin.buffer, sys.stdout.buffer
    try:
        trial = Trial(Path(model_path))
    except BatonError as error:
        write(writer, Verdict(error=str(error)))
        return
    _bound_memory()
    write(writer, Verdict())
    while len(head := reader.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
        question = msgspec.json.decode(reader.read(int.from_bytes(head, "little")), type=Question)
        # By default SIGPROF kills, wherever the process is.
        signal.setitimer(signal.ITIMER_PROF, CHECK_CPU_S)
        verdict = _judged(trial, question.grammar)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write(writer, verdict)


def _judged(trial: Trial, grammar: Grammar) -> Verdict:
    """Return the verdict on a grammar: tried in a thread of its own, which gives up its priority if it takes long."""
    verdicts: list[Verdict] = []

    def judge() -> None:
        try:
            verdicts.append(Verdict(text=trial.text_of(grammar)))
        except GrammarError as error:
            verdicts.append(Verdict(error=str(error)))
        except MemoryError:
            raise  # it has reached the bound, and this process ends
        except Exception:  # noqa: BLE001  whatever it is, the next grammar is to find a child
            verdicts.append(Verdict(error=traceback.format_exc()[-MAX_FAULT_CHARS:], is_ours=True))

    thread = threading.Thread(target=judge)
    begin_s, is_idle = time.process_time(), False
    thread.start()
    while thread.is_alive():
        thread.join(None if is_idle else LOOK_S)
        if not is_idle and time.process_time() - begin_s > MODEST_CPU_S:
            is_idle = True
            assert thread.native_id is not None, "it is alive, so it has begun"
            with suppress(OSError):
                os.sched_setscheduler(thread.native_id, os.SCHED_IDLE, os.sched_param(0))
    assert verdicts, "what it raised ends this process"
    return verdicts[0]


def _bound_memory() -> None:
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = num_pages * resource.getpagesize() + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Trial:
    """Compiles grammars for one model. Raises ConfigError or GrammarError where its vocabulary cannot be used."""

    def __init__(self, model_path: Path) -> None:
        # Here, and not above, since the router imports this file for its messages.
        from protocol.guidance import open_tokenizer
        from protocol.vocabulary import TokenBytes

        vocabulary = TokenBytes.of_model(model_path)
        self._vocab_size = len(vocabulary.tokens)
        self._tokenizer = open_tokenizer(vocabulary, self._vocab_size)
        self._walker = _Walker(vocabulary)

    def text_of(self, grammar: Grammar) -> str:
        """Return the text by which workers compile a grammar. Raises GrammarError with what is wrong."""
        from protocol.guidance import compile_matcher

        grammar = msgspec.structs.replace(grammar, text=_held(grammar))
        start = compile_matcher(self._tokenizer, grammar, is_trial=True)
        end_s = time.thread_time() + MORE_WALKS_CPU_S
        for number in range(NUM_WALKS):
            if number > 0 and time.thread_time() >= end_s:
                break
            self._walker.walk(start.deep_copy(), number, end_s)
        return grammar.text


class _Walker:
    """Takes answers at random, each with dice and a taste of its own."""

    def __init__(self, vocabulary: TokenBytes) -> None:
        import numpy as np

        self._vocab_size = len(vocabulary.tokens)
        self._words = np.zeros(-(-self._vocab_size // 32), np.int32)
        self._is_text = np.ones(self._vocab_size, bool)
        self._is_text[list(vocabulary.eos_token_ids)] = False
        self._is_open = np.array([not set(b"}])") & set(token) for token in vocabulary.tokens])
        self._is_quote = np.array([b'"' in token for token in vocabulary.tokens])

    def walk(self, matcher: LLMatcher, number: int, end_s: float) -> None:
        """Take the tokens of an answer: of walk 0 any, later ones shun what closes, and hurry through strings.

        Raises:
            GrammarError: the library gives up, or nothing but the empty output is allowed.
        """
        from protocol.guidance import require_sound

        dice = random.Random(number)
        for step in range(NUM_PROBED_TOKENS):
            if number > 0 and time.thread_time() >= end_s:
                return
            allowed = self._allowed(matcher)
            if not len(allowed):
                if step == 0:
                    raise GrammarError("nothing but the empty output obeys it")
                return
            if number > 0:
                allowed = _preferred(allowed, self._is_open)
            if number > 1 and dice.random() < 0.5:
                allowed = _preferred(allowed, self._is_quote)
            matcher.consume_token(int(allowed[dice.randrange(len(allowed))]))
            require_sound(matcher)

    def _allowed(self, matcher: LLMatcher) -> TokenIds:
        import numpy as np

        from protocol.guidance import require_sound

        matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        require_sound(matcher)
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little", count=self._vocab_size)
        return np.flatnonzero(bits.astype(bool) & self._is_text)


def _preferred(allowed: TokenIds, is_liked: NDArray[np.bool_]) -> TokenIds:
    """Return of the tokens those that are liked; all if none is."""
    liked = allowed[is_liked[allowed]]
    return liked if len(liked) else allowed


def _held(grammar: Grammar) -> str:
    """Return a grammar's text in the words of the library. Raises GrammarError where it has none for it."""
    text = grammar.text
    try:
        if grammar.kind == GrammarKind.LARK:
            text = exact_lark(ascii_lark(_lark(text)))
        elif grammar.kind == GrammarKind.REGEX:
            text = ascii_regex(text)
        elif grammar.kind == GrammarKind.JSON_SCHEMA:
            text = exact_schema(text)
    except RecursionError:
        raise GrammarError("nested too deeply") from None
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"longer than {MAX_GRAMMAR_BYTES} bytes as the library takes it")
    return text


def _spelled_out(escape: re.Match[str]) -> str:
    """Return an escape of GBNF as the library's reader is to have it: it drops the zeros that a number begins with."""
    char = chr(int(escape["number"], 16)) if escape["number"] else ""
    if char > "\x7f" and char.isprintable():
        return char
    return f"\\x{ord(char):02x}" if char and char <= "\x7f" else escape[0]


def _lark(text: str) -> str:
    """Return a grammar in GBNF or Lark as Lark."""
    if "::=" not in text:
        return text  # every rule of GBNF has it; the library asks for a plain `start:` at the beginning of a line
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    if is_lark_syntax(text):
        return text
    try:
        found = gbnf_to_lark(_U_ESCAPE.sub(_spelled_out, text))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  it raises Exception itself
        raise GrammarError(f"neither Lark nor GBNF: {error}"[:300]) from error
    return found
