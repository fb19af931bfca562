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
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from protocol.errors import RequestFailed
from router.call_shapes import delta_of, ends_in_calls, parser_for, said_in
from router.intake import Choice as JobChoice
from router.intake import Job, PromptTokens
from router.logprob_lists import LogprobLists, batches, raw_items, raw_list
from router.logprob_shapes import chat_logprobs, finite
from router.prompt_logprobs import ReadPrompts, by_token_id, echo_steps, plain_token, top_of
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
from router.text import LoggedToken, Piece
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
    num_chars: int = 0

    def take(self, holds_logged: bool) -> Piece:
        """Return what waits; log probabilities of text that is held back go on waiting, for it may be cut off."""
        piece, self.pending = self.pending, Piece()
        self.num_chars += len(piece.text)
        if holds_logged and piece.finish_reason is None and piece.logged:
            certain = [one for one in piece.logged if one.offset <= self.num_chars]
            self.pending.logged = piece.logged[len(certain) :]
            piece.logged = certain
        return piece


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
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in job.prompts)
        self._echoed: dict[int, LogprobLists] = {}
        self._shown: dict[int, msgspec.Raw] = {}
        self._has_read = read is not None
        self.num_cached_tokens = 0
        self.num_output_tokens = 0

    def prepare(self) -> Iterator[None]:
        """Shape what was read off the prompts, step by step; before anything else, where anything was read."""
        read, self._read, job = self._read, None, self._job
        if read is None:
            return
        num_top = job.choices[0].sampling.num_logprobs
        for prompt in job.prompts:
            if prompt.is_echoed and num_top is not None and not job.is_chat:
                lists = self._echoed[id(prompt)] = LogprobLists()
                yield from echo_steps(self._tokenizer, prompt, read.of(prompt), num_top, lists)
            if job.num_shown_top is not None:
                shown: list[bytes] = []
                yield from by_token_id(self._tokenizer, prompt, read.of(prompt), job.num_shown_top, shown)
                self._shown[id(prompt)] = raw_list(shown)

    @property
    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many choices it has."""
        # What generation finds cached of a prompt that was read, this very request has computed.
        num_cached_tokens = 0 if self._has_read else self.num_cached_tokens
        return usage_of(self._num_prompt_tokens, self.num_output_tokens, num_cached_tokens)

    def chunk(self, index: int, piece: Piece) -> bytes:
        """Return the event for a piece of a choice; empty while there is no text to show for it."""
        progress = self._progress[index]
        self.num_output_tokens += len(piece.token_ids)
        if self._parsers:
            return self._chunk_with_calls(index, piece, progress)
        if progress.frame is not None and piece.finish_reason is None:
            before, after = progress.frame
            return before + _encode(piece.text) + after if piece.text else b""
        progress.pending.add(piece)
        if not progress.pending.text and piece.finish_reason is None:
            return b""
        piece = progress.take(holds_logged=not self._job.is_chat)
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
        return b"".join(self.parts(pieces))

    def parts(self, pieces: list[Piece]) -> Iterator[bytes]:
        """Give the whole answer part by part; a part may be empty, and none takes long."""
        for _ in self.prepare():
            yield b""
        self.num_output_tokens = sum(len(piece.token_ids) for piece in pieces)
        has_prompt = self._job.is_chat and self._job.returns_token_ids
        answer = Answer(
            id=self.answer_id,
            object=self._kind,
            created=self._created,
            model=self._job.model,
            choices=[],
            usage=self.usage,
            prompt_token_ids=self._job.prompts[0].token_ids if has_prompt else UNSET,
            prompt_logprobs=self._prompt_logprobs(self._job.prompts[0]) if self._job.is_chat else UNSET,
        )
        # What clients wrote stands in strings, in which its quotes are escaped.
        before, _, after = encode_json(answer).partition(b'"choices":[]')
        yield before + b'"choices":['
        for index, piece in enumerate(pieces):
            self._progress[index].num_chars = len(piece.text)
            logprobs = yield from self._logprob_steps(self._job.choices[index], piece)
            choice = self._choice(index, piece, True, is_chunk=False, logprobs=logprobs)
            yield (b"," if index else b"") + encode_json(choice)
        yield b"]" + after

    def _prompt_logprobs(self, prompt: PromptTokens) -> msgspec.Raw | UnsetType:
        return self._shown.get(id(prompt), UNSET)

    def _choice(
        self,
        index: int,
        piece: Piece,
        is_first: bool,
        is_chunk: bool,
        delta: Delta | None = None,
        logprobs: Logprobs | msgspec.Raw | None = None,
    ) -> Choice:
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
            logprobs=self._logprobs(choice, piece, is_first) if is_chunk else logprobs,
            finish_reason="tool_calls" if is_call else piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids if job.returns_token_ids else UNSET,
            **shown,
        )

    # --- log probabilities ---

    def _logprobs(self, choice: JobChoice, piece: Piece, is_first: bool) -> Logprobs | msgspec.Raw | None:
        """Return those of a chunk: of few tokens, but for the prompt's, which are made."""
        if (num_top := choice.sampling.num_logprobs) is None:
            return None
        if self._job.is_chat:
            return ChatLogprobs(content=chat_logprobs(self._tokenizer, piece.logged, num_top))
        echoed = self._echoed.get(id(choice.prompt)) if is_first else None
        if echoed is not None:
            own = LogprobLists()
            self._add(own, choice, piece.logged)
            return own.raw(echoed)
        offsets, logprobs, tokens, top = self._lists_of(choice, piece.logged)
        return CompletionLogprobs(text_offset=offsets, token_logprobs=logprobs, tokens=tokens, top_logprobs=top)

    def _logprob_steps(self, choice: JobChoice, piece: Piece) -> Generator[bytes, None, msgspec.Raw | None]:
        """Return those of a whole choice, made a few tokens a step."""
        if (num_top := choice.sampling.num_logprobs) is None:
            return None
        lists, content = LogprobLists(), []
        for some in batches(piece.logged):
            if self._job.is_chat:
                content.append(raw_items(chat_logprobs(self._tokenizer, some, num_top)))
            else:
                self._add(lists, choice, some)
            yield b""
        if self._job.is_chat:
            return msgspec.Raw(encode_json({"content": raw_list(content)}))
        echoed = self._echoed.get(id(choice.prompt))
        return lists.raw() if echoed is None else lists.raw(echoed)

    def _add(self, lists: LogprobLists, choice: JobChoice, logged: list[LoggedToken]) -> None:
        if logged:
            lists.add(*self._lists_of(choice, logged))

    def _lists_of(
        self, choice: JobChoice, logged: list[LoggedToken]
    ) -> tuple[list[int], list[float | None], list[str], list[dict[str, float] | None]]:
        tokenizer, num_top = self._tokenizer, choice.sampling.num_logprobs or 0
        # What a stop string cut off is reported, and begins nowhere behind the end.
        num_echoed, num_chars = len(choice.prompt.echo), self._progress[choice.index].num_chars
        return (
            [num_echoed + min(one.offset, num_chars) for one in logged],
            [finite(one.logprobs.logprob) for one in logged],
            [plain_token(tokenizer, one.token_id) for one in logged],
            [top_of(tokenizer, one.token_id, one.logprobs, num_top) for one in logged],
        )


def event(value: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + encode_json(value) + b"\n\n"


def error_event(error: RequestFailed) -> bytes:
    """Return the event that ends a stream which has begun and cannot go on."""
    return event(body_of_error(error))
