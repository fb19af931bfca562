"""The tests that come with OpenAI's own Python SDK, generated from OpenAI's specification, against a running server.

    python -m tests.clients.generated [--url URL] [PYTEST ARGUMENT ...]

1. The wheel has no tests; the source distribution of the same version has. It is fetched once and its tests unpacked.
2. They run unchanged in the environment `openai_generated`, told by TEST_API_BASE_URL where the server is.
3. Those of openai_generated.txt are deselected: each line is a part of a test's name and, after `#`, the reason.
4. A line that deselects nothing is an error, so that the list cannot outlive its reasons. Exit code: pytest's.

The tests ask for OpenAI's model names, which the server must serve too: see NAMES.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.clients.environments import OPENAI_SDIST, Environment, InstallError, ensure

LIST: Final = Path(__file__).with_name("openai_generated.txt")
NAMES: Final = ("smollm2", "gpt-6-astra", "gpt-3.5-turbo-instruct", "text-embedding-3-small", "model")
FILES: Final = (
    "chat/test_completions.py",
    "test_completions.py",
    "test_embeddings.py",
    "test_models.py",
    "test_decisions.py",
)


@dataclass(frozen=True, slots=True)
class Deselection:
    """One line of the list.

    Attributes:
        part: of the tests' names (file, class, function) that are left out.
        reason: why; never empty.
    """

    part: str
    reason: str


def deselections() -> list[Deselection]:
    """Return the list's lines. Raises ValueError for one without a reason."""
    found = []
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        part, _, reason = (text.strip() for text in line.partition("#"))
        if not reason:
            raise ValueError(f"{LIST.name}: {part}: no reason is given")
        found.append(Deselection(part, reason))
    return found


def unpacked_tests(environment: Environment) -> Path:
    """Return the folder that holds the SDK's `tests`, fetched if it is not there. Raises InstallError."""
    name = OPENAI_SDIST.replace("==", "-")
    root = environment.folder / "sdist"
    if (root / name / "tests" / "conftest.py").is_file():
        return root / name
    shutil.rmtree(root, ignore_errors=True)
    options = ("--quiet", "--no-deps", "--no-binary", "openai", "--dest", str(root), OPENAI_SDIST)
    done = subprocess.run(
        (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise InstallError(f"openai_generated: no source distribution of {OPENAI_SDIST}:\n{done.stdout[-2000:]}")
    with tarfile.open(root / f"{name}.tar.gz") as archive:
        wanted = (f"{name}/tests/", f"{name}/pyproject.toml")
        archive.extractall(root, [m for m in archive if m.name.startswith(wanted)], filter="data")
    return root / name


def select(environment: Environment, folder: Path, env: dict[str, str]) -> tuple[list[str], dict[str, int]]:
    """Return the names of the tests to run, and how many tests each line of the list leaves out."""
    paths = [f"tests/api_resources/{file}" for file in FILES]
    done = subprocess.run(
        (*pytest_of(environment), "--collect-only", "-q", *paths), cwd=folder, env=env, capture_output=True, text=True
    )
    names = [line.strip() for line in done.stdout.splitlines() if "::" in line]
    if done.returncode or not names:
        raise InstallError(f"openai_generated: the tests cannot be collected:\n{done.stdout[-2000:]}{done.stderr}")
    lines = deselections()
    left_out = {line.part: sum(line.part in name for name in names) for line in lines}
    return [name for name in names if not any(line.part in name for line in lines)], left_out


def pytest_of(environment: Environment) -> tuple[str, ...]:
    """Return the command of pytest there; the SDK's own `addopts` take a process per core."""
    return (
        str(environment.python),
        "-m",
        "pytest",
        "-n",
        "4",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "--tb=short",
    )


def run(url: str, arguments: list[str]) -> int:
    """Run the selected tests against the server at `url`, which ends before /v1; returns the exit code."""
    environment = ensure("openai_generated")
    folder = unpacked_tests(environment)
    env = os.environ | {"TEST_API_BASE_URL": f"{url}/v1"}
    names, left_out = select(environment, folder, env)
    idle = [part for part, number in left_out.items() if not number]
    print(
        f"openai_generated: {len(names)} tests run; {sum(left_out.values())} matches of {len(left_out)} lines left out"
    )
    command = (*pytest_of(environment), "-v", *(arguments or ["-rf"]), *names)
    process = subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        # One process says "NAME PASSED", several say "[gw0] [ 1%] PASSED NAME".
        print(f"ok {line.rstrip()}" if " PASSED " in line else line.rstrip(), flush=True)
    for part in idle:
        print(f"failed {LIST.name}: {part}: no test is called so")
    return process.wait() or int(bool(idle))


def main() -> int:
    """Start a server unless one is named, and run; returns the exit code."""
    from tests.clients.heavy import one_server

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs and serves the tests' model names; else one is started")
    args, rest = parser.parse_known_args()
    # Most of the tests leave max_tokens out: the model's length is what ends their answers.
    aliases = ["--max-model-len", "96", *(part for name in NAMES for part in ("--served-model-name", name))]
    try:
        with one_server(args.url, *aliases) as server:
            return run(server.url, rest)
    except InstallError as error:
        print(error)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
