"""Pieces of text in OpenAI's shapes: whole answers, and the chunks of a stream.

first chunk of a choice   role (chat) together with its first text, never before it
chunk                     the text of one token, as soon as it is decodable; or what it adds to a call of a function
last chunk of a choice    finish_reason
usage chunk               choices [] and usage, when asked for
[DONE]
(failure)                 one `error` event and no [DONE]
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from protocol.errors import RequestFailed
from router.call_shapes import delta_of, ends_in_calls, parser_for, said_in
from router.intake import Choice as JobChoice
from router.intake import Job, PromptTokens
from router.logprob_shapes import chat_logprobs, finite
from router.prompt_logprobs import ReadPrompts, by_token_id, echoed, followed_by, plain_token, top_of
from router.responses import (
    Answer,
    AnswerMessage,
    ChatLogprobs,
    Choice,
    CompletionLogprobs,
    Delta,
    Logprobs,
    Usage,
    body_of_error,
    encode_json,
    usage_of,
)
from router.text import Piece
from router.tokenizer import Tokenizer
from router.tool_calls import Content

DONE: Final = b"data: [DONE]\n\n"
_encode: Final = msgspec.json.Encoder().encode


@dataclass(slots=True)
class _Progress:
    """What a choice has shown so far, and what waits for text to go with."""

    pending: Piece = field(default_factory=Piece)
    has_begun: bool = False
    frame: tuple[bytes, bytes] | None = None
    num_tokens: int = 0
    num_logged_chars: int = 0


class AnswerShape:
    """Shapes everything that is said about one request of the API.

    Args:
        answer_id: the request's own id, or None to make one.
        read: what was read off the prompts, if the job wants it.
    """

    def __init__(
        self, job: Job, tokenizer: Tokenizer, answer_id: str | None = None, read: ReadPrompts | None = None
    ) -> None:
        self._job = job
        self._read = read
        self._tokenizer = tokenizer
        prefix = "chatcmpl-" if job.is_chat else "cmpl-"
        self.answer_id = prefix + (answer_id or secrets.token_hex(12))
        self._created = int(time.time())
        self._kind = "chat.completion" if job.is_chat else "text_completion"
        self._progress = [_Progress() for _ in job.choices]
        self._parsers = [] if job.tools is None else [parser_for(job.tools) for _ in job.choices]
        self.num_cached_tokens = 0

    @property
    def num_output_tokens(self) -> int:
        """Tokens so far, of all choices."""
        return sum(progress.num_tokens for progress in self._progress)

    @property
    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many choices it has."""
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self._job.prompts)
        # What generation finds cached of a prompt that was read, this very request has computed.
        num_cached_tokens = self.num_cached_tokens if self._read is None else 0
        return usage_of(num_prompt_tokens, self.num_output_tokens, num_cached_tokens)

    def chunk(self, index: int, piece: Piece) -> bytes:
        """Return the event for a piece of a choice; empty while there is no text to show for it."""
        progress = self._progress[index]
        progress.num_tokens += len(piece.token_ids)
        if self._parsers:
            return self._chunk_with_calls(index, piece, progress)
        if progress.frame is not None and piece.finish_reason is None:
            before, after = progress.frame
            return before + _encode(piece.text) + after if piece.text else b""
        progress.pending.add(piece)
        if not progress.pending.text and piece.finish_reason is None:
            return b""
        piece, progress.pending = progress.pending, Piece()
        is_first, progress.has_begun = not progress.has_begun, True
        data = self._event(index, piece, is_first)
        if is_first and self._is_plain and piece.finish_reason is None:
            progress.frame = self._frame(index)
        return data

    def _chunk_with_calls(self, index: int, piece: Piece, progress: _Progress) -> bytes:
        """Return an event for each thing that a piece adds: content, the beginning of a call, or arguments."""
        parser = self._parsers[index]
        parts = parser.feed(piece.text)
        if piece.finish_reason is not None:
            parts += parser.flush()
        piece.text = ""
        progress.pending.add(piece)
        if not parts and piece.finish_reason is None:
            return b""
        piece, progress.pending = progress.pending, Piece()
        out: list[bytes] = []
        for number, part in enumerate(parts or [Content("")], start=1):
            role = "assistant" if not progress.has_begun else UNSET
            if isinstance(part, Content):
                delta = Delta(role=role, content=part.text if part.text or role is not UNSET else UNSET)
            else:
                delta = Delta(role=role, content=UNSET if role is UNSET else None, tool_calls=[delta_of(part)])
            is_last = number >= len(parts)
            told = Piece(finish_reason=piece.finish_reason, stop_reason=piece.stop_reason) if is_last else Piece()
            if number == 1:
                told.token_ids, told.logged = piece.token_ids, piece.logged
            out.append(self._event(index, told, not progress.has_begun, delta))
            progress.has_begun = True
        return b"".join(out)

    @property
    def _is_plain(self) -> bool:
        """Whether chunks after the first differ in nothing but their text, until the last one."""
        job = self._job
        has_logprobs = any(choice.sampling.num_logprobs is not None for choice in job.choices)
        return not (job.has_running_usage or job.returns_token_ids or has_logprobs)

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """Return what stands before and after the text in the chunks of a choice, all of them alike."""
        mark = secrets.token_hex(16)
        before, _, after = self._event(index, Piece(text=mark), is_first=False).partition(encode_json(mark))
        assert after, "the text stands in every chunk"
        return before, after

    def _event(self, index: int, piece: Piece, is_first: bool, delta: Delta | None = None) -> bytes:
        choice = self._choice(index, piece, is_first, is_chunk=True, delta=delta)
        usage = self.usage if self._job.has_running_usage else None
        kind = "chat.completion.chunk" if self._job.is_chat else self._kind
        has_prompt = is_first and self._job.is_chat and self._job.returns_token_ids
        return event(
            Answer(
                id=self.answer_id,
                object=kind,
                created=self._created,
                model=self._job.model,
                choices=[choice],
                usage=usage if self._job.has_usage else UNSET,
                prompt_token_ids=self._job.prompts[0].token_ids if has_prompt else UNSET,
            )
        )

    def closing(self) -> bytes:
        """Return the last events of a stream: usage if asked for, and [DONE]."""
        if not self._job.has_usage:
            return DONE
        kind = "chat.completion.chunk" if self._job.is_chat else self._kind
        answer = Answer(
            id=self.answer_id,
            object=kind,
            created=self._created,
            model=self._job.model,
            choices=[],
            usage=self.usage,
        )
        return event(answer) + DONE

    def failure(self, error: RequestFailed) -> bytes:
        """Return the event that ends a stream which has begun and cannot go on."""
        return error_event(error)

    def answer(self, pieces: list[Piece]) -> bytes:
        """Return the whole answer; `pieces` holds each choice whole."""
        for progress, piece in zip(self._progress, pieces, strict=True):
            progress.num_tokens = len(piece.token_ids)
        has_prompt = self._job.is_chat and self._job.returns_token_ids
        return encode_json(
            Answer(
                id=self.answer_id,
                object=self._kind,
                created=self._created,
                model=self._job.model,
                choices=[self._choice(i, piece, True, is_chunk=False) for i, piece in enumerate(pieces)],
                usage=self.usage,
                prompt_token_ids=self._job.prompts[0].token_ids if has_prompt else UNSET,
                prompt_logprobs=self._prompt_logprobs(self._job.prompts[0]) if self._job.is_chat else UNSET,
            )
        )

    def _prompt_logprobs(self, prompt: PromptTokens) -> list[dict[str, Any] | None] | UnsetType:
        if self._read is None or self._job.num_shown_top is None:
            return UNSET
        return by_token_id(self._tokenizer, prompt, self._read.of(prompt), self._job.num_shown_top)

    def _choice(self, index: int, piece: Piece, is_first: bool, is_chunk: bool, delta: Delta | None = None) -> Choice:
        job, choice = self._job, self._job.choices[index]
        shown: dict[str, Any] = {}
        is_call = bool(self._parsers) and ends_in_calls(self._parsers[index], piece)
        if not job.is_chat:
            shown["text"] = (choice.prompt.echo if is_first else "") + piece.text
            if is_first and job.returns_token_ids:
                shown["prompt_token_ids"] = choice.prompt.token_ids
            if not is_chunk:
                shown["prompt_logprobs"] = self._prompt_logprobs(choice.prompt)
        elif delta is not None:
            shown["delta"] = delta
        elif is_chunk:
            role = "assistant" if is_first else UNSET
            shown["delta"] = Delta(role=role, content=piece.text if piece.text or is_first else UNSET)
        elif job.tools is not None:
            said = said_in(job.tools, piece.text)
            is_call = ends_in_calls(said, piece)
            calls = said.answered() if said.names else UNSET
            shown["message"] = AnswerMessage(content=said.content or (None if said.names else ""), tool_calls=calls)
        else:
            shown["message"] = AnswerMessage(content=piece.text)
        return Choice(
            index=index,
            logprobs=self._logprobs(choice, piece, is_first),
            finish_reason="tool_calls" if is_call else piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids if job.returns_token_ids else UNSET,
            **shown,
        )

    # --- log probabilities ---

    def _logprobs(self, choice: JobChoice, piece: Piece, is_first: bool) -> Logprobs | None:
        if choice.sampling.num_logprobs is None:
            return None
        num_top = choice.sampling.num_logprobs
        if self._job.is_chat:
            return ChatLogprobs(content=chat_logprobs(self._tokenizer, piece.logged, num_top))
        progress = self._progress[choice.index]
        offsets, tokens = [], []
        for logged in piece.logged:
            text = self._tokenizer.token_text(logged.token_id)
            offsets.append(len(choice.prompt.echo) + progress.num_logged_chars)
            tokens.append(plain_token(self._tokenizer, logged.token_id))
            progress.num_logged_chars += len(text)
        own = CompletionLogprobs(
            text_offset=offsets,
            token_logprobs=[finite(logged.logprobs.logprob) for logged in piece.logged],
            tokens=tokens,
            top_logprobs=[top_of(self._tokenizer, one.token_id, one.logprobs, num_top) for one in piece.logged],
        )
        if self._read is None or not is_first or not choice.prompt.is_echoed:
            return own
        return followed_by(echoed(self._tokenizer, choice.prompt, self._read.of(choice.prompt), num_top), own)


def event(value: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + encode_json(value) + b"\n\n"


def error_event(error: RequestFailed) -> bytes:
    """Return the event that ends a stream which has begun and cannot go on."""
    return event(body_of_error(error))
