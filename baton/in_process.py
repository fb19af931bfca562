"""Router and workers inside this process: no port, no other process, no bytes on any wire.

    configure ─► start: tokenizer, weights, router, workers attach ─► core takes requests ─► close
                                                                        └─ compute thread dies ─► DEAD: requests fail
                                                                        └─ its event loop ends ─► DEAD

1. `configure` merges keyword arguments with BATON_ variables, as the command does, and finds the model's files.
2. The router is the one that serves HTTP, without its ports; both workers are those of colocated mode, over one pool.
   They speak the ordinary messages over channels in memory (`protocol/local_channel.py`).
3. Whoever has requests calls `core`, as every front end does (`router/core.py`). Nothing is shed for waiting long:
   whoever shares a process with the engine knows what it has asked for.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from baton.colocated import ColocatedConfig, ColocatedWorkers
from baton.config import cache_dir, engine_config, environment, resolve_model
from baton.options import in_process_options
from baton.settings import Settings, merge
from baton.values import did_you_mean
from baton.vllm_names import ALIASES, ELSEWHERE
from decode.config import DecodeConfig
from engine.compute_loop import ComputeLoop
from engine.config import ServiceConfig
from engine.loading import LoadedModel, load, pin_process
from kvtransfer.config import TransferConfig
from prefill.config import PrefillConfig
from protocol.errors import ConfigError, EngineDead
from router.app import Router
from router.config import RouterConfig
from router.core import Core
from router.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FOREVER_S: Final = 1e9
DRAIN_S: Final = 5.0
# Its event loop may be held up by what else runs there: that is no sign of anybody's death.
LEASE_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class InProcessConfig:
    """What an engine in this process runs with; `workers` lacks the router's URL."""

    router: RouterConfig
    workers: ColocatedConfig
    cache_dir: Path


def configure(model: str, options: Mapping[str, Any]) -> InProcessConfig:
    """Check everything that can be checked before weights are loaded; finds or fetches the model's files.

    Args:
        model: as the command line takes it.
        options: keyword arguments, named as in `baton/options.py`; None leaves a default.

    Raises:
        ConfigError: an option is unknown or its value cannot be used.
        ModelError: there is no such model.
    """
    given = _read(options)
    settings, for_router = (_settings(role, model, given) for role in ("colocated", "router"))
    found = resolve_model(settings, log.info)
    template, secret = for_router["chat_template"], secrets.token_bytes(32)
    router = RouterConfig(
        model_path=found.path,
        served_model_names=for_router["served_model_name"] or (found.name,),
        secret=secret,
        chat_template=None if template is None else _read_text(template),
        max_model_len=for_router["max_model_len"],
        max_num_requests=for_router["max_num_requests"],
        max_placements=for_router["max_placements"],
        max_wait_s=FOREVER_S,
        access_log="off",
        placement_wait_s=FOREVER_S,
        startup_wait_s=FOREVER_S,
        lease_ttl_s=LEASE_S,
        stall_s=LEASE_S,
    )
    cache, engine, transfer = cache_dir(settings), engine_config(settings, found), TransferConfig(transport="inproc")
    service = ServiceConfig("prefill", ("inproc://none",), secret, admin_port=None, drain_s=DRAIN_S)
    workers = ColocatedConfig(
        PrefillConfig(engine, service, transfer, cache, **settings.fill(PrefillConfig)),
        DecodeConfig(engine, replace(service, worker_id="decode"), transfer, cache, **settings.fill(DecodeConfig)),
    )
    return InProcessConfig(router, workers, cache)


class InProcess:
    """An engine on the running event loop: `start`, then requests through `core`, then `close`."""

    def __init__(self, config: InProcessConfig) -> None:
        self._config = config
        self._router: Router | None = None
        self._workers: ColocatedWorkers | None = None
        self._compute: ComputeLoop | None = None
        self._running: asyncio.Task[int] | None = None
        self._is_closing = False
        self._tokenizer: Tokenizer | None = None
        self._home: tuple[int, asyncio.AbstractEventLoop] | None = None
        self.failure: EngineDead | None = None

    @property
    def core(self) -> Core:
        """Where requests go. Raises EngineDead when nobody is there to compute them, or they come from elsewhere."""
        if self.failure is not None:
            raise self.failure
        if self._home is not None and self._home != (os.getpid(), asyncio.get_running_loop()):
            raise EngineDead("the engine lives in the process, and on the event loop, that started it: make one here")
        if self._router is None or self._is_closing:
            raise EngineDead("the engine is not running: it was closed, or not started")
        return self._router.core

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's, also after the end. Raises EngineDead before the start."""
        if self._tokenizer is None:
            raise EngineDead("the engine is not started")
        return self._tokenizer

    @property
    def model_name(self) -> str:
        """What the router calls the model."""
        return self._config.router.served_model_names[0]

    @property
    def max_num_open(self) -> int:
        """Choices that are worth having open at once: as many again as decode holds wait for their turn."""
        return min(2 * self._config.workers.decode.max_num_seqs, self._config.router.max_num_requests)

    def leased_blocks(self) -> int:
        """Return how many KV blocks running requests hold."""
        return 0 if self._workers is None else self._workers.decode.stats().blocks_leased

    async def start(self) -> None:
        """Load everything and wait until requests can be computed. On failure or cancellation nothing is left.

        Raises:
            ConfigError: model, device or sizes cannot be used.
            EngineDead: the main thread has ended, after which Python lets no thread pool work.
        """
        if not threading.main_thread().is_alive():
            raise EngineDead("the main thread has ended: let it wait for this one, with join()")
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        config = self._config
        engine = config.workers.prefill.engine
        self._home = os.getpid(), asyncio.get_running_loop()
        pin_process(engine.cores)
        tokenizer = await asyncio.to_thread(Tokenizer, config.router.model_path, config.router.chat_template)
        self._tokenizer = tokenizer
        model = await asyncio.to_thread(load, engine, log.info, config.cache_dir)
        self._router = Router(config.router, tokenizer)
        self._running = self._attach(model, self._router.start_in_process())
        started = asyncio.create_task(self._router.core.started())
        try:
            await asyncio.wait({started, self._running}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            started.cancel()
        if self.failure is not None:
            raise self.failure

    def _attach(self, model: LoadedModel, url: str) -> asyncio.Task[int]:
        """Make both workers and let them register."""
        workers, at = self._config.workers, (url,)
        prefill, decode = (replace(role.service, router_urls=at) for role in (workers.prefill, workers.decode))
        attached = ColocatedConfig(replace(workers.prefill, service=prefill), replace(workers.decode, service=decode))
        self._compute = ComputeLoop(workers.prefill.engine.num_threads)
        self._workers = ColocatedWorkers(attached, model, self._compute)
        self._compute.start()
        running = asyncio.create_task(self._workers.run())
        running.add_done_callback(self._ended)
        return running

    async def close(self) -> None:
        """Fail what still runs and let go of everything; idempotent."""
        self._is_closing = True
        router, workers, running, compute = self._router, self._workers, self._running, self._compute
        if router is not None:
            router.switchboard.is_draining = True
            router.switchboard.abandon()
        if workers is not None and running is not None:
            workers.prefill.service.begin_drain()
            await asyncio.gather(running, return_exceptions=True)
        if compute is not None:
            await compute.stop()
        if router is not None:
            await router.close()
        self._router = self._workers = self._compute = self._running = None
        # The compute thread froze what was there when it began: weights and pool hang in cycles, and never go.
        gc.unfreeze()

    def leave(self) -> None:
        """Close soon, whoever is asking, on whatever thread: nobody can reach it any more."""
        if self._home is None or self._home[0] != os.getpid() or self._is_closing:
            return
        if not self._home[1].is_closed():
            asyncio.run_coroutine_threadsafe(self.close(), self._home[1])
        elif self._compute is not None:
            self._compute.dismiss()

    def _ended(self, running: asyncio.Task[int]) -> None:
        if self._is_closing:
            return
        if running.cancelled():
            self.failure = EngineDead("the engine ended with the event loop that started it: one engine, one loop")
            if self._compute is not None:
                self._compute.dismiss()
        else:
            self.failure = EngineDead("the engine ended: its compute thread died; the log says why")
        if self._router is not None:
            self._router.switchboard.is_draining = True
            self._router.switchboard.abandon()


def _read(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by our keys of options under our names or vLLM's. Raises ConfigError."""
    accepted, given = in_process_options(), {}
    for name, value in options.items():
        key = ALIASES.get(name, name)
        if key not in accepted and name in ELSEWHERE:
            if value is not None:
                ELSEWHERE[name].check(name, value)
        elif key not in accepted:
            raise ConfigError(f"{name}: no such option{did_you_mean(name, [*accepted, *ALIASES, *ELSEWHERE])}")
        elif value is not None and key in given:
            raise ConfigError(f"{name}: is the same as {key}; give one of them")
        elif value is not None:
            given[key] = accepted[key].read(value, name)
    return given


def _settings(role: str, model: str, given: Mapping[str, Any]) -> Settings:
    found = merge(role, {"model": model}, environment(), None)
    ours = {key: value for key, value in given.items() if key in found.values}
    return replace(found, values={**found.values, **ours}, given=found.given | ours.keys())


def _read_text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: cannot read {path}: {error}") from None
