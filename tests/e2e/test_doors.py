"""The doors of a running server: which process holds which socket, and what strangers cost at each of them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest

from tests.e2e.server import Server, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx]

NUM_STRANGERS = 150
MAX_GROWTH_BYTES = 40 << 20
SETTLE_S = 1.0


def tree(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    parents: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])].append(int(entry.name))
    found = [pid]
    for each in found:
        found += parents[each]
    return found


def descriptors(pid: int) -> dict[int, str]:
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found[int(entry.name)] = os.readlink(entry)
    return found


def listening() -> dict[str, int]:
    """Return the port of each listening socket of this machine."""
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {f"socket:[{row[9]}]": int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}


def ask(server: Server, **fields: object) -> dict[str, object]:
    body = json.dumps({"model": "smollm2", "prompt": "a", "max_tokens": 3, "temperature": 0, **fields}).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/completions", body, headers)) as response:
        found: dict[str, object] = json.loads(response.read())
        return found


def test_every_process_holds_its_own_descriptors_only(disaggregated: Server) -> None:
    ask(disaggregated, guided_regex="[a-c]+")  # tried in a child of the router
    supervisor, router = disaggregated.process.pid, disaggregated.children()["router"]
    pids, ports = tree(supervisor), listening()
    children = [pid for pid in tree(router) if pid != router]
    assert children, "a grammar is tried in a process of its own"
    owners: dict[str, set[int]] = defaultdict(set)
    for pid in pids:
        for target in descriptors(pid).values():
            if target in ports:
                owners[target].add(pid)
    shared = {target: pids for target, pids in owners.items() if len(pids) > 1}
    # The supervisor keeps both of the router's sockets for its successor.
    assert len(shared) == 2 and all(pids == {supervisor, router} for pids in shared.values()), shared
    for pid in children:
        held = descriptors(pid)
        own = {held[number] for number in (0, 1, 2)}
        assert set(held.values()) <= own | {"/dev/null"}, held


def test_strangers_cost_no_process_memory_at_any_door(disaggregated: Server) -> None:
    children, ports = disaggregated.children(), listening()
    doors = [
        (pid, ports[target])
        for role, pid in children.items()
        for target in descriptors(pid).values()
        if target in ports and is_http(ports[target])
    ]
    assert len(doors) >= 5, doors  # clients, control; peer, admin; admin
    said = ask(disaggregated)["choices"]
    for pid, port in doors:
        before = peak = settled_rss(pid)
        with contextlib.ExitStack() as held:
            for path in ("/control", "/peer", "/census"):
                for _ in range(NUM_STRANGERS // 3):
                    held.enter_context(knock(port, path))
            for _ in range(5):
                time.sleep(SETTLE_S / 5)
                peak = max(peak, rss(pid))
            assert peak - before < MAX_GROWTH_BYTES, f"port {port}: {(peak - before) >> 20} MiB"
            assert ask(disaggregated)["choices"] == said, "a request beside them"
    assert disaggregated.children() == children
    wait_until(lambda: disaggregated.get("/readyz")["status"] == "ok", 5.0, "ready")


def test_a_head_that_never_ends_is_cut_at_the_workers_doors(disaggregated: Server) -> None:
    ports, held = listening(), []
    clients = int(disaggregated.url.rsplit(":", 1)[1])
    for pid in disaggregated.children().values():
        for target in descriptors(pid).values():
            if target in ports and ports[target] != clients and is_http(ports[target]):
                held += [socket.create_connection(("127.0.0.1", ports[target])) for _ in range(2)]
                held[-1].sendall(b"GET /control HTTP/1.1\r\nX: ")
    assert len(held) >= 8
    for each in held:
        each.settimeout(8.0)
        assert each.recv(100) == b"", "it is held"
        each.close()


def is_http(port: int) -> bool:
    """Whether HTTP is spoken at a port of this machine's loopback address."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as probe:
            probe.settimeout(1.0)
            probe.sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
            return probe.recv(8).startswith(b"HTTP/1.1")
    except OSError:
        return False


def knock(port: int, path: str) -> socket.socket:
    """Upgrade, and send what fits of a large frame."""
    stranger = socket.create_connection(("127.0.0.1", port))
    stranger.settimeout(0.2)
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    with contextlib.suppress(OSError):
        stranger.sendall(head.encode() + struct.pack("!BBQ", 0x82, 0xFF, 8 << 20) + bytes(1 << 20))
    return stranger


def settled_rss(pid: int) -> int:
    """Return what a process takes once its KV pool has been touched ahead of use."""
    before = -1
    for _ in range(80):
        if (now := rss(pid)) == before:
            return now
        before = now
        time.sleep(0.25)
    raise AssertionError(f"the memory of process {pid} does not settle")


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) << 10
