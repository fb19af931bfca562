"""The answer to /v1/responses, whole or as events. Each event has a `sequence_number`, counted from 0.

    response.created · response.in_progress
      message   output_item.added · content_part.added · output_text.delta ... · output_text.done
                · content_part.done · output_item.done
      call      output_item.added · function_call_arguments.delta ... · function_call_arguments.done · output_item.done
    response.completed | response.incomplete | response.failed

1. Nothing is said before the first text or call. 2. One item is open at a time; it is closed when another begins, or
when the answer ends. An answer without any text is one empty message.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from protocol.errors import AnswerImpossible, RequestFailed
from protocol.request import FinishReason
from router.call_shapes import is_cut_by_stop, new_call_id, parser_for, said_in
from router.intake import Job
from router.logprob_lists import batches
from router.logprob_shapes import chat_logprobs
from router.prompt_logprobs import ReadPrompts
from router.response_objects import (
    IncompleteDetails,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    ResponseFailure,
    ResponseObject,
    asked_in,
    usage_of,
)
from router.responses import encode_json
from router.shape import Shape
from router.stream import AnswerShape
from router.text import LoggedToken, Piece
from router.tokenizer import Tokenizer
from router.tool_calls import Call, Content, Part

_IN_PROGRESS: Final = "in_progress"


@dataclass(slots=True)
class _OpenItem:
    """The item that is being written; a message if `name` is None."""

    item_id: str
    call_id: str = ""
    name: str | None = None
    text: list[str] = field(default_factory=list)
    logprobs: list[msgspec.Raw] = field(default_factory=list)

    def item(self, status: str) -> OutputItem:
        """Return what it is so far."""
        text = "".join(self.text)
        if self.name is not None:
            return OutputCall(id=self.item_id, call_id=self.call_id, name=self.name, arguments=text, status=status)
        content = [OutputText(text=text, logprobs=self.logprobs)] if status != _IN_PROGRESS else []
        return OutputMessage(id=self.item_id, status=status, content=content)


class ResponseShape:
    """Shapes everything that is said about one request to /v1/responses.

    Args:
        answer_id: the request's own id, or None to make one.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, answer_id: str | None = None) -> None:
        assert job.response is not None
        self._job = job
        self._tokenizer = tokenizer
        self._name = answer_id or secrets.token_hex(12)
        self.answer_id = f"resp_{self._name}"
        self._created = int(time.time())
        self._asked = asked_in(job.response)
        self._parser = None if job.tools is None else parser_for(job.tools)
        self._output: list[OutputItem] = []
        self._open: _OpenItem | None = None
        self._logged: list[LoggedToken] = []
        self._is_whole = True
        self._finish_reason: FinishReason | None = None
        self._num_events = 0
        self.num_output_tokens = 0
        self.num_cached_tokens = 0

    def prepare(self) -> Iterator[None]:
        """Nothing is read off prompts here."""
        yield from ()

    # --- a stream ---

    def chunk(self, index: int, piece: Piece) -> bytes:
        """Return the events for a piece; empty while there is nothing to show for it."""
        assert index == 0, "there is one answer"
        self.num_output_tokens += len(piece.token_ids)
        self._logged += piece.logged
        parts = self._parts(piece)
        out: list[bytes] = []
        if self._num_events == 0 and (parts or piece.finish_reason is not None):
            for kind in ("response.created", "response.in_progress"):
                out.append(self._event(kind, response=self._response(_IN_PROGRESS)))
        for part in parts:
            out += self._part(part)
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason
            self._is_whole = self._parser is None or not is_cut_by_stop(self._parser, piece)
            if self._open is None and not self._output:
                out += self._begin(_OpenItem(self._item_id("msg")))
            out += self._end(self._last_status)
        return b"".join(out)

    def closing(self) -> bytes:
        """Return the last event of a stream."""
        return self._event(f"response.{self._status}", response=self._response(self._status))

    def failure(self, error: RequestFailed) -> bytes:
        """Return the event that ends a stream which has begun and cannot go on."""
        return self._event("response.failed", response=self._response("failed", error))

    def _parts(self, piece: Piece) -> list[Part]:
        if self._parser is None:
            return [Content(piece.text)] if piece.text else []
        parts = self._parser.feed(piece.text)
        return parts + self._parser.flush() if piece.finish_reason is not None else parts

    def _part(self, part: Part) -> list[bytes]:
        """Return the events for content, the beginning of a call, or arguments."""
        if isinstance(part, Call):
            return self._end("completed") + self._begin(_OpenItem(self._item_id("fc"), new_call_id(), part.name))
        out: list[bytes] = []
        is_text = isinstance(part, Content)
        if is_text and (self._open is None or self._open.name is not None):
            out = self._end("completed") + self._begin(_OpenItem(self._item_id("msg")))
        item = self._open
        assert item is not None, "arguments follow the beginning of their call"
        item.text.append(part.text)
        if not is_text:
            return [*out, self._item_event("function_call_arguments.delta", item, delta=part.text)]
        logprobs = self._take_logprobs()
        item.logprobs += logprobs
        return [*out, self._item_event("output_text.delta", item, content_index=0, delta=part.text, logprobs=logprobs)]

    def _begin(self, item: _OpenItem) -> list[bytes]:
        self._open = item
        index = len(self._output)
        out = [self._event("response.output_item.added", output_index=index, item=item.item(_IN_PROGRESS))]
        if item.name is None:
            out.append(self._item_event("content_part.added", item, content_index=0, part=OutputText(text="")))
        return out

    def _end(self, status: str) -> list[bytes]:
        """Return the events that close the open item, if there is one."""
        item = self._open
        if item is None:
            return []
        text = "".join(item.text)
        if item.name is not None:
            out = [self._item_event("function_call_arguments.done", item, name=item.name, arguments=text)]
        else:
            part = OutputText(text=text, logprobs=item.logprobs)
            out = [
                self._item_event("output_text.done", item, content_index=0, text=text, logprobs=item.logprobs),
                self._item_event("content_part.done", item, content_index=0, part=part),
            ]
        done = item.item(status)
        out.append(self._event("response.output_item.done", output_index=len(self._output), item=done))
        self._output.append(done)
        self._open = None
        return out

    def _item_event(self, kind: str, item: _OpenItem, **fields: Any) -> bytes:
        return self._event(f"response.{kind}", item_id=item.item_id, output_index=len(self._output), **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        told = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode_json(told))

    # --- a whole answer ---

    def answer(self, pieces: list[Piece]) -> bytes:
        """Return the whole answer."""
        return b"".join(self.parts(pieces))

    def parts(self, pieces: list[Piece]) -> Iterator[bytes]:
        """Return the whole answer part by part; a part may be empty, and none takes long."""
        [piece] = pieces
        self.num_output_tokens, self._finish_reason = len(piece.token_ids), piece.finish_reason
        num_top = self._job.choices[0].sampling.num_logprobs
        shown: list[msgspec.Raw] = []
        for some in batches(piece.logged) if num_top is not None else ():
            shown += self._shown(some, num_top or 0)
            yield b""
        self._output = self._items(piece, shown)
        yield encode_json(self._response(self._status))

    def _items(self, piece: Piece, logprobs: list[msgspec.Raw]) -> list[OutputItem]:
        items: list[OutputItem] = []
        said = None if self._job.tools is None else said_in(self._job.tools, piece.text)
        self._is_whole = said is None or not is_cut_by_stop(said, piece)
        content = piece.text if said is None else said.content
        if content or said is None or not said.names:
            part = OutputText(text=content, logprobs=logprobs)
            items.append(OutputMessage(id=self._item_id("msg"), status=self._status, content=[part]))
        for number, call in enumerate(said.answered() if said is not None else ()):
            name, arguments = call.function.name, call.function.arguments
            status = "completed" if said is not None and number < said.num_whole else "incomplete"
            item_id = self._item_id("fc", len(items))
            items.append(OutputCall(id=item_id, call_id=call.id, name=name, arguments=arguments, status=status))
        return items

    # --- both ---

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason is FinishReason.LENGTH or not self._is_whole else "completed"

    @property
    def _last_status(self) -> str:
        """What the open item ends as: a call whose arguments are there is whole, whatever cut the answer after it."""
        is_call = self._open is not None and self._open.name is not None
        if is_call and self._parser is not None and self._parser.num_whole == self._parser.num_calls:
            return "completed"
        return self._status

    @property
    def _cause(self) -> IncompleteDetails | None:
        """What cut an incomplete answer; OpenAI has no word for the client's own stop string."""
        return IncompleteDetails(reason="max_output_tokens") if self._finish_reason is FinishReason.LENGTH else None

    def _response(self, status: str, error: RequestFailed | None = None) -> ResponseObject:
        is_over = status != _IN_PROGRESS
        num_input_tokens = len(self._job.prompts[0].token_ids)
        output: list[Any] = [*self._output] if status != "failed" or self._open is None else [
            *self._output, self._open.item("incomplete")
        ]  # fmt: skip
        return ResponseObject(
            id=self.answer_id,
            created_at=self._created,
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,
            output=output,
            error=None if error is None else ResponseFailure(code=_code_of(error), message=str(error)),
            incomplete_details=self._cause if status == "incomplete" else None,
            usage=usage_of(num_input_tokens, self.num_output_tokens, self.num_cached_tokens) if is_over else None,
            **self._asked,
        )

    def _item_id(self, prefix: str, number: int | None = None) -> str:
        return f"{prefix}_{self._name}_{len(self._output) if number is None else number}"

    def _take_logprobs(self) -> list[msgspec.Raw]:
        logged, self._logged = self._logged, []
        num_top = self._job.choices[0].sampling.num_logprobs
        return [] if num_top is None else self._shown(logged, num_top)

    def _shown(self, logged: list[LoggedToken], num_top: int) -> list[msgspec.Raw]:
        # Made once: the events that close an item say all of it again.
        return [msgspec.Raw(encode_json(one)) for one in chat_logprobs(self._tokenizer, logged, num_top)]


def shape_of(job: Job, tokenizer: Tokenizer, answer_id: str | None = None, read: ReadPrompts | None = None) -> Shape:
    """Return who shapes the answer to a job; `read` is what was read off its prompts, if it asked for that."""
    if job.response is None:
        return AnswerShape(job, tokenizer, answer_id, read)
    return ResponseShape(job, tokenizer, answer_id)


def _code_of(error: RequestFailed) -> str:
    """Return OpenAI's code for a failure: whose fault it is."""
    return "invalid_prompt" if isinstance(error, AnswerImpossible) else "server_error"
