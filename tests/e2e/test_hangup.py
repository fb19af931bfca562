"""SIGHUP to a real server and to every process of it: what may change does, nothing ends, no stream notices."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import Server, serving, wait_until

pytestmark = pytest.mark.model
BODY = {"prompt": "On and on", "max_tokens": 300, "ignore_eos": True, "temperature": 0}


def family(pid: int) -> set[int]:
    """Return a process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {pid}.union(*(family(int(child)) for child in children))


def ask(server: Server, key: str, **fields: Any) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{server.url}/v1/completions/", json.dumps(BODY | fields).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        return error.code


def lines_of(server: Server, pattern: str) -> list[str]:
    return re.findall(pattern, server.log.read_text(errors="replace"))


def test_a_hangup_reads_again_and_ends_nobody(gguf: Path, cache_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("max-num-seqs: 4\nthreads: 1\nnum-kv-blocks: 256\n")
    with serving("smollm2", tmp_path, cache_dir, "--config", str(file)) as server:
        before = family(server.process.pid)
        whole = ask(server, "")
        told: list[Any] = []
        asking = threading.Thread(target=lambda: told.append(ask(server, "")))
        asking.start()
        for _ in range(3):
            for pid in family(server.process.pid):
                os.kill(pid, signal.SIGHUP)
            time.sleep(0.1)
        asking.join()
        assert told == [whole] and family(server.process.pid) >= before

        file.write_text("log-level: debug\napi-key: [k1]\nmax-num-seqs: 8\n")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: ask(server, "", max_tokens=1) == 401, 10, "keys are asked for")
        assert ask(server, "k1") == whole
        wait_until(lambda: len(lines_of(server, r"changed: .*log-level")) == 4, 10, "each process has read")
        (waiting,) = lines_of(server, r"only a restart changes (.*)")
        assert set(waiting.split(", ")) == {"max-num-seqs", "num-kv-blocks", "threads"}

        file.write_text("api-key: [k2]\nmode: nonsense\n")
        server.process.send_signal(signal.SIGHUP)
        refused = r"ERROR .*SIGHUP: .*mode: expected one of .*; the settings of before stay"
        wait_until(lambda: lines_of(server, refused), 10, "it is refused")
        assert (ask(server, "k1", max_tokens=1), ask(server, "k2", max_tokens=1)) != (401, 401)
        assert ask(server, "k2", max_tokens=1) == 401

        # One that is started again has what is in force, not what it was started with.
        os.kill(server.children()["router"], signal.SIGKILL)
        wait_until(lambda: ask(server, "k1", max_tokens=1) not in (401, 503), 20, "the router is back")
        assert ask(server, "", max_tokens=1) == 401
    assert server.process.returncode == 0
