"""The nursery's own process: import what workers need, then fork one per request. See `baton/nursery.py`.

1. Everything is imported, nothing is begun: no thread, no CUDA, no UCX context, so that a fork is as good as a start.
   On a CPU the weights are packed too, once, and shared by all workers.
2. A request names the arguments of `baton` and brings two descriptors. The worker is forked by a child that ends at
   once: the supervisor becomes its parent. Its pid is the answer.
3. The worker takes its own session, output and name, waits for its permit, and runs the command line.
4. The supervisor's end of the socket is closed: end.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import socket
import sys
import traceback

from setproctitle import setproctitle

from baton import config
from baton.cli import main as run_baton
from baton.cli import parse, settings_of
from baton.nursery import MAX_MESSAGE_BYTES, await_parent
from model.errors import ModelError
from protocol.errors import BatonError, ConfigError


def main(fd: int, supervisor_pid: int, example: list[str]) -> int:
    """Serve a socket for a supervisor until it is closed.

    Args:
        fd: the socket.
        supervisor_pid: becomes the workers' parent.
        example: arguments of a worker, whose model is prepared for all of them; empty: none is.
    """
    setproctitle("baton nursery")
    _import_workers()
    _preload(example)
    # What is here is never looked through again, neither here nor in a worker, whose memory it shares.
    gc.freeze()
    gc.enable()
    if _num_threads() > 1:
        print("baton nursery: an import has started threads, which a fork would lose", file=sys.stderr)
        return 1
    with socket.socket(fileno=fd) as supervisor:
        supervisor.send(b"ready")
        while True:
            data, fds, _, _ = socket.recv_fds(supervisor, MAX_MESSAGE_BYTES, 2)
            if not data:
                return 0
            output, permit = fds
            pid = _fork_twice()
            if pid == 0:
                supervisor.close()
                _become_worker(json.loads(data), output, permit, supervisor_pid)
            os.close(output)
            os.close(permit)
            supervisor.send(str(pid).encode())


def _import_workers() -> None:
    gc.disable()
    import uvloop  # noqa: F401

    import baton.colocated  # noqa: F401
    import decode.worker  # noqa: F401
    import prefill.worker  # noqa: F401
    from kvtransfer.ucx import load_ucxx

    # Where it does not load, a worker says so, if it needs it.
    with contextlib.suppress(ConfigError):
        load_ucxx()


def _preload(example: list[str]) -> None:
    from engine.loading import preload

    if not example:
        return
    # What is wrong with the model is said by the first worker that loads it.
    with contextlib.suppress(BatonError, ModelError, OSError):
        settings = settings_of(parse(example))
        if not config.computes_on_gpu(settings):
            model = config.resolve_model(settings, lambda _: None)
            preload(config.engine_config(settings, model), config.cache_dir(settings))


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _fork_twice() -> int:
    """Return 0 in the new process, whose parent is gone, and its pid here."""
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild == 0:
            os.close(read_fd)
            os.close(write_fd)
            return 0
        os.write(write_fd, str(grandchild).encode())
        os._exit(0)
    os.close(write_fd)
    os.waitpid(child, 0)
    with os.fdopen(read_fd, "rb") as answer:
        return int(answer.read())


def _become_worker(arguments: list[str], output: int, permit: int, supervisor_pid: int) -> None:
    """Run a command line in this process and end it. Never returns."""
    code = 1
    try:
        os.setsid()
        await_parent(supervisor_pid)
        for target in (1, 2):
            os.dup2(output, target)
        os.close(output)
        is_wanted = os.read(permit, 1)
        os.close(permit)
        if not is_wanted:
            os._exit(0)
        setproctitle(" ".join(["baton", *arguments]))
        random.seed()
        code = run_baton(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  it ends here, whatever it was
        traceback.print_exc()
    finally:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
