"""Who may ask: API keys, and the tenants that they belong to.

1. Without a key everybody may ask. With keys, every path but those of `OPEN_PATHS` needs one, as a bearer token.
2. A key file has a key a line, and after it, if there is one, the name of its tenant; lines that begin with `#` are
   comments. The file is read again within a second of its change; what cannot be used is logged, and the keys of before
   go on to count.
3. Tenants share no prefix: a tenant's name salts the hashes of its blocks. Keys without a tenant are one more tenant.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from protocol.errors import ConfigError, Unauthorized

log = logging.getLogger(__name__)

OPEN_PATHS: Final = frozenset({"/health", "/livez", "/readyz", "/ping", "/metrics", "/version", "/openapi.json"})
CHECK_EVERY_S: Final = 1.0
MAX_KEY_CHARS: Final = 512

_KEY: Final = re.compile(r"[!-~]+")
_TENANT: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Access:
    """The keys of one router. Used on one event loop.

    Args:
        keys: keys without a tenant.
        files: key files.
        clock: monotonic seconds.

    Raises:
        ConfigError: a key or a file cannot be used.
    """

    def __init__(self, keys: Sequence[str], files: Sequence[str], clock: Callable[[], float]) -> None:
        for key in keys:
            if not _is_key(key):
                raise ConfigError(f"api-key: must be up to {MAX_KEY_CHARS} printable characters without blanks")
        self._fixed = {_digest(key): "" for key in keys}
        self._paths = [Path(file).expanduser() for file in files]
        self._clock = clock
        self._stamps = [_stamp(path) for path in self._paths]
        self._keys = self._fixed | self._read_files()
        self._checked_s = clock()

    @property
    def is_open(self) -> bool:
        """Whether everybody may ask."""
        return not self._fixed and not self._paths

    def tenant_of(self, authorization: str | None) -> str:
        """Return the tenant of a request; "" is that of keys without one, and of everybody where there are no keys.

        Args:
            authorization: the header of that name.

        Raises:
            Unauthorized: no key, or none that is known.
        """
        if self.is_open:
            return ""
        self._refresh()
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY")
        digest, tenant = _digest(given.strip()), None
        # All of them are looked at: how long it takes tells nothing.
        for known, name in self._keys.items():
            if hmac.compare_digest(known, digest):
                tenant = name
        if tenant is None:
            raise Unauthorized("the API key is not known here")
        return tenant

    def salt(self, tenant: str, cache_salt: str) -> str:
        """Return what salts the prefix hashes of a request: nobody reaches another tenant's blocks by any salt."""
        if self.is_open:
            return cache_salt
        name = f"{tenant}\0{cache_salt}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(name, digest_size=16, person=b"baton-tenant").hexdigest()

    def _refresh(self) -> None:
        """Read the files again if one has changed; at most once a second."""
        if self._clock() - self._checked_s < CHECK_EVERY_S:
            return
        self._checked_s = self._clock()
        stamps = [_stamp(path) for path in self._paths]
        if stamps == self._stamps:
            return
        self._stamps = stamps
        try:
            self._keys = self._fixed | self._read_files()
        except ConfigError as error:
            log.error("%s; the keys of before go on to count", error)
            return
        log.info("API keys were read again: %d", len(self._keys))

    def _read_files(self) -> dict[bytes, str]:
        found: dict[bytes, str] = {}
        for path in self._paths:
            found |= _read(path)
        return found


def _read(path: Path) -> dict[bytes, str]:
    """Return tenants by the digests of their keys."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api-key-file: cannot read {path}: {error}") from None
    found: dict[bytes, str] = {}
    for number, line in enumerate(lines, start=1):
        words = [] if line.lstrip().startswith("#") else line.split()
        if not words:
            continue
        key, *tenant = words
        # Neither message shows the line: it may be a key.
        if len(tenant) > 1 or not _is_key(key):
            raise ConfigError(f"api-key-file: {path}, line {number}: expected a key and at most one tenant")
        if tenant and not _TENANT.fullmatch(tenant[0]):
            raise ConfigError(f"api-key-file: {path}, line {number}: a tenant has up to 64 of A-Z a-z 0-9 _ . -")
        found[_digest(key)] = tenant[0] if tenant else ""
    if not found:
        raise ConfigError(f"api-key-file: {path} holds no key")
    return found


def _is_key(key: str) -> bool:
    return len(key) <= MAX_KEY_CHARS and _KEY.fullmatch(key) is not None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
