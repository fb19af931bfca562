"""Every listening socket of every mode, by process, against the table in SECURITY.md."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.e2e.server import Server, serving, wait_until
from tests.e2e.sockets import descendants, listening, role_of
from tests.faults.by_hand import roles

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx]

ROOT = Path(__file__).resolve().parents[2]
ALONE = "`router`, `prefill`, `decode` on one host"


def table(mode: str) -> list[tuple[str, str, str, int, str]]:
    """Return a mode's rows: process, kind, address, how many, of what."""
    found = []
    for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == mode and len(cells) == 6 and cells[4]:
            number, _, of_what = cells[4].partition(" ")
            found.append((cells[1], cells[2], cells[3], int(number), of_what))
    assert found, f"SECURITY.md has no row for {mode}"
    return found


def expected(modes: tuple[str, ...], processes: Mapping[str, int]) -> Counter[tuple[str, str, str]]:
    """Return what the table says for a server of so many processes."""
    found: Counter[tuple[str, str, str]] = Counter()
    links = processes.get("prefill", 0) * processes.get("decode", 0)
    for mode in modes:
        for process, kind, address, number, of_what in table(mode):
            times = {"a process": processes[process], "a link": links}[of_what]
            found[process, kind, address] += number * times
    return found


def present(pids: list[int]) -> Counter[tuple[str, str, str]]:
    """Return what these processes and their children listen on; what a child inherited counts as its own."""
    found: Counter[tuple[str, str, str]] = Counter()
    for pid in pids:
        for one, number in listening(pid).items():
            found[one.process, one.kind, one.where] += number
    return found


def holds(pids: list[int], modes: tuple[str, ...], **processes: int) -> None:
    """Assert that the table tells of these processes, once links stand and what helped at start is gone."""
    want, give_up_s = expected(modes, processes), time.monotonic() + 10.0
    while (found := present(pids)) != want and time.monotonic() < give_up_s:
        time.sleep(0.1)
    assert found == want
    names = [role_of(Path(f"/proc/{pid}")) for root in pids for pid in descendants(root)]
    assert {name: names.count(name) for name in processes} == processes


@pytest.fixture(scope="module")
def wide(gguf: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers of each kind, and gRPC."""
    options = ("--prefill", "2", "--decode", "2", "--threads", "1", "--grpc-port", "0")
    with serving("smollm2", tmp_path_factory.mktemp("wide"), cache_dir, *options) as server:
        yield server


def test_one_pair(disaggregated: Server) -> None:
    holds([disaggregated.process.pid], ("`serve`",), serve=1, router=1, prefill=1, decode=1)


def test_several_workers_and_grpc(wide: Server) -> None:
    holds([wide.process.pid], ("`serve`", "`--grpc-port`, besides"), serve=1, router=1, prefill=2, decode=2)


def test_colocated(colocated: Server) -> None:
    holds([colocated.process.pid], ("`serve --mode colocated`",), serve=1, router=1, colocated=1)


def test_an_encoder(minilm: Server) -> None:
    holds([minilm.process.pid], ("`serve minilm`",), serve=1, router=1, prefill=2)


def test_roles_by_hand(gguf: Path, cache_dir: Path, tmp_path: Path) -> None:
    with roles(tmp_path, cache_dir, ["prefill-0", "decode-0"]) as running:
        pids = [running.server.process.pid, *(worker.pid for worker in running.workers.values())]
        holds(pids, (ALONE,), router=1, prefill=1, decode=1)


def test_in_your_own_process(gguf: Path, cache_dir: Path) -> None:
    """LLM() listens on nothing at all."""
    code = textwrap.dedent(
        """
        import os
        from baton import LLM, SamplingParams
        from tests.e2e.sockets import listening
        with LLM("smollm2", cache_dir=os.environ["BATON_CACHE"], max_num_seqs=1) as llm:
            llm.generate(["Hello"], SamplingParams(max_tokens=2))
            print("listens on", dict(listening(os.getpid())))
        """
    )
    environment = {**os.environ, "BATON_CACHE": str(cache_dir)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "listens on {}" in done.stdout, done.stderr[-3000:]


def test_a_strangers_bytes_do_not_reach_ucx(disaggregated: Server) -> None:
    """All that is left of UCX is a bell: whoever rings it wakes a worker, and nothing else happens."""
    (decode,) = (pid for name, pid in disaggregated.children().items() if name == "decode")
    bells = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if _is_of(line, decode)]
    assert len(bells) == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.setblocking(False)
        for size in (0, 1, 45, 10_000):
            for _ in range(50):
                try:
                    stranger.sendto(os.urandom(size), "\0" + bells[0][1:])
                except BlockingIOError:  # full until the worker has looked
                    time.sleep(0.01)
    wait_until(lambda: _idle(decode), 5.0, "quiet again")
    assert disaggregated.children()["decode"] == decode


def _is_of(line: str, pid: int) -> bool:
    fields = line.split()
    if len(fields) < 8 or not fields[7].startswith("@"):
        return False
    return any(os.readlink(fd) == f"socket:[{fields[6]}]" for fd in Path(f"/proc/{pid}/fd").iterdir())


def _cpu_ticks(pid: int) -> int:
    return sum(int(ticks) for ticks in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])


def _idle(pid: int) -> bool:
    """Tell whether a process used less than a tenth of a core for half a second."""
    before = _cpu_ticks(pid)
    time.sleep(0.5)
    return _cpu_ticks(pid) - before < 0.05 * os.sysconf("SC_CLK_TCK")
