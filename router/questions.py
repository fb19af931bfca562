"""Typed questions about a text, as words that a language model answers with one token. Pure; no tokenizer here.

    yes or no    "Answer Yes or No …"          labels Yes, No
    choice       "A. …  B. …"                  labels A, B, … (pairs of letters where there are more than 26 options)
    score        "0: …  1: …"                  labels 0, 1, … (letters where there are more than ten levels)

The answer is read off the model's distribution over the token after the prompt: the probabilities of the labels, made
to add up to one. Their sum before that, the option mass, tells how well the question fitted: where it is small the
model wanted to say something else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

MAX_OPTIONS: Final = 255
YES_NO: Final = ("Yes", "No")


class Labels(Enum):
    """What a question is answered with."""

    YES_NO = auto()
    LETTERS = auto()
    DIGITS = auto()


@dataclass(frozen=True, slots=True)
class Option:
    """One answer that may be given: a choice, a level of a score, or what Yes (the first) and No mean."""

    name: str
    description: str = ""

    @property
    def text(self) -> str:
        """Name and description in one line."""
        return f"{self.name}: {self.description}" if self.name and self.description else self.name or self.description


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a text. `options` in the order of the labels."""

    labels: Labels
    instructions: str
    options: tuple[Option, ...]

    def text(self, labels: Sequence[str]) -> str:
        """Return the question as the model reads it, with these labels for the options."""
        if self.labels is Labels.YES_NO:
            return self._yes_no_text(labels)
        mark, what = (".", "letter") if self.labels is Labels.LETTERS else (":", "number")
        lines = [f"{label}{mark} {option.text}" for label, option in zip(labels, self.options, strict=True)]
        asked = self.instructions or "Which of these fits the text above best?"
        kind = "option" if self.labels is Labels.LETTERS else "level"
        return "\n".join([asked, *lines, f"Answer with the {what} of the {kind} that fits best, and nothing else."])

    def _yes_no_text(self, labels: Sequence[str]) -> str:
        lines = [f"{label}: {option.text}" for label, option in zip(labels, self.options, strict=True) if option.text]
        return "\n".join([self.instructions, *lines, "Answer Yes or No."])


def yes_no(instructions: str, yes: str = "", no: str = "") -> Question:
    """Ask whether something is true; `yes` and `no` say what these mean."""
    asked = f"Question: {instructions}" if instructions else "Question: What is true of the text above?"
    return Question(Labels.YES_NO, asked, (Option("", yes), Option("", no)))


def choice(instructions: str, options: Sequence[Option]) -> Question:
    """Ask which option fits."""
    return Question(Labels.LETTERS, instructions, tuple(options))


def score(instructions: str, levels: Sequence[Option]) -> Question:
    """Ask which level of an ordered scale fits."""
    return Question(Labels.DIGITS if len(levels) <= 10 else Labels.LETTERS, instructions, tuple(levels))


def relevance(document: str) -> Question:
    """Ask whether a document fits the query that is the text."""
    asked = f"Document: {document}\n\nQuestion: Is this document a good answer to the query above?"
    return Question(Labels.YES_NO, asked, (Option(""), Option("")))


@dataclass(frozen=True, slots=True)
class Distribution:
    """The answer to a question.

    Attributes:
        probabilities: of the options, in their order; they add up to 1.
        option_mass: what the labels have of the model's whole distribution, 0 to 1.
    """

    probabilities: tuple[float, ...]
    option_mass: float

    @classmethod
    def of(cls, logprobs: Sequence[float]) -> Distribution:
        """Normalise log probabilities; where none of the labels is possible, all are alike."""
        largest = max(logprobs)
        if largest == -math.inf:
            return cls((1 / len(logprobs),) * len(logprobs), 0.0)
        weights = [math.exp(value - largest) for value in logprobs]
        total = math.fsum(weights)
        return cls(tuple(weight / total for weight in weights), min(1.0, total * math.exp(largest)))

    @property
    def best(self) -> int:
        """The likeliest option; the first one of equals."""
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)

    @property
    def expected(self) -> float:
        """The mean place, counted from 0."""
        return math.fsum(place * probability for place, probability in enumerate(self.probabilities))

    @property
    def confidence(self) -> float:
        """How far the likeliest option stands out: 0 where all are alike, 1 where it is certain."""
        num_options = len(self.probabilities)
        if num_options < 2:
            return 1.0
        return max(0.0, (num_options * self.probabilities[self.best] - 1) / (num_options - 1))
