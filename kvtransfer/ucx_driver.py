"""One UCX worker driven by the event loop: no thread, no polling while idle.

    epoll fd readable, or work posted ──► _turn: a bounded number of progress calls ──► settle finished requests
                                            │ nothing left to do: arm(), sleep until the fd is readable
                                            │   (with GPU memory also look again soon, for a second after any work)
                                            └ more to do: go on in the next turn of the loop

ucxx's own progress modes either spin or cost several times the CPU, so this uses its Cython layer, which is private:
the dependency is pinned to one minor release.

What UCX needs from us: a request is kept until it is complete, since dropping it does not stop UCX from writing into
its buffer; receives that wait for a dead peer end only by `cancel_inflight_requests` after the close callback; and
callbacks run inside progress, so they may only schedule. On a GPU it also needs a CUDA context on the event loop's
thread before its own context is made: whoever has device slots has one.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kvtransfer.transport import Buffer, Completion
from protocol.errors import ConfigError, PeerLost, TransferError

# Shared-memory copies happen inside progress calls, so one turn of the loop makes few of them, and stops early after
# a long one.
MAX_PROGRESS_PER_TURN = 8
LONG_TURN_S = 0.001
ADMISSION_BUDGET_S = 2.0
MAX_UNADMITTED = 64
DRAIN_BUDGET_S = 1.0
TOKEN_BYTES = 32
# A copy through CUDA IPC says that it is done by a callback of the CUDA driver into UCX's file descriptor. Transfers
# that waited for ever for such a word are known (rapidsai/ucx-py#888), so while there is work we look ourselves too.
CUDA_LOOK_S = 0.001
CUDA_LOOK_FOR_S = 1.0
_CLOSE_BUDGET_NS = 10**9

RawEndpoint = Any  # ucxx's own, untyped


class UcxApi(NamedTuple):
    """The parts of ucxx in use, imported only when this transport is chosen."""

    lib: Any
    array: Any
    tag: Any
    full_mask: Any
    error: type[Exception]
    truncated: type[Exception]


class UcxDriver:
    """A UCX context and worker on the running event loop."""

    def __init__(self, api: UcxApi, options: dict[str, str]) -> None:
        self._api = api
        self._loop = asyncio.get_running_loop()
        feature = api.lib.Feature
        try:
            self._context = api.lib.UCXContext(options, feature_flags=(feature.TAG, feature.STREAM, feature.WAKEUP))
            self._worker = api.lib.UCXWorker(self._context)
            self._worker.init_blocking_progress_mode()
        except (api.error, RuntimeError) as error:
            raise ConfigError(f"UCX cannot start with these settings ({options}): {error}") from error
        self.device_transports = offered_device_transports(self._context)
        self._fd: int = self._worker.epoll_file_descriptor
        self._pending: dict[Any, tuple[Completion, Buffer]] = {}
        self._listener: Any = None
        self._expected: dict[bytes, asyncio.Future[RawEndpoint]] = {}
        self._admitting: set[asyncio.Task[None]] = set()
        self._is_scheduled = False
        self._is_closed = False
        self._worked_s = 0.0
        self._look: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._fd, self._readable)
        self._kick()

    @property
    def num_pending(self) -> int:
        """Requests whose buffers UCX may still touch."""
        return len(self._pending)

    def listen(self) -> int:
        """Open the payload port, once, and return it. ucxx binds it to every address: only a token admits."""
        if self._listener is None:
            self._listener = self._api.lib.UCXListener.create(
                worker=self._worker, port=0, cb_func=self._accepted, deliver_endpoint=True
            )
        return int(self._listener.port)

    def expect(self, token: bytes) -> asyncio.Future[RawEndpoint]:
        """Return a future for the connection that will present this one-time token; cancel it to forget."""
        waiting = self._expected[token] = self._loop.create_future()
        waiting.add_done_callback(lambda _: self._expected.pop(token, None))
        return waiting

    async def connect(self, host: str, port: int, token: bytes) -> RawEndpoint:
        """Connect to a payload port and present the token. The caller bounds the time.

        Raises:
            PeerLost: refused, unreachable, or not taken.
        """
        try:
            endpoint = self._api.lib.UCXEndpoint.create(self._worker, host, port, True)
        except self._api.error as error:
            raise PeerLost(f"cannot open a UCX connection to {host}:{port}: {error}") from error
        source = np.frombuffer(token, np.uint8).copy()
        sent = self._submit(endpoint, endpoint.stream_send, source)
        try:
            await asyncio.wait({sent})
            sent.result()
        except BaseException:
            self.close_endpoint(endpoint)
            raise
        return endpoint

    def send(self, endpoint: RawEndpoint, buffer: Buffer, tag: int) -> Completion:
        """Send under a tag."""
        return self._submit(endpoint, lambda array: endpoint.tag_send(array, self._api.tag(tag)), buffer)

    def receive(self, endpoint: RawEndpoint, buffer: Buffer, tag: int) -> Completion:
        """Post a receive on the endpoint: one posted on the worker would outlive the peer."""
        matched, mask = self._api.tag(tag), self._api.full_mask
        return self._submit(endpoint, lambda array: endpoint.tag_recv(array, matched, mask), buffer)

    def watch(self, endpoint: RawEndpoint, on_closed: Callable[[], None]) -> None:
        """Call `on_closed` from the event loop once UCX finds the endpoint dead, or soon if it is dead already."""

        def schedule() -> None:
            if not self._is_closed:
                self._loop.call_soon(closed)

        def closed() -> None:
            self._cancel_orphans()
            on_closed()

        endpoint.set_close_callback(schedule)
        if not endpoint.alive:
            schedule()

    def close_endpoint(self, endpoint: RawEndpoint) -> None:
        """Force the endpoint shut, without flush; its requests fail in the next turns. Never from inside progress."""
        if self._is_closed:
            return
        endpoint.remove_close_callback()
        endpoint.close_blocking(period=_CLOSE_BUDGET_NS, max_attempts=1)
        self._cancel_orphans()

    async def close(self) -> None:
        """Stop listening and wait, briefly, until UCX has let go of every buffer. Close the endpoints first."""
        if self._is_closed:
            return
        for task in list(self._admitting):
            task.cancel()
        if self._admitting:
            await asyncio.wait(self._admitting)
        self._listener = None
        give_up_s = time.monotonic() + DRAIN_BUDGET_S
        while self._pending and time.monotonic() < give_up_s:
            self._cancel_orphans()
            await asyncio.sleep(0.001)
        self._is_closed = True
        self._loop.remove_reader(self._fd)
        if self._look is not None:
            self._look.cancel()

    def _submit(self, endpoint: RawEndpoint, start: Callable[[Any], Any], buffer: Buffer) -> Completion:
        done = Completion(loop=self._loop)
        # What is posted on an endpoint that UCX found dead before is not cancelled with it: it would stay for ever.
        if self._is_closed or not endpoint.alive:
            done.finish(PeerLost("payload connection closed"))
            return done
        self._worked_s = self._loop.time()
        try:
            request = start(self._api.array(buffer))
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
        if self._is_closed:
            return
        long_s = time.perf_counter() + LONG_TURN_S
        for _ in range(MAX_PROGRESS_PER_TURN):
            if not self._worker.progress_once():
                self._reap()
                if self._worker.arm():
                    self._look_again()
                    return
            if time.perf_counter() > long_s:
                break
        self._reap()
        self._kick()

    def _look_again(self) -> None:
        """With device memory do not trust the file descriptor alone: turn once more in a millisecond."""
        is_at_work = self._pending and self._loop.time() - self._worked_s < CUDA_LOOK_FOR_S
        if self.device_transports and is_at_work and self._look is None:
            self._look = self._loop.call_later(CUDA_LOOK_S, self._looked)

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

    def _cancel_orphans(self) -> None:
        self._worker.cancel_inflight_requests()  # only those of closed endpoints, which never end by themselves
        self._kick()

    def _accepted(self, endpoint: RawEndpoint) -> None:
        self._loop.call_soon(self._start_admission, endpoint)

    def _start_admission(self, endpoint: RawEndpoint) -> None:
        if len(self._admitting) >= MAX_UNADMITTED or self._is_closed:
            self.close_endpoint(endpoint)
            return
        task = asyncio.create_task(self._admit(endpoint))
        self._admitting.add(task)
        task.add_done_callback(self._admitting.discard)

    async def _admit(self, endpoint: RawEndpoint) -> None:
        token = np.zeros(TOKEN_BYTES, np.uint8)
        arrived = self._submit(endpoint, endpoint.stream_recv, token)
        waiting: asyncio.Future[RawEndpoint] | None = None
        try:
            await asyncio.wait({arrived}, timeout=ADMISSION_BUDGET_S)
            if arrived.done() and arrived.exception() is None:
                waiting = self._expected.pop(token.tobytes(), None)
        finally:
            if waiting is None or waiting.done():
                self.close_endpoint(endpoint)
            else:
                waiting.set_result(endpoint)


def offered_device_transports(context: Any) -> frozenset[str]:
    """Return which of UCX's CUDA transports a context really has.

    Naming them in UCX_TLS is not enough: without its CUDA module, which needs the driver's and NVML's libraries, UCX
    takes a pointer into GPU memory for one into host memory and crashes on it.
    """
    found = re.findall(r"-- (cuda_copy|cuda_ipc)/", context.info) if context.cuda_support else []
    return frozenset(found)
