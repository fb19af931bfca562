"""Who may ask, and how much of the server is theirs: API keys, and the tenants that they belong to.

1. Without a key everybody may ask. With keys, every path but those of `OPEN_PATHS` needs one, as a bearer token.
2. A key file has a key a line, and after it, if there is one, the name of its tenant, and then what the key grants:
   `priority=N` is the lowest priority number that goes before others' requests (0), `weight=N` the tenant's share (1).
   Lines that begin with `#` are comments. The file is read again within a second of its change, or at once on SIGHUP;
   what cannot be used is logged, and the keys of before go on to count.
3. Tenants share no prefix: a tenant's name salts the hashes of its blocks. Keys without a tenant are one more tenant.
4. What the server has to give is shared out among clients (router/fairness.py): a client is a tenant, or, where there
   are no keys, an address.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from protocol.errors import ConfigError, Unauthorized

log = logging.getLogger(__name__)

OPEN_PATHS: Final = frozenset({"/health", "/livez", "/readyz", "/ping", "/metrics", "/version", "/openapi.json"})
CHECK_EVERY_S: Final = 1.0
MAX_KEY_CHARS: Final = 512

_KEY: Final = re.compile(r"[!-~]+")
_TENANT: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_GRANT: Final = re.compile(r"(priority|weight)=(-?[0-9]{1,10})")
_MAX_WEIGHT: Final = 1000
# One subscriber has all addresses of such a network.
_IPV6_PREFIX: Final = 64


@dataclass(frozen=True, slots=True)
class Client:
    """Whom a request is counted against when the server is shared out.

    Attributes:
        name: of the tenant, or the address where there are no keys; "" is whoever shares this process.
        tenant: whose prefix cache it uses, as the access line names it.
        weight: its share, beside those of the others that want something at the same time.
        first_priority: the lowest priority number that counts against others; lower ones order its own requests only.
    """

    name: str = ""
    tenant: str = ""
    weight: int = 1
    first_priority: int = 0

    def rank(self, priority: int) -> int:
        """Return the priority that counts between clients: whoever may wait may say so, whoever may not wait must be
        allowed to."""
        return max(priority, self.first_priority)


NOBODY: Final = Client()


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
        self._clock = clock
        self.reload(keys, files)

    def reload(self, keys: Sequence[str], files: Sequence[str]) -> None:
        """Let these keys and files count, and no others, from now on; raises ConfigError as the constructor does."""
        for key in keys:
            if not _is_key(key):
                raise ConfigError(f"api-key: must be up to {MAX_KEY_CHARS} printable characters without blanks")
        fixed, paths = {_digest(key): NOBODY for key in keys}, [Path(file).expanduser() for file in files]
        stamps = [_stamp(path) for path in paths]
        found = fixed | _read_files(paths)
        self._fixed, self._paths, self._stamps, self._keys = fixed, paths, stamps, found
        self._checked_s = self._clock()

    @property
    def is_open(self) -> bool:
        """Whether everybody may ask."""
        return not self._fixed and not self._paths

    def client_of(self, authorization: str | None, address: str | None) -> Client:
        """Return whose request it is; the tenant "" is that of keys without one, and of everybody without keys.

        Args:
            authorization: the header of that name.
            address: of the connection's other end, if it has one; what a proxy says in headers counts for nothing.

        Raises:
            Unauthorized: no key, or none that is known.
        """
        if self.is_open:
            return _neighbour(address)
        self._refresh()
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY")
        digest, found = _digest(given.strip()), None
        # All of them are looked at: how long it takes tells nothing.
        for known, client in self._keys.items():
            if hmac.compare_digest(known, digest):
                found = client
        if found is None:
            raise Unauthorized("the API key is not known here")
        return found

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
            self._keys = self._fixed | _read_files(self._paths)
        except ConfigError as error:
            log.error("%s; the keys of before go on to count", error)
            return
        log.info("API keys were read again: %d", len(self._keys))


def _read_files(paths: Sequence[Path]) -> dict[bytes, Client]:
    found: dict[bytes, Client] = {}
    for path in paths:
        found |= _read(path)
    weights: dict[str, int] = {}
    for client in found.values():
        if weights.setdefault(client.tenant, client.weight) != client.weight:
            raise ConfigError(f"api-key-file: the keys of tenant {client.tenant!r} name different weights")
    return found


def _read(path: Path) -> dict[bytes, Client]:
    """Return whose key it is by the digests of the keys."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api-key-file: cannot read {path}: {error}") from None
    found: dict[bytes, Client] = {}
    for number, line in enumerate(lines, start=1):
        words = [] if line.lstrip().startswith("#") else line.split()
        if not words:
            continue
        try:
            key, client = _client(words)
        except ValueError as error:
            raise ConfigError(f"api-key-file: {path}, line {number}: {error}") from None
        found[_digest(key)] = client
    if not found:
        raise ConfigError(f"api-key-file: {path} holds no key")
    return found


def _client(words: list[str]) -> tuple[str, Client]:
    """Return the key of a line and whose it is; raises ValueError, which never shows the line: it may be a key."""
    key, *rest = words
    found = [match for word in rest if (match := _GRANT.fullmatch(word))]
    grants = {match[1]: int(match[2]) for match in found}
    names = [word for word in rest if "=" not in word]
    if not _is_key(key) or len(names) > 1 or len(grants) + len(names) != len(rest) or rest[: len(names)] != names:
        raise ValueError("expected a key, at most one tenant, and then perhaps priority=N and weight=N")
    if names and not _TENANT.fullmatch(names[0]):
        raise ValueError("a tenant has up to 64 of A-Z a-z 0-9 _ . -")
    weight, priority = grants.get("weight", 1), grants.get("priority", 0)
    if not 1 <= weight <= _MAX_WEIGHT:
        raise ValueError(f"weight must be from 1 to {_MAX_WEIGHT}")
    if not -(1 << 31) <= priority < 1 << 31:
        raise ValueError("priority must be a 32-bit number")
    tenant = names[0] if names else ""
    return key, Client(tenant, tenant, weight, priority)


@lru_cache(maxsize=1024)
def _neighbour(address: str | None) -> Client:
    """Return whose requests come from an address where there are no keys."""
    return Client(name=_network(address))


def _network(address: str | None) -> str:
    """Return what stands for an address: itself, or for IPv6 the network of its subscriber."""
    try:
        found = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return ""  # a socket of this machine
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, _IPV6_PREFIX), strict=False))


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
