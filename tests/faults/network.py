"""Workers on hosts of their own: network namespaces joined to this one by veth pairs and a bridge.

    this namespace                         namespace of one worker
    client ─ router ─ bridge 10.77.0.1 ══ veth ══ eth0 10.77.0.N ─ baton prefill or decode

Needs root and `ip`; `why_not` says what is missing. Delay and loss need the kernel's netem besides. Everything that
was made is removed at the end, however that comes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.server import Server, stop, wait_until

NETWORK = "10.77.0"
CONTROL_PORT = 8911
HTTP_PORT = 8912
READY_BUDGET_S = 120.0
_PREFIX = f"bt{os.getpid() % 100_000}"


def ip(*words: str) -> None:
    """Run `ip`; raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Say what stands in the way of hosts, or None."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and the command ip"
    try:
        ip("netns", "add", f"{_PREFIX}x")
        ip("netns", "del", f"{_PREFIX}x")
    except subprocess.CalledProcessError as error:
        return f"this machine makes no network namespaces: {error.stderr.strip()}"
    return None


def why_no_netem() -> str | None:
    """Say why links cannot be made slow or lossy here, or None."""
    name = f"{_PREFIX}n"
    try:
        ip("netns", "add", name)
        words = ["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return None if done.returncode == 0 else f"this kernel has no netem: {done.stderr.strip()}"
    except (subprocess.CalledProcessError, OSError) as error:
        return f"tc cannot be run: {error}"
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "del", name)


@dataclass(frozen=True, slots=True)
class Host:
    """One worker's host."""

    worker_id: str
    namespace: str
    link: str
    address: str

    def down(self) -> None:
        """Cut its cable."""
        ip("link", "set", self.link, "down")

    def up(self) -> None:
        """Mend its cable."""
        ip("link", "set", self.link, "up")

    def shape(self, *netem: str) -> None:
        """Delay or lose what it sends and what it is sent, as tc's netem takes it."""
        for inside in ([], ["ip", "netns", "exec", self.namespace]):
            device = "eth0" if inside else self.link
            words = [*inside, "tc", "qdisc", "replace", "dev", device, "root", "netem", *netem]
            subprocess.run(words, check=True, capture_output=True)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A router here and workers elsewhere."""

    server: Server
    hosts: dict[str, Host]
    logs: Path

    def log(self, name: str) -> str:
        """Return what a process has printed."""
        return (self.logs / f"{name}.log").read_text(errors="replace")


@contextmanager
def _hosts(worker_ids: list[str]) -> Iterator[dict[str, Host]]:
    bridge, found = f"{_PREFIX}b", dict[str, Host]()
    with ExitStack() as stack:
        ip("link", "add", bridge, "type", "bridge")
        stack.callback(_gone, "link", "del", bridge)
        ip("addr", "add", f"{NETWORK}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number, worker_id in enumerate(worker_ids):
            name = f"{_PREFIX}h{number}"
            host = found[worker_id] = Host(worker_id, name, f"{_PREFIX}v{number}", f"{NETWORK}.{number + 2}")
            ip("netns", "add", name)
            stack.callback(_gone, "netns", "del", name)
            ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", name)
            stack.callback(_gone, "link", "del", host.link)
            ip("link", "set", host.link, "master", bridge, "up")
            ip("-n", name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield found


def _gone(*words: str) -> None:
    with contextlib.suppress(subprocess.CalledProcessError):
        ip(*words)


@contextmanager
def cluster(folder: Path, cache_dir: Path, num_prefill: int, num_decode: int) -> Iterator[Cluster]:
    """Run a router here and workers on hosts of their own; yield when all are linked."""
    worker_ids = [f"prefill-{i}" for i in range(num_prefill)] + [f"decode-{i}" for i in range(num_decode)]
    secret = folder / "secret"
    secret.write_text(secrets.token_hex(16))
    with _hosts(worker_ids) as hosts, ExitStack() as processes:

        def start(name: str, role: str, *options: str, before: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
            command = [*before, sys.executable, "-m", "baton", role, "smollm2", f"--secret-file={secret}", *options]
            with (folder / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "BATON_CACHE": str(cache_dir)}
                )
            processes.callback(stop, process)
            return process

        ports = (f"--port={HTTP_PORT}", f"--control-port={CONTROL_PORT}")
        router = start("router", "router", f"--control-host={NETWORK}.1", *ports)
        for worker_id, host in hosts.items():
            role = worker_id.partition("-")[0]
            own = (f"--transfer-host={host.address}",) if role == "prefill" else ()
            url = f"--router-url=http://{NETWORK}.1:{CONTROL_PORT}"
            inside = ("ip", "netns", "exec", host.namespace)
            options = (f"--worker-id={worker_id}", url, "--threads=1", "--device=cpu", *own)
            start(worker_id, role, *options, before=inside)
        server = Server(f"http://127.0.0.1:{HTTP_PORT}", router, folder / "router.log")
        found = Cluster(server, hosts, folder)
        wait_until(lambda: _is_whole(found, num_prefill), READY_BUDGET_S, "every worker linked")
        yield found


def _is_whole(found: Cluster, num_prefill: int) -> bool:
    try:
        workers = found.server.workers()
    except OSError:
        return False
    linked = [worker for worker in workers if worker["role"] == "prefill" or len(worker["links"]) == num_prefill]
    return len(linked) == len(found.hosts)
