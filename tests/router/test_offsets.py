"""`text_offset`: each lies in the text, parts of one character share theirs, and what is left out takes no room."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from protocol.readout import PromptLogprobs
from protocol.request import FinishReason, TokenLogprobs, TokenRow
from router.api import CompletionRequest, parse
from router.intake import Intake, Job, PromptTokens
from router.prompt_logprobs import ReadPrompts, echo_offsets
from router.stream import AnswerShape
from router.text import ChoiceText, Piece, Whole
from router.tokenizer import Tokenizer
from tests.router.tiny import EOS_ID, SPECIAL, byte_id, byte_ids, byte_level_gguf

LOGGED = TokenLogprobs(-0.5)


def job_of(tokenizer: Tokenizer, **fields: Any) -> Job:
    """Make a job of a completion with log probabilities."""
    body = {"model": "m", "prompt": "q", "max_tokens": 30, "logprobs": 0, **fields}
    return Intake(tokenizer, ("m",)).job(parse(json.dumps(body).encode(), CompletionRequest), 100)


def pieces(tokenizer: Tokenizer, job: Job, token_ids: list[int], reason: FinishReason) -> list[Piece]:
    """Give what a choice comes to, token by token."""
    text, found = ChoiceText(tokenizer, job.text), []
    for index, token_id in enumerate(token_ids):
        end = reason if index == len(token_ids) - 1 else None
        found.append(text.feed(TokenRow(1, 0, index, token_id, end, LOGGED)))
        if text.is_over:
            break
    return found


def both(
    tokenizer: Tokenizer, token_ids: list[int], reason: FinishReason = FinishReason.LENGTH, **fields: Any
) -> tuple[str, list[int], list[str]]:
    """Return text, offsets and tokens of a whole answer; a stream must say the same, and every chunk of it be true."""
    job, whole = job_of(tokenizer, **fields), Whole()
    for piece in pieces(tokenizer, job, token_ids, reason):
        whole.add(piece)
    choice = json.loads(AnswerShape(job, tokenizer, "x").answer([whole.piece()]))["choices"][0]
    text, offsets, tokens = "", [], []
    shape = AnswerShape(job, tokenizer, "x")
    for piece in pieces(tokenizer, job, token_ids, reason):
        if data := shape.chunk(0, piece):
            told = json.loads(data[6:])["choices"][0]
            text += told["text"]
            offsets += told["logprobs"]["text_offset"]
            tokens += told["logprobs"]["tokens"]
            assert all(0 <= offset <= len(text) for offset in offsets)
    logprobs = choice["logprobs"]
    assert (text, offsets, tokens) == (choice["text"], logprobs["text_offset"], logprobs["tokens"])
    return text, offsets, tokens


CASES: list[tuple[str, list[int], FinishReason, dict[str, Any], str, list[int]]] = [
    ("parts", [*byte_ids("é"), *byte_ids("😀a")], FinishReason.LENGTH, {}, "é😀a", [0, 0, 1, 1, 1, 1, 2]),
    ("skipped", [1, byte_id("a"), 3, byte_id("b"), 0], FinishReason.LENGTH, {}, "ab", [0, 0, 1, 1, 2]),
    ("shown", [1, byte_id("a")], FinishReason.LENGTH, {"skip_special_tokens": False}, "<|start|>a", [0, 9]),
    ("end", [byte_id("a"), EOS_ID], FinishReason.STOP, {}, "a", [0, 1]),
    ("only ends", [EOS_ID], FinishReason.STOP, {}, "", [0]),
    ("within", [*byte_ids("é")[:1], 1, *byte_ids("é")[1:]], FinishReason.LENGTH, {}, "é", [0, 0, 0]),
    ("broken", [*byte_ids("é")[:1], byte_id("a"), byte_id("b")], FinishReason.LENGTH, {}, "\ufffdab", [0, 1, 2]),
    ("unfinished", [byte_id("a"), *byte_ids("😀")[:2]], FinishReason.LENGTH, {}, "a\ufffd", [0, 1, 1]),
    ("stop", byte_ids("abcde"), FinishReason.LENGTH, {"stop": "cd"}, "ab", [0, 1, 2, 2]),
    ("kept stop", byte_ids("abcde"), FinishReason.LENGTH, {"stop": "cd", "include_stop_str_in_output": True},
     "abcd", [0, 1, 2, 3]),
    ("held, then told", byte_ids("abcx"), FinishReason.LENGTH, {"stop": "bcd"}, "abcx", [0, 1, 2, 3]),
    ("held, then cut", byte_ids("aabab"), FinishReason.LENGTH, {"stop": "abab"}, "a", [0, 1, 1, 1, 1]),
    ("echoed", byte_ids("ab"), FinishReason.LENGTH, {"echo": True, "prompt": "é!"}, "é!ab", [2, 3]),
]  # fmt: skip


@pytest.mark.parametrize(("token_ids", "reason", "fields", "text", "offsets"), [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])  # fmt: skip
def test_where_tokens_begin(
    tokenizer: Tokenizer,
    token_ids: list[int],
    reason: FinishReason,
    fields: dict[str, Any],
    text: str,
    offsets: list[int],
) -> None:
    assert both(tokenizer, token_ids, reason, **fields)[:2] == (text, offsets)


def test_every_offset_lies_in_the_text_whatever_is_said(tokenizer: Tokenizer) -> None:
    dice = random.Random(7)
    alphabet = [*range(len(SPECIAL)), *byte_ids("ab the and é😀世"), 260, 261, 262, 263, 264]
    for _ in range(400):
        fields: dict[str, Any] = {
            "skip_special_tokens": dice.random() < 0.7,
            "stop": dice.choice([None, "ab", "aab", "é", "the a"]),
            "include_stop_str_in_output": dice.random() < 0.3,
        }
        token_ids = dice.choices(alphabet, k=dice.randint(1, 30))
        text, offsets, tokens = both(tokenizer, token_ids, **fields)
        assert offsets == sorted(offsets) and all(0 <= offset <= len(text) for offset in offsets)
        for offset, token, token_id in zip(offsets, tokens, token_ids, strict=False):
            is_told = not token.startswith("bytes:") and not (fields["skip_special_tokens"] and token_id < len(SPECIAL))
            if is_told and offset + len(token) <= len(text):
                assert text[offset:].startswith(token), (text, offset, token)


@pytest.mark.parametrize(
    ("echo", "token_ids", "offsets"),
    [
        ("é a", [*byte_ids("é"), *byte_ids(" a")], [0, 0, 1, 2]),
        ("ab", [1, *byte_ids("ab")], [0, 0, 1]),
        ("<|start|>a", [1, byte_id("a")], [0, 9]),
        ("ab", byte_ids(" ab"), [0, 0, 1]),
        ("<|start|>a", [1, 1, byte_id("a"), 2], [0, 9, 9, 10]),
        ("\ufffda", [*byte_ids("é")[:1], byte_id("a")], [0, 1]),
        ("x", byte_ids("abc"), [0, 1, 1]),
        ("", [1], [0]),
    ],
)
def test_where_the_tokens_of_an_echoed_prompt_begin(
    tokenizer: Tokenizer, echo: str, token_ids: list[int], offsets: list[int]
) -> None:
    assert list(echo_offsets(tokenizer, PromptTokens(tuple(token_ids), echo, is_echoed=True))) == offsets


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_and_completion_share_one_text(tokenizer: Tokenizer, stream: bool) -> None:
    job = job_of(tokenizer, prompt="😀b", echo=True)
    num_rows = len(job.prompts[0].token_ids) - 1
    row = PromptLogprobs.of(0, np.full(num_rows, -1, "<f4").tobytes(), np.ones(num_rows, "<i4").tobytes())
    shape = AnswerShape(job, tokenizer, "x", ReadPrompts(job.prompts, (row,)))
    list(shape.prepare())
    said = pieces(tokenizer, job, byte_ids("é!"), FinishReason.LENGTH)
    if stream:
        chunks = [json.loads(data[6:])["choices"][0] for piece in said if (data := shape.chunk(0, piece))]
        text = "".join(chunk["text"] for chunk in chunks)
        offsets = [offset for chunk in chunks for offset in chunk["logprobs"]["text_offset"]]
    else:
        whole = Whole()
        for piece in said:
            whole.add(piece)
        (choice,) = json.loads(shape.answer([whole.piece()]))["choices"]
        text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    assert (text, offsets) == ("😀bé!", [0, 0, 0, 0, 1, 2, 2, 3])


def test_a_beginning_that_the_tokenizer_adds_takes_no_room(tmp_path: Any) -> None:
    framed = Tokenizer(byte_level_gguf(tmp_path / "framed.gguf", add_bos_token=True))
    job = job_of(framed, prompt="ab", echo=True)
    assert job.prompts[0].token_ids[0] == 1 and job.prompts[0].echo == "ab"
    assert list(echo_offsets(framed, job.prompts[0])) == [0, 0, 1]
