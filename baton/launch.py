"""What `baton serve` does: one machine, one router, its workers, under one supervisor.

1. Bind both listening sockets, so that a busy port is told before anything is fetched or started.
2. Find the model once; the children get its path.
3. Make a private folder for what children are told in files (`baton/private_files.py`).
4. Start the children. Workers are forked by a nursery, which imports torch once for all of them and never again. The
   router inherits the sockets, which stay open here: clients that connect while it is being restarted wait in the queue
   instead of being refused.
5. Ask the router's /health until a pair of workers is ready, then say where and how to use it.
6. On SIGTERM or SIGINT: the router ends its streams first, then the workers end; a second signal, or the budget
   running out, kills what is left. The folder is removed.
7. On SIGHUP the sources are read again, the files rewritten, and the children asked to read them: nothing ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import shlex
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO
from urllib.parse import urlsplit

from baton.config import (
    ResolvedModel,
    ServeConfig,
    child_environment,
    computes_on_gpu,
    resolve_model,
    serve_config,
    without_decode,
)
from baton.cores import WorkerCores
from baton.hangup import Reloads
from baton.nursery import Nursery
from baton.options import options_of
from baton.private_files import PrivateFiles, private_files
from baton.settings import Settings
from baton.startup import Startup, new_startup
from baton.supervisor import ChildSpec, Supervisor
from protocol.errors import ConfigError

BACKLOG = 1024
HEALTH_EVERY_S = 0.05
HEALTH_BUDGET_S = 2.0
KILL_GRACE_S = 2.0
ROUTER_STAGE = 0
WORKER_STAGE = 1
# numpy's BLAS threads spin from the moment of its import, on cores that the start needs, and are never used here.
# -P keeps the working folder off the import path: a folder called `model` there must not stand in for ours.
BATON = (sys.executable, "-P", "-m", "baton")
CHILD_DEFAULTS = {"OPENBLAS_NUM_THREADS": "1"}
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class Sockets:
    """The two listening sockets of the router."""

    http: socket.socket
    control: socket.socket

    def listen(self) -> None:
        """Let connections queue up."""
        self.http.listen(BACKLOG)
        self.control.listen(BACKLOG)

    def close(self) -> None:
        """Close both."""
        self.http.close()
        self.control.close()


def serve(config: ServeConfig, reloads: Reloads) -> int:
    """Run everything on this machine until a signal ends it; return the exit code.

    Args:
        config: of the children.
        reloads: what SIGHUP changes.

    Raises ConfigError (busy port), ModelError, or ChildrenFailed.
    """
    sockets = bind(config.settings)
    with contextlib.closing(sockets):
        model = resolve_model(config.settings, lambda line: print(line, file=sys.stderr, flush=True))
        if model.is_encoder:
            config = without_decode(config)
        with private_files(config.settings) as files:

            def take(found: Settings) -> None:
                serve_config(found)
                files.write(found)

            reloads.takers.append(take)
            specs = child_specs(config, model, sockets, files)
            name = served_names(config.settings, model)[0]
            return asyncio.run(supervise(config, specs, sockets, reloads, name, model.is_encoder))


def bind(settings: Settings) -> Sockets:
    """Bind the sockets without listening yet. Raises ConfigError when a port is taken or an address is not ours."""
    http = _bind_one("port", settings["host"], settings["port"])
    try:
        port = settings["control_port"] if "control_port" in settings.given else 0
        return Sockets(http, _bind_one("control-port", settings["control_host"], port))
    except ConfigError:
        http.close()
        raise


def _bind_one(option: str, host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"{host!r} is no address of this machine: {error.strerror or error}") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"{option}: {host}:{port} is in use; choose another with --{option}") from None
        raise ConfigError(f"{option}: cannot listen on {host}:{port}: {error.strerror or error}") from None
    return found


def child_specs(
    config: ServeConfig, model: ResolvedModel, sockets: Sockets, files: PrivateFiles
) -> tuple[ChildSpec, ...]:
    """Describe every child: the router and the workers, each with the options that were given and apply to it."""
    settings = config.settings
    fds = (sockets.http.fileno(), sockets.control.fileno())
    shared: dict[str, Any] = {"config": files.options, "secret_file": files.secret}
    names = served_names(settings, model)
    router = shared | {"served_model_name": names, "http_fd": fds[0], "control_fd": fds[1]} | _grpc_option(settings)
    # SIGTERM means to a router with inherited sockets that a successor takes over; here everything ends.
    command = child_command(settings, "router", model, router)
    specs = [ChildSpec("router", command, ROUTER_STAGE, fds, stop_signal=signal.SIGINT)]
    host, port = sockets.control.getsockname()[:2]
    shared |= {"router_url": (_url(host, port),)} | _memory_option(config)
    if config.cores is None:
        overrides = shared | {"worker_id": "colocated-0"}
        return (*specs, _worker_spec("colocated-0", child_command(settings, "colocated", model, overrides)))
    for role, plan in (("prefill", config.cores.prefill), ("decode", config.cores.decode)):
        for index, share in enumerate(plan):
            overrides = shared | {"worker_id": f"{role}-{index}"} | _core_options(share)
            specs.append(_worker_spec(f"{role}-{index}", child_command(settings, role, model, overrides)))
    return tuple(specs)


def _worker_spec(name: str, command: tuple[str, ...]) -> ChildSpec:
    return ChildSpec(name, command, WORKER_STAGE, arguments=command[len(BATON) :])


def served_names(settings: Settings, model: ResolvedModel) -> tuple[str, ...]:
    """Give the names that clients may ask for, the reported one first."""
    names: tuple[str, ...] = settings["served_model_name"] or (model.name,)
    return names


def _grpc_option(settings: Settings) -> dict[str, Any]:
    """Find out now whether the port for gRPC can be had, and which one 0 is; the router binds it itself."""
    if settings["grpc_port"] is None:
        return {}
    with contextlib.closing(_bind_one("grpc-port", settings["host"], settings["grpc_port"])) as probe:
        port = probe.getsockname()[1]
    print(f"gRPC: {settings['host']}:{port}", file=sys.stderr, flush=True)
    return {"grpc_port": port}


def _memory_option(config: ServeConfig) -> dict[str, Any]:
    """Divide a GPU's memory among the workers of this machine, who would each take most of it; the user's word wins."""
    settings = config.settings
    fixed = {"kv_memory_share", "kv_cache_gib", "num_kv_blocks"} & settings.given
    # Under vLLM's name it is the share of everything that runs here, as it is there.
    is_whole = fixed == {"kv_memory_share"} and "gpu_memory_utilization" in settings.given
    if fixed and not is_whole or not computes_on_gpu(settings):
        return {}
    num_workers = 1 if config.cores is None else len(config.cores.prefill) + len(config.cores.decode)
    return {"kv_memory_share": settings["kv_memory_share"] / num_workers}


def _core_options(share: WorkerCores) -> dict[str, Any]:
    return {"threads": share.num_threads} | ({"cores": share.cores} if share.cores else {})


def child_command(settings: Settings, role: str, model: ResolvedModel, overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """Write the command line of one child: what the user gave as far as the role takes it, and the overrides.

    Options that may change while it runs are not on it: it finds them in the file that `config` of the overrides names.
    """
    command = [*BATON, role, model.reference, f"--config={overrides['config']}"]
    for option in options_of(role):
        if option.reloads:
            continue
        if option.key in overrides:
            value = overrides[option.key]
        elif option.key in settings.given:
            value = settings[option.key]
        else:
            continue
        if option.is_list:
            command += [f"--{option.name}={item}" for item in value]
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            command.append(f"--{option.name}={text}")
    return tuple(command)


async def supervise(
    config: ServeConfig,
    specs: tuple[ChildSpec, ...],
    sockets: Sockets,
    reloads: Reloads,
    served_name: str,
    is_encoder: bool = False,
) -> int:
    """Run the children until a signal; see this module's life cycle from step 4."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    _listen_for_signals(stop, hurry)
    startup = new_startup([spec.name for spec in specs])
    started_s = time.monotonic()
    sockets.listen()
    environment = CHILD_DEFAULTS | child_environment()
    nursery = Nursery(environment, specs[-1].arguments or ())
    supervisor = Supervisor(specs, startup.on_line, environment, nursery=nursery)
    nursery.start()
    supervisor.start()
    reloads.takers.append(lambda _: supervisor.reload())
    reloads.watch()
    await asyncio.sleep(0)  # the children are on their way before the display takes time to come up
    try:
        url = _reachable_url(sockets.http)
        if await _until_ready(supervisor, startup, url, stop):
            supervisor.mark_ready()
            elapsed_s = time.monotonic() - started_s
            _announce(served_name, supervisor.pids(), await _backends(url), url, elapsed_s, is_encoder)
            await stop.wait()
    finally:
        # When the start failed there is nothing to wait for: what still runs is only told to end.
        budget_s = config.drain_s + KILL_GRACE_S if stop.is_set() else KILL_GRACE_S
        if stop.is_set():
            _say(f"ending: running requests have {config.drain_s:g} s")
        if not await supervisor.drain(budget_s, hurry):
            _say("ended by force: not everything had finished")
        await nursery.close()
    return 0


def _say(line: str, stream: TextIO | None = None) -> None:
    """Write a line, standard error's unless told otherwise, to whoever is still there to read it."""
    with contextlib.suppress(OSError):
        print(line, file=stream or sys.stderr, flush=True)


def _listen_for_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """Let the first signal set `stop` and any further one `hurry`."""

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


async def _until_ready(supervisor: Supervisor, startup: Startup, url: str, stop: asyncio.Event) -> bool:
    """Wait for a ready pair of workers; False when a signal came first. Raises ChildrenFailed."""
    waits = {
        asyncio.create_task(_healthy(url)),
        asyncio.create_task(stop.wait()),
        asyncio.create_task(supervisor.failed()),
    }
    with startup:
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
    return not stop.is_set()


async def _healthy(url: str) -> None:
    """Return once the router answers /health with 200."""
    while True:
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            if (await _get(url, "/health"))[0] == 200:
                return
        await asyncio.sleep(HEALTH_EVERY_S)


async def _get(url: str, path: str) -> tuple[int, bytes]:
    """Ask our router; give status and body. An HTTP client would take longer to import than a worker to link.

    Raises OSError, TimeoutError, or ValueError for an answer that is none.
    """
    address = urlsplit(url)
    async with asyncio.timeout(HEALTH_BUDGET_S):
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            # HTTP/1.0: the answer ends where the connection does.
            writer.write(f"GET {path} HTTP/1.0\r\nHost: {address.netloc}\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
    status = head.split(maxsplit=2)[1:2]
    if not head.startswith(b"HTTP/") or not status:
        raise ValueError(f"no HTTP answer: {head[:100]!r}")
    return int(status[0]), body


async def _backends(url: str) -> list[str]:
    """Ask the router which kernels its workers run, one line per kind; empty when it does not tell in time."""
    try:
        workers = json.loads((await _get(url, "/census"))[1])["workers"]
    except (OSError, TimeoutError, ValueError, KeyError):
        return []
    return sorted({str(worker["backend"]) for worker in workers if worker.get("backend")})


def _announce(
    served_name: str,
    pids: Mapping[str, int | None],
    backends: Sequence[str],
    url: str,
    elapsed_s: float,
    is_encoder: bool = False,
) -> None:
    """Say on standard output that it is ready, who runs, on what, and a line to try."""
    lines = [f"Baton is ready after {elapsed_s:.1f} s: {url} serves {served_name}"]
    lines += [f"  {name:<12} pid {pid}" for name, pid in pids.items()]
    lines += [f"  {backend}" for backend in backends]
    path, messages = "chat/completions", [{"role": "user", "content": "Why is the sky blue?"}]
    body = json.dumps({"model": served_name, "stream": True, "temperature": 0.2, "messages": messages})
    if is_encoder:
        path, body = "embeddings", json.dumps({"model": served_name, "input": "Why is the sky blue?"})
    lines.append(f"try: curl -N {url}/v1/{path} -H 'Content-Type: application/json' -d {shlex.quote(body)}")
    _say("\n".join(lines), sys.stdout)


def _reachable_url(listening: socket.socket) -> str:
    """Give the URL of our own listening socket as seen from this machine."""
    host, port = listening.getsockname()[:2]
    return _url(ANY_ADDRESS.get(host, host), port)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
