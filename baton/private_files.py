"""What `baton serve` tells its children in files that only its user can read, and that are gone when it is.

1. The cluster secret: the user's file, or a fresh one.
2. The options that may change while a server runs (`Option.reloads`): children take them from here, like a user's file,
   so that one that is asked to read again, or is started again, has those that are in force.
3. API keys that were given as such: on a command line everybody on this machine could read them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from baton.options import OPTIONS
from baton.settings import Settings

SECRET_BYTES = 32


class PrivateFiles:
    """The files of one server, in a folder of mode 0700.

    Attributes:
        secret: path of the cluster secret.
        options: path of the options that may change.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._folder = folder
        self.options = str(folder / "options.yaml")
        self.secret: str = settings["secret_file"] or str(folder / "secret")
        if settings["secret_file"] is None:
            self._write("secret", secrets.token_bytes(SECRET_BYTES).hex())
        self.write(settings)

    def write(self, settings: Settings) -> None:
        """Say what is in force from now on."""
        found: dict[str, Any] = {}
        for option in OPTIONS:
            if option.reloads and option.key in settings.given and option.key in settings.values:
                value = settings[option.key]
                found[option.key] = list(value) if isinstance(value, tuple) else value
        if keys := found.pop("api_key", ()):
            path = self._write("api-keys", "".join(f"{key}\n" for key in keys))
            found["api_key_file"] = [*found.get("api_key_file", ()), path]
        self._write("options.yaml", yaml.safe_dump(found))

    def _write(self, name: str, text: str) -> str:
        """Write a file at once and whole: a child may be reading it."""
        path, draft = self._folder / name, self._folder / f"{name}.new"
        draft.touch(mode=0o600)
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
        return str(path)


@contextlib.contextmanager
def private_files(settings: Settings) -> Iterator[PrivateFiles]:
    """Give the files, and remove them at the end."""
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:  # made with mode 0700
        yield PrivateFiles(settings, Path(folder))
