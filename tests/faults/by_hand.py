"""Roles started by hand on one host, as a user may do without `baton serve`: nobody starts again what has died."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.server import READY_BUDGET_S, Server, stop, wait_until


@dataclass(frozen=True, slots=True)
class Roles:
    """A router and its workers, without a supervisor.

    Attributes:
        server: the router; its `process` is the router's own.
        workers: the process of each worker by its name.
    """

    server: Server
    workers: Mapping[str, subprocess.Popen[bytes]]


@contextmanager
def roles(
    folder: Path, cache_dir: Path, worker_ids: Sequence[str], router_options: Sequence[str] = ()
) -> Iterator[Roles]:
    """Run a router and workers called `prefill-N` and `decode-N`; yield once requests can be served."""
    secret = folder / "secret"
    secret.write_text(secrets.token_hex(16))
    http_port, control_port = _free_ports(2)
    with ExitStack() as processes:

        def start(name: str, role: str, *options: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "baton", role, "smollm2", f"--secret-file={secret}", *options]
            with (folder / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "BATON_CACHE": str(cache_dir)}
                )
            processes.callback(stop, process)
            return process

        ports = (f"--port={http_port}", f"--control-port={control_port}")
        router = start("router", "router", *ports, *router_options)
        url = f"--router-url=http://127.0.0.1:{control_port}"
        workers = {
            name: start(name, name.partition("-")[0], f"--worker-id={name}", url, "--threads=1", "--device=cpu")
            for name in worker_ids
        }
        server = Server(f"http://127.0.0.1:{http_port}", router, folder / "router.log")
        # Each of them imports torch for itself, all at once.
        wait_until(lambda: _is_ready(server), 3 * READY_BUDGET_S, "ready")
        yield Roles(server, workers)


def _is_ready(server: Server) -> bool:
    assert server.process.poll() is None, server.log.read_text(errors="replace")[-3000:]
    try:
        census = server.get("/census")
    except OSError:
        return False
    return not census["missing"]


def _free_ports(num: int) -> list[int]:
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(num)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]
