"""`/v1/embeddings`: texts to vectors, on prefill workers alone.

1. The body is parsed; `input` is one text, several, one list of token ids, or several. 2. Texts become token ids,
framed as the model's tokenizer frames them; token ids are taken as they are. What is too long is refused, or cut where
`truncate_prompt_tokens` says so: the beginning is kept, and the frame. 3. Each input is a readout; at most PART_INPUTS
of a request are open at once (router/reading.py). 4. The vectors go out as numbers or as base64 of little-endian
float32, in the order of the inputs. A client that leaves cancels what still runs.

The vector of an input depends on nothing but the input: asked again, or computed again elsewhere, it is the same.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final, Literal

import msgspec
from aiohttp import web
from msgspec import Meta

from protocol.errors import ContextTooLong, InvalidRequest
from protocol.readout import EmbeddingCard, ReadEmbedding, floats_of
from protocol.request import TokenId
from router.answers import AnswerWriter
from router.api import Short, parse
from router.core import Core
from router.generated import shaped
from router.reading import ReadQuery
from router.responses import encode_json
from router.text_threads import TextBudget
from router.tokenizer import Tokenizer

MAX_INPUTS: Final = 2048
PART_INPUTS: Final = 128


class EmbeddingsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /v1/embeddings.

    Attributes:
        truncate_prompt_tokens: cut what is longer, -1 to what the model takes; the default refuses it.
        normalize: whether vectors have length 1; the default is the model's own.
    """

    model: Annotated[str, Meta(max_length=1024)] | None = None
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    user: Annotated[str, Meta(max_length=4096)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: Short | None = None


class EmbeddingInputs:
    """Makes readouts of requests.

    Args:
        tokenizer: of the model that is served.
        max_tokens: of one input.
        card: what the workers say of their vectors.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, card: EmbeddingCard) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._card = card

    def queries(self, request: EmbeddingsRequest) -> list[ReadQuery]:
        """Return one query for each input.

        Raises:
            InvalidRequest: an input is empty or not in the vocabulary, or these dimensions cannot be had.
            ContextTooLong: an input is longer than the model takes.
        """
        if request.dimensions is not None and request.dimensions != self._card.size:
            raise InvalidRequest(
                f"dimensions: this model's vectors have {self._card.size}, and it was not trained to have them cut "
                f"to {request.dimensions}",
                "dimensions",
            )
        normalize = self._card.normalize if request.normalize is None else request.normalize
        readout = ReadEmbedding(pooling=self._card.pooling, normalize=normalize)
        parts = _split(request.input)
        TextBudget().spend(sum(len(part) for part in parts if isinstance(part, str)), "input")
        return [
            ReadQuery(tuple(self._tokens(part, request, f"input[{i}]" if len(parts) > 1 else "input")), readout)
            for i, part in enumerate(parts)
        ]

    def _tokens(self, part: str | list[int], request: EmbeddingsRequest, where: str) -> list[int]:
        if not part:
            raise InvalidRequest(f"{where}: must not be empty", "input")
        head: list[int] = []
        tail: list[int] = []
        if isinstance(part, str):
            adds_special = request.add_special_tokens is not False
            tokens = self._tokenizer.encode(part, adds_special)
            if adds_special and request.truncate_prompt_tokens is not None:
                head, tokens, tail = self._framed(tokens, self._tokenizer.encode(part, False))
        else:
            tokens = part
        tokens = self._cut(head, tokens, tail, request.truncate_prompt_tokens)
        if not tokens:
            raise InvalidRequest(f"{where}: the text has no tokens", "input")
        if max(tokens) >= self._tokenizer.vocab_size:
            raise InvalidRequest(f"{where}: token id {max(tokens)} is not in the vocabulary", "input")
        if len(tokens) > self._max_tokens:
            raise ContextTooLong(
                f"This model's maximum context length is {self._max_tokens} tokens, however you requested "
                f"{len(tokens)} tokens ({len(tokens)} in your prompt; 0 for the completion). Please reduce your "
                f"prompt; or completion length. (in {where})",
                "input",
            )
        return tokens

    def _cut(self, head: list[int], tokens: list[int], tail: list[int], limit: int | None) -> list[int]:
        if limit is None:
            return tokens
        if limit > self._max_tokens:
            raise InvalidRequest(
                f"truncate_prompt_tokens: {limit} is more than the {self._max_tokens} tokens that this model takes",
                "truncate_prompt_tokens",
            )
        room = (self._max_tokens if limit == -1 else limit) - len(head) - len(tail)
        if room < 1:
            raise InvalidRequest(
                f"truncate_prompt_tokens: {limit} leaves no room for a text between the {len(head) + len(tail)} tokens "
                f"that frame it",
                "truncate_prompt_tokens",
            )
        return head + tokens[:room] + tail

    @staticmethod
    def _framed(framed: list[int], plain: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Split a text's tokens into what stands before it, its own, and what stands after it."""
        for start in range(len(framed) - len(plain) + 1):
            if framed[start : start + len(plain)] == plain:
                return framed[:start], plain, framed[start + len(plain) :]
        return [], framed, []


class EmbeddingRoutes:
    """The handler of one router.

    Args:
        core: admits and carries out.
        writer: of answers.
        read: reads the body of a request.
        salt: makes of a client's salt one that no other tenant has.
    """

    def __init__(
        self,
        core: Core,
        writer: AnswerWriter,
        read: Callable[[web.Request], Awaitable[bytes]],
        salt: Callable[[web.Request, str], str],
    ) -> None:
        self._core = core
        self._writer = writer
        self._read = read
        self._salt = salt

    def add_to(self, app: web.Application) -> None:
        """Register the handler."""
        app.router.add_post("/v1/embeddings", self._embed)

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        arrived_s = time.monotonic()
        core = self._core
        await core.started()
        body = await self._read(request)
        found = await embed(
            core, len(body), lambda: parse(body, EmbeddingsRequest), partial(self._salt, request), arrived_s
        )
        with core.answering():
            return await self._writer.send(request, await shaped(core, parts_of(found)))


@dataclass(frozen=True, slots=True)
class Embedded:
    """What became of a request.

    Attributes:
        vectors: of each input in order, little-endian float32.
        num_tokens: of all inputs.
    """

    request: EmbeddingsRequest
    vectors: list[bytes]
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        """Size of all vectors."""
        return sum(map(len, self.vectors))


async def embed(
    core: Core,
    num_bytes: int,
    make: Callable[[], EmbeddingsRequest],
    salt: Callable[[str], str],
    arrived_s: float,
) -> Embedded:
    """Embed the inputs of a request; on cancellation every readout of it is cancelled.

    Args:
        core: of the router.
        num_bytes: length of what the client sent.
        make: parses it; may run in a thread.
        salt: makes of a client's salt one that no other tenant has.
        arrived_s: on the monotonic clock.

    Raises:
        RequestRejected, RequestFailed: it cannot be taken, or cannot be completed.
    """
    await core.started()

    def prepare(max_model_len: int) -> tuple[EmbeddingsRequest, list[ReadQuery]]:
        request = core.intake.named(make())
        card = core.embedding_card()
        # A decoder's context has room for one token of output, which an encoder's has not.
        max_tokens = max_model_len if card.is_encoder else max_model_len - 1
        return request, EmbeddingInputs(core.tokenizer, max_tokens, card).queries(request)

    request, queries = await core.admit_readouts(num_bytes, prepare, embeds=True)
    vectors: list[bytes] = []
    size, cache_salt = min(PART_INPUTS, core.max_num_requests), salt(request.cache_salt or "")
    for first in range(0, len(queries), size):
        session = core.open_readouts(queries[first : first + size], cache_salt, arrived_s)
        try:
            vectors += [readings.embedding for readings in await session.readings()]
        finally:
            session.close()
    return Embedded(request, vectors, sum(query.num_tokens for query in queries))


def parts_of(found: Embedded) -> Iterator[bytes]:
    """Give the body of the response, a vector at a time."""
    shape: Callable[[bytes], Any] = floats_of
    if found.request.encoding_format == "base64":
        shape = lambda vector: base64.b64encode(vector).decode()  # noqa: E731
    yield b'{"object":"list","data":['
    for index, vector in enumerate(found.vectors):
        data = {"object": "embedding", "index": index, "embedding": shape(vector)}
        yield (b"," if index else b"") + encode_json(data)
    usage = {"prompt_tokens": found.num_tokens, "total_tokens": found.num_tokens}
    yield b"]," + encode_json({"model": found.request.model, "usage": usage})[1:]


def _split(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Return the inputs: the four shapes that OpenAI allows become one."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequest("input: must not be empty", "input")
    if all(isinstance(part, int) for part in given):
        return [[part for part in given if isinstance(part, int)]]
    parts = [part for part in given if not isinstance(part, int)]
    if len(parts) != len(given) or len({type(part) for part in parts}) != 1:
        raise InvalidRequest("input: must be a string, token ids, or a list of one of these", "input")
    if len(parts) > MAX_INPUTS:
        raise InvalidRequest(f"input: at most {MAX_INPUTS} inputs in one request, found {len(parts)}", "input")
    return parts
