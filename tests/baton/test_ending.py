"""An engine in a Python process ends with it, however the program ends: nothing hangs, is left behind, or complains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.model
ROOT = Path(__file__).resolve().parent.parent.parent
END_BUDGET_S = 40.0

BEGIN = """
import asyncio, gc, os, sys, threading
from baton import LLM, AsyncLLM, SamplingParams
OPTIONS = {"num_kv_blocks": 256, "threads": 1}
GREEDY = SamplingParams(temperature=0, max_tokens=4)
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
"""
LEFT = """
llm = LLM("smollm2", **OPTIONS)
print(llm.generate("The capital of France is", GREEDY)[0].outputs[0].text.strip())
"""
RAISES = LEFT + "raise ValueError('of the user')"
EXITS_BUSY = (
    LEFT
    + """
def ask():
    try:
        llm.generate("On and on", LONG)
    except Exception as error:
        assert "shutting down" in str(error), error
threading.Thread(target=ask, daemon=True).start()
sys.exit(7)
"""
)
INTERRUPTED = LEFT + "print('now', flush=True)\nllm.generate(['On and on'] * 8, LONG)"
AFTER_MAIN = """
def job():
    try:
        LLM("smollm2", **OPTIONS)
    except Exception as error:
        print("Paris." if "join()" in str(error) else error)
threading.Thread(target=job).start()
"""
LET_GO = """
def num_threads(): return sum(thread.name in ("engine", "compute") for thread in threading.enumerate())
llm = LLM("smollm2", **OPTIONS)
del llm
assert num_threads() == 0, threading.enumerate()
llm = LLM("smollm2", **OPTIONS)
llm.itself = llm
collected = threading.Event()
llm._thread._loop.call_soon_threadsafe(lambda: (collected.wait(), gc.unfreeze(), gc.collect()))
del llm
collected.set()
import time
while num_threads(): time.sleep(0.01)
print("Paris.")
"""
FORKED = (
    LEFT
    + """
def is_refused():
    try:
        llm.generate("x", GREEDY)
    except Exception as error:
        return "process that made it" in str(error)
pid = os.fork()
if not pid:
    assert is_refused()
    llm.close()
    sys.exit(5)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
import multiprocessing
child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(6 * is_refused()))
child.start(); child.join()
assert child.exitcode == 6
assert llm.generate("The capital of France is", GREEDY)[0].finished
"""
)
ASYNC_LEFT = """
async def main():
    llm = AsyncLLM("smollm2", **OPTIONS)
    async for output in llm.generate("The capital of France is", GREEDY): pass
    print(output.outputs[0].text.strip())
    async for output in llm.generate("On and on", LONG): return llm
llm = asyncio.run(main())
async def again():
    async for _ in llm.generate("x", GREEDY): pass
try:
    asyncio.run(again())
except Exception as error:
    assert "event loop" in str(error), error
"""
ASYNC_LET_GO = """
async def main():
    llm = AsyncLLM("smollm2", **OPTIONS)
    async for output in llm.generate("The capital of France is", GREEDY): pass
    print(output.outputs[0].text.strip())
    del llm
    while any(thread.name == "compute" for thread in threading.enumerate()): await asyncio.sleep(0.01)
    assert len(asyncio.all_tasks()) <= 2
asyncio.run(main())
"""


@contextmanager
def started(program: str, cache_dir: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + program],
        env={**os.environ, "PYTHONPATH": str(ROOT), "BATON_CACHE": str(cache_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("program", "code", "complaint"),
    [
        pytest.param(LEFT, 0, "", id="left"),
        pytest.param(RAISES, 1, "ValueError: of the user\n", id="raises"),
        pytest.param(EXITS_BUSY, 7, "", id="exits busy"),
        pytest.param(AFTER_MAIN, 0, "", id="after main"),
        pytest.param(LET_GO, 0, "", id="let go"),
        pytest.param(FORKED, 0, "", id="forked"),
        pytest.param(ASYNC_LEFT, 0, "", id="async left"),
        pytest.param(ASYNC_LET_GO, 0, "", id="async let go"),
    ],
)
def test_a_program_without_close_ends(program: str, code: int, complaint: str, cache_dir: Path) -> None:
    with started(program, cache_dir) as process:
        said, error = process.communicate(timeout=END_BUDGET_S)
    assert (process.returncode, said.strip()) == (code, "Paris."), error
    assert error.endswith(complaint) and error.count("Traceback") == bool(complaint), error
    assert complaint or error == ""


def test_an_interrupted_program_ends_at_once(cache_dir: Path) -> None:
    with started(INTERRUPTED, cache_dir) as process:
        assert process.stdout is not None and process.stdout.readline() == "Paris.\n"
        assert process.stdout.readline() == "now\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=10)[1]
    # Python forgets that it was an interrupt where a thread runs `exec` on a text meanwhile.
    assert process.returncode in (-signal.SIGINT, 1), error
    assert error.count("Traceback") == 1 and error.endswith("KeyboardInterrupt\n"), error
