"""UCX workers driven by the event loop: no thread, no polling while idle.

    UcxContext ── settings, one device ── open() ──► UcxDriver: one UCX worker, for one link with one peer

    epoll fd readable, or work posted ──► _turn: a bounded number of progress calls ──► settle finished requests
                                            │ nothing left to do: arm(), sleep until the fd is readable
                                            │   (with GPU memory also look again soon, for a second after any work)
                                            └ more to do: go on in the next turn of the loop

    UcxDriver:  OPEN ──connect()──► LINKED ──end()──► ENDING, until UCX has let go of every buffer
                                                        ├ all at once: the worker is destroyed, its port with it
                                                        └ not at once: kept for the next link

Nobody is listened for: two workers' addresses travel over the authenticated channel, and each end makes an endpoint
of the other's. A worker of its own per link means that tags are matched among one peer's messages only, and that
what a link had open ends with it.

ucxx's own progress modes either spin or cost several times the CPU, so this uses its Cython layer, which is private:
the dependency is pinned to one minor release.

What UCX needs from us: a request is kept until it is complete, since dropping it does not stop UCX from writing into
its buffer. Receives that wait for a dead peer end when the endpoint is closed, and `cancel_inflight_requests` is
called after. Callbacks run inside progress, so they may only schedule. A request that closing the endpoint does not end
there and then (a large message that the peer was to fetch) ends a moment later, but ucxx 0.52 never forgets it, nor
the worker: such a worker is as good as new and serves the next link. On a GPU UCX also needs a CUDA context on the
event loop's thread before its own context is made: whoever has device slots has one.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from kvtransfer.ports import Ports, descriptors
from kvtransfer.transport import Buffer, Completion
from protocol.errors import ConfigError, PeerLost, TransferError

# Shared-memory copies happen inside progress calls, so one turn of the loop makes few of them, and stops early after
# a long one.
MAX_PROGRESS_PER_TURN = 8
LONG_TURN_S = 0.001
DRAIN_BUDGET_S = 1.0
# A copy through CUDA IPC says that it is done by a callback of the CUDA driver into UCX's file descriptor. Transfers
# that waited for ever for such a word are known (rapidsai/ucx-py#888), so while there is work we look ourselves too.
LOOK_S = 0.001
LOOK_FOR_S = 1.0
_CLOSE_BUDGET_NS = 10**9
_IDLE, _OPEN, _ENDING = "idle", "open", "ending"

RawEndpoint = Any  # ucxx's own, untyped
_FORSAKEN: list[UcxDriver] = []  # referenced until the process ends: UCX may still write into their buffers


class UcxApi(NamedTuple):
    """The parts of ucxx in use, imported only when this transport is chosen."""

    lib: Any
    array: Any
    tag: Any
    full_mask: Any
    error: type[Exception]
    truncated: type[Exception]


class UcxContext:
    """UCX with one set of options, on the running event loop.

    Raises:
        ConfigError: UCX refuses the options.
    """

    def __init__(self, api: UcxApi, options: dict[str, str]) -> None:
        self.api = api
        feature = api.lib.Feature
        self._options = options
        try:
            self.raw = api.lib.UCXContext(options, feature_flags=(feature.TAG, feature.WAKEUP))
        except (api.error, RuntimeError) as error:
            raise ConfigError(f"UCX cannot start with these settings ({options}): {error}") from error
        self.device_transports = offered_device_transports(self.raw)
        self._drivers: set[UcxDriver] = set()
        self._idle: list[UcxDriver] = []

    @property
    def num_pending(self) -> int:
        """Requests whose buffers UCX may still touch."""
        return sum(driver.num_pending for driver in self._drivers)

    def open(self, peer_address: str) -> UcxDriver:
        """Return a worker for a link. The peer's address is the only one that may connect to its port, if it has any.

        Raises:
            ConfigError: UCX refuses the options.
        """
        try:
            driver = self._idle.pop() if self._idle else UcxDriver(self)
        except (self.api.error, RuntimeError) as error:
            raise ConfigError(f"UCX cannot start with these settings ({self._options}): {error}") from error
        self._drivers.add(driver)
        driver.begin(peer_address)
        return driver

    def take_back(self, driver: UcxDriver, *, is_reusable: bool) -> None:
        """Take a driver back that has let go of every buffer."""
        self._drivers.discard(driver)
        if is_reusable:
            self._idle.append(driver)

    async def close(self) -> None:
        """End every link and wait, briefly, until UCX has let go of every buffer."""
        for driver in list(self._drivers):
            driver.end()
        if self._drivers:
            await asyncio.wait({driver.ended for driver in self._drivers}, timeout=DRAIN_BUDGET_S)
        for driver in list(self._drivers):
            driver.forsake()


class UcxDriver:
    """A UCX worker, and the endpoint of the link that it serves.

    Attributes:
        address: of the worker, for the peer to connect to.
        ended: done when the link is over and UCX has let go of every buffer.
    """

    def __init__(self, context: UcxContext) -> None:
        self._context = context
        self._api = context.api
        self._loop = asyncio.get_running_loop()
        before = descriptors()
        self._worker = context.api.lib.UCXWorker(context.raw)
        self._worker.init_blocking_progress_mode()
        self._ports = Ports(descriptors() - before)
        self.address: bytes = self._worker.address.tobytes()
        self._fd: int = self._worker.epoll_file_descriptor
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._endpoint: RawEndpoint = None
        self._pending: dict[Any, tuple[Completion, Buffer]] = {}
        self._is_scheduled = False
        self._state = _IDLE
        self._is_kept = False  # by a request of some link that did not end at once
        self._worked_s = 0.0
        self._look: asyncio.TimerHandle | None = None

    @property
    def num_pending(self) -> int:
        """Requests whose buffers UCX may still touch."""
        return len(self._pending)

    def begin(self, peer_address: str) -> None:
        """Serve a link."""
        self.ended = self._loop.create_future()
        self._ports.admit(peer_address)
        self._state = _OPEN
        self._loop.add_reader(self._fd, self._readable)
        self._kick()

    def connect(self, address: bytes) -> None:
        """Make the endpoint, of the address of the peer's worker. That it leads anywhere shows with the first payload.

        Raises:
            PeerLost: it is no address, or there is no way to it with these options.
        """
        try:
            there = self._api.lib.UCXAddress.create_from_buffer(address)
            self._endpoint = self._api.lib.UCXEndpoint.create_from_worker_address(self._worker, there, True)
        except (self._api.error, RuntimeError) as error:
            raise PeerLost(f"cannot make a UCX endpoint of the peer's address: {error}") from error
        self._kick()

    def shut_ports(self) -> None:
        """Let nobody connect to this worker any more; what is connected stays."""
        self._ports.shut()

    def send(self, buffer: Buffer, tag: int) -> Completion:
        """Send under a tag."""
        return self._submit(lambda endpoint, array: endpoint.tag_send(array, self._api.tag(tag)), buffer)

    def receive(self, buffer: Buffer, tag: int) -> Completion:
        """Post a receive on the endpoint: one posted on the worker would outlive the link."""
        matched, mask = self._api.tag(tag), self._api.full_mask
        return self._submit(lambda endpoint, array: endpoint.tag_recv(array, matched, mask), buffer)

    def watch(self, on_closed: Callable[[], None]) -> None:
        """Call `on_closed` from the event loop once UCX finds the endpoint dead, or soon if it is dead already.

        Where payload goes through shared memory it never may: the channel is the witness of that.
        """

        def schedule() -> None:
            if self._state == _OPEN:
                self._loop.call_soon(on_closed)

        self._endpoint.set_close_callback(schedule)
        if not self._endpoint.alive:
            schedule()

    def end(self) -> None:
        """Force the endpoint shut, without flush; requests fail now or soon. Never from inside progress."""
        if self._state != _OPEN:
            return
        self._state = _ENDING
        self._ports.shut()
        if self._endpoint is not None:
            self._endpoint.remove_close_callback()
            self._endpoint.close_blocking(period=_CLOSE_BUDGET_NS, max_attempts=1)
        self._worker.cancel_inflight_requests()
        self._reap()
        self._is_kept = self._is_kept or bool(self._pending)
        self._worked_s = self._loop.time()
        self._kick()

    def forsake(self) -> None:
        """Leave the event loop although UCX has not let go of everything: the requests and buffers stay referenced."""
        self._leave_loop()
        _FORSAKEN.append(self)

    def _retire(self) -> None:
        self._leave_loop()
        self._state, self._endpoint = _IDLE, None
        if not self._is_kept:
            self._worker = None  # destroys it
        self._context.take_back(self, is_reusable=self._is_kept)
        self.ended.set_result(None)

    def _leave_loop(self) -> None:
        self._loop.remove_reader(self._fd)
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _submit(self, start: Callable[[RawEndpoint, Any], Any], buffer: Buffer) -> Completion:
        done = Completion(loop=self._loop)
        # What is posted on an endpoint that UCX found dead before is not cancelled with it: it would stay for ever.
        if self._state != _OPEN or not self._endpoint.alive:
            done.finish(PeerLost("payload connection closed"))
            return done
        self._worked_s = self._loop.time()
        try:
            request = start(self._endpoint, self._api.array(buffer))
        except self._api.error as error:
            done.finish(self._lost(error))
            return done
        except ValueError as error:  # device memory, and no transport that takes it
            done.finish(TransferError(str(error)))
            return done
        if request.completed:
            self._settle(request, done)
        else:
            self._pending[request] = (done, buffer)
            self._kick()
        return done

    def _readable(self) -> None:
        self._worked_s = self._loop.time()
        self._turn()

    def _turn(self) -> None:
        self._is_scheduled = False
        long_s = time.perf_counter() + LONG_TURN_S
        for _ in range(MAX_PROGRESS_PER_TURN):
            if self._state == _IDLE:
                return
            if not self._worker.progress_once():
                self._reap()
                if self._state == _ENDING and not self._pending:
                    self._retire()
                elif self._worker.arm():
                    self._look_again()
                    return
            if time.perf_counter() > long_s:
                break
        self._reap()
        self._kick()

    def _look_again(self) -> None:
        """Where the file descriptor alone is not to be trusted, turn once more in a millisecond.

        That is with device memory, and while requests end that nothing may come for any more.
        """
        is_doubtful = bool(self._context.device_transports) or self._state == _ENDING
        is_at_work = self._pending and self._loop.time() - self._worked_s < LOOK_FOR_S
        if is_doubtful and is_at_work and self._look is None:
            self._look = self._loop.call_later(LOOK_S, self._looked)

    def _looked(self) -> None:
        self._look = None
        self._kick()

    def _kick(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._turn)

    def _reap(self) -> None:
        for request in [request for request in self._pending if request.completed]:
            done, _ = self._pending.pop(request)
            self._settle(request, done)

    def _settle(self, request: Any, done: Completion) -> None:
        try:
            request.check_error()
        except self._api.truncated:
            done.finish(TransferError("payload longer than the receive posted for it"))
        except self._api.error as error:
            done.finish(self._lost(error))
        else:
            done.finish()

    def _lost(self, error: Exception) -> PeerLost:
        return PeerLost(f"{type(error).__name__}: {error}")


def offered_device_transports(context: Any) -> frozenset[str]:
    """Return which of UCX's CUDA transports a context really has.

    Naming them in UCX_TLS is not enough: without its CUDA module, which needs the driver's and NVML's libraries, UCX
    takes a pointer into GPU memory for one into host memory and crashes on it.
    """
    found = re.findall(r"-- (cuda_copy|cuda_ipc)/", context.info) if context.cuda_support else []
    return frozenset(found)
