"""`baton serve` from its first child to its exit code, with small programs in place of the roles.

The real roles run in tests/e2e; here a tiny HTTP server on the inherited socket plays the router, so that the life of
the supervisor itself (ready lines, restart, drain, force, death) can be seen in seconds.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
RUN_BUDGET_S = 30.0

ROUTER = """
import http.server, os, signal, socket, sys, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Type", "application/json"); self.end_headers()
        census = '{"workers": [{"backend": "abacus"}, {"backend": "abacus"}]}'
        self.wfile.write((census if self.path == "/census" else str(os.getpid())).encode())
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket.close()
server.socket = socket.socket(fileno=int(sys.argv[1]))
server.server_address = server.socket.getsockname()
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
print("router ended", flush=True)
"""
WORKER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("worker ended", flush=True), sys.exit(0)))
signal.signal(signal.SIGHUP, lambda *_: print("worker reads again", flush=True))
deadline_s = time.monotonic() + 60
while time.monotonic() < deadline_s: time.sleep(1)
"""
STUBBORN = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)\n"
TALKATIVE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGHUP, signal.SIG_IGN)
for _ in range(6000): print("x" * 2000, flush=True), time.sleep(0.01)
"""
MAIN = """
import asyncio, sys
from baton import config, hangup, launch
from baton.settings import merge
from baton.supervisor import ChildSpec
hangup.hold()
given = merge("serve", {"model": "m", "port": "0", "drain_s": "20"}, {}, None)
sockets = launch.bind(given)
fd = sockets.http.fileno()
specs = (
    ChildSpec("router", (sys.executable, "-c", ROUTER, str(fd)), launch.ROUTER_STAGE, (fd,)),
    ChildSpec("worker", (sys.executable, "-c", WORKER), launch.WORKER_STAGE),
)
reloads = hangup.Reloads(given, lambda: given)
raise SystemExit(asyncio.run(launch.supervise(config.serve_config(given), specs, sockets, reloads, "m")))
"""


class Serving:
    """A running supervisor and what it said when it was ready."""

    def __init__(self, worker: str) -> None:
        code = f"ROUTER = {ROUTER!r}\nWORKER = {worker!r}\n{MAIN}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("try: "):
            line = self.process.stdout.readline()
            assert line, f"serve ended early: {self.process.communicate()[1]}"
            lines.append(line)
        self.said = "".join(lines)
        self.pids = {name: int(pid) for name, pid in re.findall(r"^  (\S+) +pid (\d+)$", self.said, re.MULTILINE)}
        self.url = re.findall(r"http://\S+?:\d+", self.said)[0]

    def end(self, *signals: signal.Signals) -> tuple[int, str]:
        """Send signals, wait for the end, and give the exit code and what went to standard error."""
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.2)
        error = self.process.communicate(timeout=RUN_BUDGET_S)[1]
        return self.process.returncode, error

    def router_pid(self) -> int:
        """Ask the router for its process id over HTTP."""
        with urllib.request.urlopen(self.url, timeout=RUN_BUDGET_S) as response:
            return int(response.read())


@pytest.fixture
def serving(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """Yield a ready supervisor whose worker runs the program given as parameter, else WORKER."""
    found = Serving(getattr(request, "param", WORKER))
    yield found
    found.process.kill()
    found.process.communicate()


def is_gone(pid: int) -> bool:
    deadline_s = time.monotonic() + RUN_BUDGET_S
    while time.monotonic() < deadline_s:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_ready_lines_name_url_processes_and_a_line_to_try(serving: Serving) -> None:
    assert serving.said.startswith("Baton is ready after ")
    assert serving.said.count("  abacus\n") == 1
    assert set(serving.pids) == {"router", "worker"}
    assert f"curl -N {serving.url}/v1/chat/completions" in serving.said
    assert serving.router_pid() == serving.pids["router"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_router_then_workers_with_exit_code_0(serving: Serving, number: signal.Signals) -> None:
    code, error = serving.end(number)
    assert code == 0
    assert error.index("[router] router ended") < error.index("[worker] worker ended")
    assert all(is_gone(pid) for pid in serving.pids.values())


@pytest.mark.parametrize("serving", [STUBBORN], indirect=True)
def test_a_second_signal_kills_what_is_left(serving: Serving) -> None:
    started_s = time.monotonic()
    code, error = serving.end(signal.SIGTERM, signal.SIGTERM)
    assert code == 0
    assert time.monotonic() - started_s < 15.0
    assert "ended by force" in error
    assert all(is_gone(pid) for pid in serving.pids.values())


def test_a_hangup_is_passed_on_and_ends_nobody(serving: Serving) -> None:
    # The small router has no handler of its own: what it was born with must keep it alive.
    for _ in range(3):
        serving.process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
    assert serving.router_pid() == serving.pids["router"]
    assert Path(f"/proc/{serving.pids['worker']}").exists()
    code, error = serving.end(signal.SIGTERM)
    assert code == 0 and error.count("[worker] worker reads again") >= 2 and "starting again" not in error


def test_a_terminal_that_closes_ends_nobody() -> None:
    master, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", f"ROUTER = {ROUTER!r}\nWORKER = {TALKATIVE!r}\nimport fcntl, termios\n"
         f"fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{MAIN}"],
        cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    try:
        said = ""
        while "try: " not in said:
            said += os.read(master, 65536).decode(errors="replace")
        url = re.findall(r"http://[\d.]+:\d+", said)[0]
        worker = int(re.findall(r"worker +pid (\d+)", said)[0])
        os.close(master)
        time.sleep(1.0)
        with urllib.request.urlopen(url, timeout=RUN_BUDGET_S) as response:
            assert response.status == 200
        assert process.poll() is None and Path(f"/proc/{worker}").exists()
        # More than a pipe holds: somebody still reads what the worker says.
        written = int(Path("/proc", str(worker), "io").read_text().split("wchar: ")[1].split()[0])
        time.sleep(1.0)
        assert int(Path("/proc", str(worker), "io").read_text().split("wchar: ")[1].split()[0]) > written
        process.send_signal(signal.SIGTERM)
        process.wait(RUN_BUDGET_S)
    finally:
        process.kill()
        process.wait()


def test_a_killed_router_comes_back_and_no_connection_is_refused(serving: Serving) -> None:
    before = serving.router_pid()
    os.kill(before, signal.SIGKILL)
    assert is_gone(before)
    host, _, port = serving.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=RUN_BUDGET_S):
        pass
    assert serving.router_pid() not in (before, 0)


def test_a_killed_supervisor_takes_everything_with_it(serving: Serving) -> None:
    serving.process.kill()
    assert all(is_gone(pid) for pid in serving.pids.values())
