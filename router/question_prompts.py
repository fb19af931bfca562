"""Questions about one state as prompts that begin alike, and the tokens that answer them.

    chat template:  <user's turn> state \n\n question <end of turn, assistant's turn>  label
    no template:    state \n\n question \nAnswer:                                      label

1. The state comes first in the user's turn, so that every prompt of a request begins with the same tokens: they are
computed once. State and question are tokenised apart, where the tokenizer gives back what it is given; else each
prompt is tokenised as a whole, and begins alike as far as it does.
2. A label is one token right after the prompt: found by tokenising the end of the prompt with the label behind it.
Where a label is several tokens no probability can be read, and the question is refused.

Pure; a long state takes time: run it off the event loop.
"""

from __future__ import annotations

import itertools
import secrets
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.errors import ContextTooLong, InvalidRequest
from protocol.readout import ReadLabels
from router.questions import YES_NO, Labels, Question
from router.reading import ReadQuery
from router.text_threads import TextBudget
from router.tokenizer import Tokenizer

_PLAIN_END: Final = "\nAnswer:"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question to be put. `param` names its field in errors."""

    question: Question
    param: str


@dataclass(frozen=True, slots=True)
class _Frame:
    """What stands before the state and behind the question."""

    before: str
    after: str
    adds_special: bool


class QuestionPrompts:
    """Makes prompts of questions for one tokenizer and one request.

    Raises:
        InvalidRequest: the chat template does not show what a user says.
    """

    def __init__(self, tokenizer: Tokenizer, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._budget = TextBudget()
        self._frame = _frame_of(tokenizer)
        self._tail = tokenizer.encode(self._frame.after, False)
        self._ids: dict[str, int | None] = {}
        self._letters: list[str] = []
        self._more_letters = _letter_labels()

    def queries(self, state: str, asked: Sequence[Asked], state_param: str) -> list[ReadQuery]:
        """Return one query for each question; all share the tokens of the state.

        Raises:
            InvalidRequest: the state is empty, or a question cannot be answered with single tokens.
            ContextTooLong: state and question do not fit the context.
        """
        state = state.rstrip()
        if not state:
            raise InvalidRequest(f"{state_param}: must not be empty", state_param)
        beginning = self._frame.before + state
        shared = tuple(self._encode(beginning, self._frame.adds_special, state_param))
        if len(shared) >= self._max_model_len:
            raise self._too_long(state_param, len(shared))
        return [self._query(beginning, shared, one) for one in asked]

    def _query(self, beginning: str, shared: tuple[int, ...], asked: Asked) -> ReadQuery:
        labels = self._labels(asked)
        ending = f"\n\n{asked.question.text(labels)}{self._frame.after}"
        readout = ReadLabels(token_ids=tuple(self._known_id(label) for label in labels))
        tokens = self._encode(ending, False, asked.param)
        if self._tokenizer.decode(tokens, skip_special=False) != ending:
            # A tokenizer that marks the beginning of what it is given: the two halves would not be the whole.
            tokens, shared = self._encode(beginning + ending, self._frame.adds_special, asked.param), ()
        query = ReadQuery(tuple(tokens), readout, shared)
        if query.num_tokens >= self._max_model_len:
            raise self._too_long(asked.param, query.num_tokens)
        return query

    def _too_long(self, param: str, num_tokens: int) -> ContextTooLong:
        return ContextTooLong(
            f"{param}: the prompt has {num_tokens} tokens, the context is {self._max_model_len}", param
        )

    def _encode(self, text: str, adds_special: bool, param: str) -> list[int]:
        # No token is longer than the longest: what cannot fit is refused before it is tokenised.
        if len(text) > self._max_model_len * self._tokenizer.max_token_chars:
            raise ContextTooLong(
                f"{param}: {len(text)} characters exceed the context of {self._max_model_len} tokens", param
            )
        self._budget.spend(len(text), param)
        return self._tokenizer.encode(text, adds_special)

    # --- labels ---

    def _labels(self, asked: Asked) -> Sequence[str]:
        question = asked.question
        if question.labels is Labels.LETTERS:
            return self._letters_for(len(question.options), asked.param)
        labels = YES_NO if question.labels is Labels.YES_NO else string.digits[: len(question.options)]
        for label in labels:
            if self._id_of(label) is None:
                raise InvalidRequest(
                    f"{asked.param}: this model's tokenizer has no single token for the answer {label!r}, so that no "
                    f"probability of it can be read",
                    asked.param,
                )
        return labels

    def _letters_for(self, num_options: int, param: str) -> list[str]:
        while len(self._letters) < num_options:
            label = next(self._more_letters, None)
            if label is None:
                raise InvalidRequest(
                    f"{param}: {num_options} options; this model's tokenizer has single tokens for "
                    f"{len(self._letters)} labels",
                    param,
                )
            if self._id_of(label) is not None:
                self._letters.append(label)
        return self._letters[:num_options]

    def _known_id(self, label: str) -> int:
        token_id = self._id_of(label)
        assert token_id is not None, "labels are looked up before they are used"
        return token_id

    def _id_of(self, label: str) -> int | None:
        """Return the one token that a label is behind a prompt, or None."""
        if label not in self._ids:
            forms = (label, f" {label}") if self._tokenizer.has_chat_template else (f" {label}", label)
            found = (self._token_behind(form) for form in forms)
            self._ids[label] = next((token_id for token_id in found if token_id is not None), None)
        return self._ids[label]

    def _token_behind(self, text: str) -> int | None:
        ids = self._tokenizer.encode(self._frame.after + text, False)
        is_one = len(ids) == len(self._tail) + 1 and ids[:-1] == self._tail
        # Where unknown bytes become one and the same token, it says nothing of the label.
        return ids[-1] if is_one and self._tokenizer.token_text(ids[-1]).strip() == text.strip() else None


def _frame_of(tokenizer: Tokenizer) -> _Frame:
    if not tokenizer.has_chat_template:
        return _Frame("", _PLAIN_END, adds_special=True)
    mark = secrets.token_hex(16)
    before, found, after = tokenizer.render_chat([{"role": "user", "content": mark}]).partition(mark)
    if not found or mark in after:
        raise InvalidRequest("model: its chat template does not show a user's message once, as it is", "model")
    return _Frame(before, after, adds_special=False)


def _letter_labels() -> Iterator[str]:
    yield from string.ascii_uppercase
    for pair in itertools.product(string.ascii_uppercase, repeat=2):
        yield "".join(pair)
