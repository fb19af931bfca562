"""From a placement on the wire to a sequence, and what a worker refuses whoever asks.

A placement without a grammar becomes a sequence at once. One with a grammar becomes one when that is compiled, and what
was emitted before is replayed into it; meanwhile others pass by. An abort in between leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from engine.grammar import GrammarState
from engine.loading import LoadedModel
from engine.sequence import Sequence
from protocol.block_hash import block_hashes, root_hash
from protocol.errors import GrammarError, GrammarUnavailable
from protocol.readout import Pooling, ReadEmbedding, ReadLabels
from protocol.wire import GrammarFailed, Prefill, Reserve, TransferFailed

MAX_REASON_CHARS: Final = 4000

Placement = TypeVar("Placement", Prefill, Reserve)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a placement ended before its time.

    Attributes:
        is_of_grammar: its grammar failed, as it would anywhere; else it may be placed again.
    """

    reason: str
    is_of_grammar: bool = False

    def message(self, transfer_id: int) -> GrammarFailed | TransferFailed:
        """Return what the router is told."""
        kind = GrammarFailed if self.is_of_grammar else TransferFailed
        return kind(transfer_id=transfer_id, reason=self.reason[:MAX_REASON_CHARS])


class Placing(Generic[Placement]):
    """Turns one worker's placements into sequences; used on its event loop.

    Args:
        model: which is to run them.
        is_held: whether a placement is still wanted.
        fail: ends a placement that cannot be run here, and reports why: a failed grammar fails everywhere.
        wake: lets the stepper look again; called on any thread when a slow grammar has gone on.
    """

    def __init__(
        self,
        model: LoadedModel,
        is_held: Callable[[int], bool],
        fail: Callable[[int, Failure], None],
        wake: Callable[[], None],
    ) -> None:
        self._model = model
        self._is_held = is_held
        self._fail = fail
        self._wake = wake
        self._tasks: set[asyncio.Task[None]] = set()

    def place(self, message: Placement, ready: Callable[[Placement, Sequence], None]) -> None:
        """Call `ready` with the sequence of a placement: now, or soon if it has a grammar. Never blocks."""
        if message.sampling.grammar is None:
            ready(message, sequence_of(message, self._model))
            return
        task = asyncio.create_task(self._compile(message, ready), name=f"grammar of {message.transfer_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Forget what is not ready."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compile(self, message: Placement, ready: Callable[[Placement, Sequence], None]) -> None:
        try:
            if self._model.grammars is None:
                raise GrammarUnavailable("this worker has no vocabulary to compile grammars for")
            grammar = await self._model.grammars.state_of(message.sampling, message.emitted)
        except (GrammarError, GrammarUnavailable) as error:
            if self._is_held(message.transfer_id):
                self._fail(message.transfer_id, Failure(f"grammar: {error}", isinstance(error, GrammarError)))
            return
        if self._is_held(message.transfer_id):
            if grammar is not None:
                grammar.on_settled = self._wake
            ready(message, sequence_of(message, self._model, grammar))


def refusal_of(message: Prefill | Reserve, model: LoadedModel) -> str | None:
    """Return why this model cannot take a placement, or None.

    The router checks the same against the tokenizer; a worker must not index out of its tables all the same.
    """
    num_tokens = len(message.prompt) + len(message.emitted)
    sampling, readout = message.sampling, message.readout if isinstance(message, Prefill) else None
    # What is only read needs no room for a token after it.
    max_tokens = model.max_model_len - (readout is None)
    if not message.prompt or num_tokens > max_tokens:
        return f"{num_tokens} tokens; this worker takes 1 to {max_tokens}"
    if isinstance(readout, ReadEmbedding) and readout.pooling is Pooling.CLS:
        return "the first token of a decoder has seen nothing: cls pooling is for encoders"
    if readout is not None and isinstance(message, Prefill) and message.decode_worker_id is not None:
        return "a readout has no decode worker"
    largest = max(
        *message.prompt,
        *message.emitted,
        *sampling.stop_token_ids,
        *sampling.eos_token_ids,
        *(token_id for token_id, _ in sampling.logit_bias),
        *(readout.token_ids if isinstance(readout, ReadLabels) else ()),
        0,
    )
    return f"token id {largest} is not in the vocabulary of {model.vocab_size}" if largest >= model.vocab_size else None


def sequence_of(message: Prefill | Reserve, model: LoadedModel, grammar: GrammarState | None = None) -> Sequence:
    """Return the sequence of a placement, its full blocks named; tokens emitted before follow the prompt.

    Args:
        message: the placement.
        model: which is to run it.
        grammar: the state of its grammar after what was emitted before, if it has one.

    Costs about a microsecond per block: called on the event loop, so that the compute thread need not hash.
    """
    tokens = [*message.prompt, *message.emitted]
    is_replayed = isinstance(message, Reserve) and message.is_replayed
    root = root_hash(model.fingerprint.model_hash, message.cache_salt)
    return Sequence(
        request_id=message.request_id,
        transfer_id=message.transfer_id,
        epoch=message.epoch,
        tokens=tokens,
        num_prompt_tokens=len(message.prompt),
        num_prefill_tokens=len(message.prompt) if is_replayed else len(tokens),
        sampling=message.sampling,
        readout=message.readout if isinstance(message, Prefill) else None,
        root=root,
        names=block_hashes(tokens, model.fingerprint.block_size, root),
        grammar=grammar,
    )
