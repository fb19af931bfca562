"""What two workers settle before payload flows: that they fit, where their slots lie, and what guards each piece.

    dialer   ── PeerHello(fingerprint, staging, checksums) ──►   acceptor: check_hello
             ◄─ PeerReady(staging, checksum) ─────────────────   or PeerRefused(reason)
    dialer:  check_ready
    both:    path_of, check_path

Both ends know both stagings then, and so the memory of every slot: "host" and "device" stand as they are said, "auto"
is device memory unless the other end says "host". So a connection is not left half on a GPU unless someone insists:
with peer failure handling on, UCX has no zero-copy path between host and device memory (openucx/ucx#11319), and pinned
host memory is the better way through.

The checksum is xxh3 between hosts, as it always was. Where a slot lies on a GPU it is words64, a sum of 64-bit words
that threads can compute in any order.
"""

from __future__ import annotations

import hmac
import ipaddress

from kvtransfer.transport import Agreement, Identity
from protocol.errors import FingerprintMismatch, ProtocolError
from protocol.kv_layout import Staging
from protocol.wire import PeerAddress, PeerHello, PeerPath, PeerReady

HOST_CHECKSUM = "xxh3"
DEVICE_CHECKSUM = "words64"


def hello_of(identity: Identity, staging: Staging) -> PeerHello:
    """Return the dialer's words, with the staging that this attempt is about."""
    return PeerHello(
        worker_id=identity.worker_id,
        instance=identity.instance,
        fingerprint=identity.fingerprint,
        staging=staging,
        checksums=identity.slots.memory.checksums,
    )


def ready_of(identity: Identity, staging: Staging, checksum: str, payload_host: str = "") -> PeerReady:
    """Return the acceptor's answer."""
    return PeerReady(
        worker_id=identity.worker_id,
        instance=identity.instance,
        staging=staging,
        checksum=checksum,
        payload_host=payload_host,
    )


def check_hello(identity: Identity, staging: Staging, hello: PeerHello) -> Agreement:
    """Compare with what a dialer says, on the accepting side.

    Raises:
        FingerprintMismatch: it cannot be served; the text is for the dialer to read.
    """
    hello.fingerprint.require_equal(identity.fingerprint, f"worker {identity.worker_id}")
    agreement = _settle(identity, staging, hello.staging)
    ours, theirs = identity.slots.memory.checksums, hello.checksums
    if agreement.checksum not in ours or agreement.checksum not in theirs:
        raise FingerprintMismatch(
            f"worker {identity.worker_id} and {hello.worker_id} need the checksum {agreement.checksum} "
            f"({hello.fingerprint.device}, staging {hello.staging} there; {identity.fingerprint.device}, staging "
            f"{staging} here), and one cannot compute it (there: {', '.join(theirs)}; here: {', '.join(ours)})"
        )
    return agreement


def check_ready(address: PeerAddress, identity: Identity, staging: Staging, ready: PeerReady) -> Agreement:
    """Verify on the dialing side that the one who answers is the one dialled, and take over what it settled.

    Raises:
        ProtocolError: it is another worker, or another start of it, or its checksum is none for these memories.
    """
    if (ready.worker_id, ready.instance) != (address.worker_id, address.instance):
        raise ProtocolError(
            f"dialled worker {address.worker_id} instance {address.instance}, "
            f"but {ready.worker_id} instance {ready.instance} answers there"
        )
    agreement = _settle(identity, staging, ready.staging)
    if ready.checksum != agreement.checksum:
        raise ProtocolError(
            f"worker {ready.worker_id} chose the checksum {ready.checksum}; for staging {staging} here and "
            f"{ready.staging} there it is {agreement.checksum}"
        )
    return agreement


def path_of(secret: bytes, instances: tuple[int, int], way: str, worker: bytes, host: str) -> PeerPath:
    """Return an end's word on its UCX worker; `instances` are the sender's and the receiver's."""
    return PeerPath(way=way, worker=worker, host=host, proof=_proof(secret, instances, way, worker, host))


def check_path(secret: bytes, instances: tuple[int, int], path: PeerPath) -> None:
    """Verify that the address is from somebody who knows the secret, and for us, before UCX sees it.

    Raises:
        ProtocolError: it is not, or its host is no IPv4 address.
    """
    expected = _proof(secret, instances, path.way, path.worker, path.host)
    if not hmac.compare_digest(path.proof, expected):
        raise ProtocolError("the address of a UCX worker without the cluster secret's proof")
    check_host(path.host)


def _proof(secret: bytes, instances: tuple[int, int], way: str, worker: bytes, host: str) -> bytes:
    words = b"\0".join((b"baton peer path", way.encode(), host.encode(), *(b"%d" % i for i in instances), worker))
    return hmac.digest(secret, words, "sha256")


def check_host(address: str) -> None:
    """Verify that UCX connections may come from there. Raises ProtocolError."""
    try:
        ipaddress.IPv4Address(address)
    except ValueError as error:
        raise ProtocolError(f"a peer's connections come from an IPv4 address, not {address!r}") from error


def _settle(identity: Identity, ours: Staging, theirs: Staging) -> Agreement:
    is_here, is_there = _is_on_device(ours, theirs), _is_on_device(theirs, ours)
    kind = identity.slots.memory.slot_kind if is_here else "host"
    return Agreement(kind, DEVICE_CHECKSUM if is_here or is_there else HOST_CHECKSUM)


def _is_on_device(staging: Staging, other: Staging) -> bool:
    return staging == "device" or (staging == "auto" and other != "host")
