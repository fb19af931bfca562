"""A prefill and a decode stepper with real arithmetic, and the copying in between, for tests of both."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from decode.scheduler import DecodeScheduler
from decode.stepper import (
    Abandoned,
    DecodeEmission,
    DecodeStepper,
    GaveWay,
    Granted,
    JoinBatch,
    NoRoom,
    ReserveBlocks,
    StepRows,
)
from engine.block_pool import BlockPool
from engine.decode_runner import HostDecodeRunner
from engine.grammar import GrammarBackend, GrammarBudgets, GrammarLanes, GrammarState
from engine.kv_cache import KVCache
from engine.loading import LoadedModel
from engine.placement import Failure, sequence_of
from engine.runner import Runner
from engine.sequence import Sequence
from prefill.scheduler import PrefillJob, PrefillScheduler
from prefill.stepper import (
    CellsReady,
    FirstTokenReady,
    PrefillEmission,
    PrefillStepper,
    Started,
    Submit,
    TransferEnded,
    layer_groups,
)
from protocol.request import FinishReason, SamplingParams, TokenRow
from protocol.wire import Prefill, Reserve


class Pair:
    """The two steppers, without threads or sockets."""

    def __init__(self, model: LoadedModel, *, chunk_tokens: int = 16, decode_blocks: int | None = None) -> None:
        self.model = model
        self.from_prefill: list[PrefillEmission] = []
        self.from_decode: list[DecodeEmission] = []
        size = model.fingerprint.block_size
        self.prefill_kv, pool = model.new_kv_cache(), BlockPool(model.num_blocks)
        self.prefill = PrefillStepper(
            Runner(model.decoder, self.prefill_kv),
            pool,
            PrefillScheduler(pool, size, chunk_tokens),
            self.from_prefill.append,
            block_size=size,
            layer_groups=layer_groups(model.fingerprint.num_layers, 2),
            layer_push_min_tokens=8,
            max_model_len=model.max_model_len,
        )
        self.decode_kv = KVCache(model.fingerprint, decode_blocks or model.num_blocks, model.device)
        self.decode_pool = BlockPool(decode_blocks or model.num_blocks)
        scheduler = DecodeScheduler(self.decode_pool, size, 16, 0, model.max_model_len)
        runner = HostDecodeRunner(Runner(model.decoder, self.decode_kv))
        self.decode = DecodeStepper(runner, self.decode_pool, scheduler, self.from_decode.append)
        self.grammars: GrammarBackend | None = None
        self.budgets: GrammarBudgets | None = None
        self.lanes: GrammarLanes | None = None
        self.failed: list[tuple[int, Failure | None]] = []
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, FinishReason | None] = {}
        self.rows: dict[int, list[TokenRow]] = {}

    def place(
        self,
        transfer_id: int,
        prompt: list[int],
        sampling: SamplingParams,
        emitted: list[int],
        is_replayed: bool = True,
    ) -> bool:
        """Prefill a prompt, copy what decode lacks, and let it join; False when decode has no room.

        What was emitted before is replayed by decode, or computed by prefill.
        """
        reserve = Reserve(
            request_id=transfer_id, transfer_id=transfer_id, epoch=1, prefill_worker_id="p", prompt=tuple(prompt),
            emitted=tuple(emitted), is_replayed=is_replayed, sampling=sampling,
        )  # fmt: skip
        self.decode.handle(ReserveBlocks(self._sequence_of(reserve), "p"))
        granted = self.from_decode.pop()
        if isinstance(granted, NoRoom):
            return False
        assert isinstance(granted, Granted)
        self.begin(transfer_id, prompt, sampling, () if is_replayed else emitted)
        while self.prefill.step() or self.prefill.is_waiting or self.prefill.num_behind:
            pass
        first = self._copy(granted)
        self.tokens[transfer_id] = list(emitted) + (first if not emitted or not is_replayed else [])
        self.prefill.handle(TransferEnded(transfer_id))
        self.decode.handle(JoinBatch(transfer_id, first[0]))
        return True

    def begin(self, transfer_id: int, prompt: list[int], sampling: SamplingParams, emitted: Iterable[int] = ()) -> None:
        """Submit a prompt to prefill, with what was emitted before and is computed there."""
        message = Prefill(
            request_id=transfer_id, transfer_id=transfer_id, epoch=1, decode_worker_id="d", prompt=tuple(prompt),
            emitted=tuple(emitted), sampling=sampling, deadline_s=1.0,
        )  # fmt: skip
        now_s = time.monotonic()
        self.prefill.handle(Submit(PrefillJob(self._sequence_of(message), "d", now_s, now_s + 1)))

    def _sequence_of(self, message: Prefill | Reserve) -> Sequence:
        grammar = None
        if message.sampling.grammar is not None:
            assert self.grammars is not None
            compiled = self.grammars.compile(message.sampling.grammar)
            num_words = -(-self.model.vocab_size // 32)
            grammar = GrammarState(compiled.matcher(), message.sampling, num_words, self.budgets, self.lanes)
            place = 0
            while place < len(message.emitted):
                place = grammar.replay(message.emitted, place)
            grammar.prepare()
        return sequence_of(message, self.model, grammar)

    def _copy(self, granted: Granted) -> list[int]:
        started, cells = None, []
        first: list[int] = []
        for emission in self.from_prefill:
            if isinstance(emission, Started):
                started = emission
            elif isinstance(emission, CellsReady):
                cells.append(emission.cells)
            elif isinstance(emission, FirstTokenReady):
                first.append(emission.row.token_id)
        self.from_prefill.clear()
        assert started is not None
        covered = np.zeros((len(started.block_ids), self.model.fingerprint.num_layers), dtype=int)
        for c in cells:
            blocks = range(c.first_block, c.first_block + c.num_blocks)
            covered[c.first_block : c.first_block + c.num_blocks, c.first_layer : c.first_layer + c.num_layers] += 1
            slab = np.zeros(c.num_blocks * c.num_layers * self.model.fingerprint.layer_bytes, np.uint8)
            self.prefill_kv.gather([started.block_ids[b] for b in blocks], c.first_layer, c.num_layers, slab)
            keep = [b for b in blocks if b >= granted.reserved.num_cached_blocks]
            rows = slab.reshape(c.num_blocks, -1)[c.num_blocks - len(keep) :]
            self.decode_kv.scatter(
                [granted.reserved.block_ids[b] for b in keep], c.first_layer, c.num_layers, rows.reshape(-1)
            )
        assert (covered == 1).all(), "every cell is announced exactly once"
        return first

    def run(self, num_steps: int = 10_000) -> list[int]:
        """Step decode until idle or as often as told; return the transfers that gave way."""
        gave_way: list[int] = []
        while num_steps > 0:
            if self.decode.step():
                num_steps -= 1
            elif not self.decode.is_waiting and not self.decode.num_behind:
                break
            for emission in self.from_decode:
                if isinstance(emission, GaveWay):
                    gave_way.append(emission.transfer_id)
                elif isinstance(emission, StepRows):
                    self._take(emission)
                elif isinstance(emission, Abandoned):
                    self.failed.append((emission.transfer_id, emission.failure))
            self.from_decode.clear()
        return gave_way

    def _take(self, emission: StepRows) -> None:
        for transfer_id, row in emission.rows:
            assert row.index == len(self.tokens[transfer_id])
            self.tokens[transfer_id].append(row.token_id)
            self.reasons[transfer_id] = row.finish_reason
            self.rows.setdefault(transfer_id, []).append(row)


def prompt_of(seed: int, length: int) -> list[int]:
    """Give a random prompt."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, 256, length)]


def params(seed: int, max_tokens: int = 20, temperature: float = 0.0) -> SamplingParams:
    """Give plain sampling parameters."""
    return SamplingParams(seed=seed, temperature=temperature, max_tokens=max_tokens)
