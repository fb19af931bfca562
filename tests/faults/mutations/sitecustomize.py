"""Changes single functions of the product in every process that starts with this folder on PYTHONPATH.

    BATON_TEST_MUTATION=no-checksum,flip-bits PYTHONPATH=tests/faults/mutations baton serve ...

What a mutation draws follows from BATON_TEST_MUTATION_SEED (0) and from the order of events in its process.

Python imports `sitecustomize` at its start. A finder stands before the ordinary ones, and once a module of the table
has been executed the named functions in it are replaced. The product knows nothing of it. See README.md beside this.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.abc
import importlib.machinery
import itertools
import os
import random
import signal
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

LATE_S = 0.15
CONTROL_LATE_S = 0.05
STEPS_UNTIL_FAILURE = 30
HOUR_S = 3600.0
TRACED_FRAMES = 6
HEAP_FOLDER = os.environ.get("BATON_TEST_HEAP", ".")
SEED = os.environ.get("BATON_TEST_MUTATION_SEED", "0")


def no_checksum(module: Any) -> None:
    """Receivers write every piece, whatever its checksum."""

    def scatter(self: Any, link: Any, piece: Any, payload: Any, block_ids: tuple[int, ...]) -> None:
        self._region.scatter(block_ids, piece.first_layer, piece.num_layers, payload)

    module.ReceiveSide._scatter = scatter


def flip_bits(module: Any) -> None:
    """Senders flip one bit of every piece, after its checksum was taken; a piece that is sent again stays whole."""
    fill, dice, seen = module.SendSide._fill, random.Random(f"flip-bits {SEED}"), set()

    def fill_and_flip(self: Any, payload: Any, peer: Any, transfer: Any, cells: Any, tag: int) -> Any:
        piece = fill(self, payload, peer, transfer, cells, tag)
        if (transfer.transfer_id, cells) not in seen:
            seen.add((transfer.transfer_id, cells))
            payload[dice.randrange(payload.nbytes)] ^= 1 << dice.randrange(8)
            print("FLIPPED a bit", flush=True)
        return piece

    module.SendSide._fill = fill_and_flip


def late_landed(module: Any) -> None:
    """Prefill workers notice LANDED late, so that a kill can hit the time between COMMIT and release."""
    take = module.SendSide._take_landed

    def take_late(self: Any, peer: Any, transfer_id: int) -> None:
        asyncio.get_running_loop().call_later(LATE_S, take, self, peer, transfer_id)

    module.SendSide._take_landed = take_late


def no_lease(module: Any) -> None:
    """What a router placed on a worker is held for ever."""
    module.LeaseTable.expire = lambda self, now_s: []


def no_replay(module: Any) -> None:
    """A stream that is placed again begins without what its client has."""
    reserve, prefill = module.Submission.reserve, module.Submission.prefill
    module.Submission.reserve = lambda self, t, e, p, emitted, r: reserve(self, t, e, p, (), False)
    module.Submission.prefill = lambda self, t, e, d, emitted, now_s: prefill(self, t, e, d, (), now_s)


def no_fencing_of_tokens(module: Any) -> None:
    """The router delivers whatever a worker says of a request, of whichever placement and index."""

    def tokens(self: Any, key: Any, rows: Any, now_s: float) -> list[Any]:
        out = []
        for row in rows:
            request = self._requests.get(row.request_id)
            if request is not None:
                request.tokens.append(row.token_id)
                out.append(module.Deliver(row.request_id, row))
                if row.finish_reason is not None:
                    out += self._end(request, module.Finish(row.request_id, row.finish_reason), "finished")
        return out

    module.Dispatch.tokens = tokens


def no_fencing_of_instances(module: Any) -> None:
    """The router goes on listening to an instance that it has given up, and keeps its leases alive."""
    lose, pulse = module.Switchboard.lose, module.Switchboard.pulse

    def lose_and_listen(self: Any, key: Any, reason: str) -> None:
        channel = self._channels.pop(key, None)
        if channel is not None:
            self.__dict__.setdefault("zombies", []).append(channel)
        lose(self, key, reason)

    def pulse_all(self: Any) -> None:
        pulse(self)
        for channel in self.__dict__.get("zombies", ()):
            channel.post(module.Pulse())

    def take(self: Any, key: Any, message: Any) -> None:
        if self.registry.find(key) is not None:
            original(self, key, message)
        elif isinstance(message, module.Tokens):
            self._run(self.dispatch.tokens(key, message.rows, self._clock()))

    original = module.Switchboard.take
    module.Switchboard.lose, module.Switchboard.pulse, module.Switchboard.take = lose_and_listen, pulse_all, take


def hang_step(module: Any) -> None:
    """A decode worker's compute thread sleeps for ever after SIGUSR1, while its event loop beats on."""
    step = module.DecodeStepper.step
    is_hung: list[bool] = []
    signal.signal(signal.SIGUSR1, lambda *_: is_hung.append(True))

    def step_or_hang(self: Any) -> bool:
        while is_hung:
            time.sleep(1.0)
        return bool(step(self))

    module.DecodeStepper.step = step_or_hang


def fail_step(module: Any) -> None:
    """A decode worker's step raises once it has done so many after SIGUSR2, as a broken device would let it."""
    collect = module.DecodeStepper._collect
    left: list[int] = []
    signal.signal(signal.SIGUSR2, lambda *_: left.extend(range(STEPS_UNTIL_FAILURE)))

    def collect_or_fail(self: Any, flight: Any) -> None:
        if left and left.pop() == 0:
            raise RuntimeError("the device is broken, says a mutation")
        collect(self, flight)

    module.DecodeStepper._collect = collect_or_fail


def delay_control(module: Any) -> None:
    """Each message of a channel is on its way for up to `CONTROL_LATE_S`; none overtakes another."""
    write, dice = module.Channel._write, random.Random(f"delay-control {SEED}")

    async def write_late(self: Any) -> None:
        loop, queue = asyncio.get_running_loop(), self._queue
        due: deque[float] = deque([loop.time()] * queue.qsize())
        put, get = queue.put_nowait, queue.get

        def put_nowait(data: bytes | None) -> None:
            due.append(loop.time() + dice.uniform(0.0, CONTROL_LATE_S))
            put(data)

        async def get_late() -> bytes | None:
            data: bytes | None = await get()
            await asyncio.sleep(max(0.0, due.popleft() - loop.time()))
            return data

        queue.put_nowait, queue.get = put_nowait, get_late
        await write(self)

    module.Channel._write = write_late
    print("LATE messages from here on", flush=True)


def heap_profile(module: Any) -> None:
    """The router traces its heap; each SIGUSR1 writes a snapshot into `HEAP_FOLDER`, numbered from 0."""
    run, numbers = module.run, itertools.count()

    def dump(*_: object) -> None:
        gc.collect()
        path = os.path.join(HEAP_FOLDER, f"{next(numbers)}.heap")
        tracemalloc.take_snapshot().dump(f"{path}.part")
        os.replace(f"{path}.part", path)

    async def run_traced(*arguments: Any) -> int:
        tracemalloc.start(TRACED_FRAMES)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, dump)
        code: int = await run(*arguments)
        return code

    module.run = run_traced


def wall_clock() -> None:
    """The wall clock jumps an hour back and forth with every look at it; nobody may reckon with it."""
    true_time, looks = time.time, iter(range(sys.maxsize))
    print("JUMPING clocks from here on", flush=True)
    time.time = lambda: true_time() + (HOUR_S if next(looks) % 2 else -HOUR_S)


Change = Callable[[Any], None]
MUTATIONS: dict[str, dict[str, Change]] = {
    "no-checksum": {"kvtransfer.receiving": no_checksum},
    "flip-bits": {"kvtransfer.sending": flip_bits},
    "late-landed": {"kvtransfer.sending": late_landed},
    "no-lease": {"protocol.lease": no_lease},
    "no-replay": {"router.instructions": no_replay},
    "no-fencing": {"router.dispatch": no_fencing_of_tokens, "router.switchboard": no_fencing_of_instances},
    "hang-step": {"decode.stepper": hang_step},
    "fail-step": {"decode.stepper": fail_step},
    "delay-control": {"protocol.channel": delay_control},
    "heap-profile": {"router.app": heap_profile},
    "wall-clock": {},
}
AT_START: dict[str, Callable[[], None]] = {"wall-clock": wall_clock}


class _Loader(importlib.abc.Loader):
    """Loads a module as ever, then changes it."""

    def __init__(self, inner: importlib.abc.Loader, changes: Sequence[Change]) -> None:
        self._inner = inner
        self._changes = changes

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        for change in self._changes:
            change(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Stands before the ordinary finders for the modules to be changed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._changes: dict[str, list[Change]] = {}
        for name in names:
            for module, change in MUTATIONS[name].items():
                self._changes.setdefault(module, []).append(change)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        changes = self._changes.get(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if changes else None
        if changes and spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, changes)
        return spec


if _names := [name for name in os.environ.get("BATON_TEST_MUTATION", "").split(",") if name]:
    sys.meta_path.insert(0, _Finder(_names))
    for _name in _names:
        AT_START.get(_name, lambda: None)()
