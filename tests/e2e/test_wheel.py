"""A wheel in an environment of its own, beside other owners of every name but `baton`: it serves, and stays out of way.

The wheel is built without its native extension, which takes a minute; this checkout's stands in for it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernels.cpu.native
from tests.e2e.server import Server, free_port, stop, wait_until
from tests.test_distribution import MOVED, PACKAGES, ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
BUILD_BUDGET_S = 240.0
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "scripts")
BUILD = "import setuptools.build_meta as backend; backend.build_sdist('dist'); backend.build_wheel('dist')"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a wheel and an sdist of this checkout."""
    tree = tmp_path_factory.mktemp("tree")
    for name in (*SOURCES, "baton", *MOVED):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, tree / name)
    # What an earlier build left behind must not come along.
    stale = tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "router"
    stale.mkdir(parents=True)
    (stale / "stale.py").write_text("")
    (tree / "dist").mkdir()
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=BUILD_BUDGET_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return tree / "dist"


@pytest.fixture(scope="module")
def environment(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with the wheel, our dependencies, and a stranger under each name that is not `baton`."""
    venv = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, str(next(dist.glob("*.whl")))], check=True, timeout=BUILD_BUDGET_S)
    [packages] = (venv / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name in MOVED:
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text("OWNER = 'a stranger'\n")
    library = kernels.cpu.native.find_library()
    if library is not None:
        shutil.copy(library, packages / "baton" / "_house" / "kernels" / "cpu")
    return venv


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a working folder with a user's own `router.py` and `model/`."""
    folder = tmp_path_factory.mktemp("crowded")
    (folder / "router.py").write_text("OWNER = 'the user'\n")
    (folder / "model").mkdir()
    (folder / "model" / "__init__.py").write_text("OWNER = 'the user'\n")
    return folder


@pytest.fixture(scope="module")
def server(environment: Path, crowded: Path, gguf: Path, cache_dir: Path) -> Iterator[Server]:
    port, log = free_port(), crowded / "serve.log"
    command = [str(environment / "bin" / "baton"), "serve", str(gguf), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=crowded,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "BATON_CACHE": str(cache_dir), "PYTHONPATH": str(crowded)},
        )
    running = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_until(running.is_ready, 90.0, "ready")
        yield running
    finally:
        stop(process)


def test_the_wheel_owns_one_name_and_holds_all_that_runs(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        names = set(archive.namelist())
        [top_level] = [name for name in names if name.endswith("/top_level.txt")]
        assert archive.read(top_level) == b"baton\n"
    assert {name.partition("/")[0] for name in names} == {"baton", top_level.partition("/")[0]}
    assert not any("tests" in name or "stale" in name for name in names)
    for package in PACKAGES:
        folder = package.replace(".", "/")
        folder = folder if folder.startswith("baton") else f"baton/_house/{folder}"
        assert f"{folder}/__init__.py" in names
    wanted = {"router/rpc/baton_v1.proto", "router/rpc/baton_v1_pb2.pyi", "bench/texts/recruiting.txt"}
    assert {f"baton/_house/{name}" for name in wanted} | {"baton/py.typed"} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_a_build_needs(dist: Path) -> None:
    archive = next(dist.glob("*.tar.gz"))
    listed = subprocess.run(["tar", "tzf", str(archive)], capture_output=True, text=True, check=True).stdout
    names = {name.partition("/")[2] for name in listed.splitlines()}
    native = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels" / "cpu" / "native").iterdir()}
    assert native | {"setup.py", "scripts/wheel_layout.py", "LICENSE", "kernels/cpu/build.py"} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_it_serves_beside_strangers(server: Server) -> None:
    body = {
        "model": server.get("/v1/models")["data"][0]["id"],
        "prompt": "One, two,",
        "max_tokens": 4,
        "temperature": 0,
    }
    # A grammar is compiled in a child of the router, which must find its way into the house too.
    for extra in ({}, {"structured_outputs": {"choice": ["three", "four"]}}):
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            data=json.dumps({**body, **extra}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            text = json.loads(response.read())["choices"][0]["text"]
        assert text and (not extra or text in ("three", "four"))


def test_a_program_keeps_its_own_modules_of_these_names(environment: Path, crowded: Path, gguf: Path) -> None:
    program = (
        "import router, engine\n"
        "from baton import LLM, SamplingParams\n"
        f"llm = LLM({str(gguf)!r})\n"
        "texts = llm.generate(['One, two,'], SamplingParams(max_tokens=3, temperature=0))\n"
        "llm.close()\n"
        "import model, kernels\n"
        "print([module.OWNER for module in (router, model, engine, kernels)], len(texts[0].outputs[0].token_ids))\n"
    )
    done = subprocess.run(
        [str(environment / "bin" / "python"), "-c", program],
        cwd=crowded,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    owners = ["the user", "the user", "a stranger", "a stranger"]
    assert done.stdout.splitlines()[-1] == f"{owners} 3"


def test_the_bench_of_the_wheel_runs(environment: Path, crowded: Path) -> None:
    command = [str(environment / "bin" / "baton"), "bench", "--help"]
    done = subprocess.run(command, cwd=crowded, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
