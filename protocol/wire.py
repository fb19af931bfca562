"""Every message that crosses a process boundary, and the codec.

Three conversations, each over an authenticated `protocol.channel.Channel`:

    handshake   Challenge ─ Proof ─ Accept                       (precedes everything)
    control     worker ─dials─► router: Register, Heartbeat, Tokens … / Welcome, Reserve, Prefill, Abort …
    peer        decode ─dials─► prefill: PeerHello, PeerPath, Grant, Credit … / PeerReady, PeerPath, Piece, Commit …

Encoding is MessagePack with every length capped before anything is built, then typed validation. No extension types,
no pickle. A message starts with its type name; unknown fields are ignored, unknown types are refused.

History of WIRE_VERSION (raise it when an old peer would misread a new message):
    1  first version
    2  peers: staging and checksum are agreed on; each end says Tested before the connection is used
    3  a prompt may be followed by what was emitted before, computed by prefill: FirstToken is the token after that
    4  sampling may carry a grammar, and a prompt may be computed for a readout: an old worker would ignore both
    5  decode reserves blocks when a prompt begins, which prefill says with Begin: an old peer would wait for ever;
       payload goes between two UCX workers whose addresses each end says (PeerPath): no port, no token; a grammar
       that failed is told by a message of its own, which an old router would close the connection for
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import msgpack
import msgspec

from protocol.errors import ProtocolError
from protocol.kv_layout import KVFingerprint, Staging
from protocol.readout import MAX_EMBEDDING_FLOATS, MAX_LABELS, EmbeddingCard, PromptLogprobs, Readout
from protocol.request import SamplingParams, TokenId, TokenRow

WIRE_VERSION = 5
MAX_MESSAGE_BYTES = 8 << 20
MAX_PROMPT_TOKENS = 1 << 20
MAX_STRING_BYTES = 1 << 16

Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 53))]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
TokenIds = Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=MAX_PROMPT_TOKENS)]


class Role(StrEnum):
    """What a process does."""

    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=True):
    """Base of all wire messages."""


# --- handshake -------------------------------------------------------------------------------------------------------


class Challenge(Message, frozen=True, kw_only=True):
    """Acceptor's first words: its wire version and a nonce to be answered."""

    version: int
    nonce: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Proof(Message, frozen=True, kw_only=True):
    """Dialer's answer: its own nonce, and the keyed digest over both."""

    version: int
    nonce: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    mac: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Accept(Message, frozen=True, kw_only=True):
    """Acceptor's own digest: both now know that the other holds the secret."""

    mac: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


# --- control: worker to router ---------------------------------------------------------------------------------------


class PeerAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a prefill worker awaits decode workers. `host` is empty for the in-process transport."""

    worker_id: Name
    instance: Id
    transport: Name
    host: Name = ""
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0


class Register(Message, frozen=True, kw_only=True):
    """A worker's first message. `instance` is new at every start of the process.

    `phases_agree`: a prompt's chunks and decode's steps give the same bits, whoever computes a token.
    `embedding`: what vectors it gives, if it gives any. An encoder has no address: it sends no KV.
    `prompt_tokens_per_s`: a prefill worker's own measurement of short prompts; 0 is unknown. Each token of context adds
    `context_share` to the time that a prompt token takes, as a share of it.
    """

    worker_id: Name
    instance: Id
    role: Role
    fingerprint: KVFingerprint
    num_blocks: Count
    max_num_seqs: Count
    max_model_len: Count
    backend: Text = ""
    pid: Count = 0
    address: PeerAddress | None = None
    phases_agree: bool = False
    embedding: EmbeddingCard | None = None
    prompt_tokens_per_s: Annotated[float, msgspec.Meta(ge=0, le=1e12)] = 0.0
    context_share: Annotated[float, msgspec.Meta(ge=0, le=1e3)] = 0.0


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and counters of one worker; counters grow from the start of its instance.

    `blocks_promised` are those that prompts will need which have not begun yet; they are in no other state's count.
    `num_bytes_*` and `num_blocks_*` count KV payload, once per block: what the receiver wrote, what the sender sent.
    """

    blocks_free: Count = 0
    blocks_cached: Count = 0
    blocks_leased: Count = 0
    blocks_total: Count = 0
    blocks_promised: Count = 0
    num_running: Count = 0
    num_waiting: Count = 0
    queued_tokens: Count = 0
    num_steps: Count = 0
    num_computed_tokens: Count = 0
    num_cached_tokens: Count = 0
    num_preemptions: Count = 0
    num_replayed_tokens: Count = 0
    num_transfers: Count = 0
    num_transfers_failed: Count = 0
    num_transfers_cancelled: Count = 0
    num_bytes_transferred: Count = 0
    num_blocks_transferred: Count = 0
    num_blocks_skipped: Count = 0
    transfer_s: float = 0.0
    step_s: float = 0.0


class Heartbeat(Message, frozen=True, kw_only=True):
    """Sent every heartbeat interval. `progress` moves whenever the compute thread does anything."""

    progress: Count
    has_work: bool
    stats: WorkerStats
    is_draining: bool = False


class Links(Message, frozen=True, kw_only=True):
    """Decode worker: the prefill workers (id, instance) it can receive from now. Replaces the previous list."""

    peers: Annotated[tuple[tuple[Name, Id], ...], msgspec.Meta(max_length=4096)]


class FirstToken(Message, frozen=True, kw_only=True):
    """Prefill worker: token 0, streamed before the KV has landed. Times are durations in seconds."""

    transfer_id: Id
    row: TokenRow
    num_cached_tokens: Count
    queue_s: float
    prefill_s: float


class Readings(Message, frozen=True, kw_only=True):
    """Prefill worker: what was read off a prompt (`protocol/readout.py`); it holds nothing of the placement any more.

    Of the three kinds the one that the readout asked for is set. Times are durations in seconds.
    """

    transfer_id: Id
    labels: Annotated[tuple[float, ...], msgspec.Meta(max_length=MAX_LABELS)] = ()
    prompt: PromptLogprobs | None = None
    embedding: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_EMBEDDING_FLOATS)] = b""
    num_cached_tokens: Count
    queue_s: float
    prefill_s: float


class Tokens(Message, frozen=True, kw_only=True):
    """Decode worker: one message per step with every row that goes to this router."""

    rows: Annotated[tuple[TokenRow, ...], msgspec.Meta(max_length=65536)]


class Declined(Message, frozen=True, kw_only=True):
    """A worker cannot take a placement now; nothing was done. The router places it elsewhere or later."""

    transfer_id: Id
    reason: Text


class Preempted(Message, frozen=True, kw_only=True):
    """Decode worker: the sequence lost its blocks to older ones and must be placed again; its tokens so far stand."""

    transfer_id: Id


class TransferFailed(Message, frozen=True, kw_only=True):
    """Either worker: the hand-off of this placement broke; it holds nothing of it any more."""

    transfer_id: Id
    reason: Text


class GrammarFailed(Message, frozen=True, kw_only=True):
    """Either worker: the grammar of this request failed, as it would anywhere; the worker holds nothing of it."""

    transfer_id: Id
    reason: Text


# --- control: router to worker ---------------------------------------------------------------------------------------


class Welcome(Message, frozen=True, kw_only=True):
    """The router took the registration. Its `Pulse` renews the worker's leases; they run out after `lease_ttl_s`."""

    router_id: Name
    heartbeat_s: Annotated[float, msgspec.Meta(gt=0)]
    lease_ttl_s: Annotated[float, msgspec.Meta(gt=0)]


class Dismissed(Message, frozen=True, kw_only=True):
    """The router refuses the registration, or ends it; the worker must not retry as it is if `is_final`."""

    reason: Text
    is_final: bool


class Pulse(Message, frozen=True, kw_only=True):
    """Sign of life of the router: renews every lease it holds here."""


class Members(Message, frozen=True, kw_only=True):
    """The prefill workers a decode worker should be linked with. Replaces the previous list."""

    peers: Annotated[tuple[PeerAddress, ...], msgspec.Meta(max_length=4096)]


class Reserve(Message, frozen=True, kw_only=True):
    """Place a request on a decode worker: allocate, then GRANT to the prefill worker.

    `emitted` are output tokens that reached the client in earlier placements. Their KV comes with the prompt's, unless
    `is_replayed`: then they are computed here, by decode steps.
    """

    request_id: Id
    transfer_id: Id
    epoch: Count
    prefill_worker_id: Name
    prompt: TokenIds
    emitted: TokenIds = ()
    is_replayed: bool = False
    sampling: SamplingParams
    cache_salt: Name = ""


class Prefill(Message, frozen=True, kw_only=True):
    """Place a request on a prefill worker. Without a decode worker it ends with its first token.

    `emitted` are output tokens of earlier placements that are computed like the prompt's: the first token follows them.
    `deadline_s` is how long from now the first token may take: it orders the queue, it does not cancel.
    With a `readout` nothing is sampled: there is no decode worker, `Readings` are the answer.
    Of lower `rank` goes first; within a rank clients take turns by `weight`, each with what is due first.
    """

    request_id: Id
    transfer_id: Id
    epoch: Count
    decode_worker_id: Name | None
    prompt: TokenIds
    emitted: TokenIds = ()
    sampling: SamplingParams
    deadline_s: float
    cache_salt: Name = ""
    readout: Readout | None = None
    client: Name = ""
    weight: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 1
    rank: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)] = 0


class Abort(Message, frozen=True, kw_only=True):
    """Forget a placement and free what it holds; idempotent, unknown ones are remembered as gone."""

    transfer_id: Id
    reason: Text


class Drain(Message, frozen=True, kw_only=True):
    """Take nothing new; finish what runs."""


# --- peer: decode worker and prefill worker --------------------------------------------------------------------------


class PeerHello(Message, frozen=True, kw_only=True):
    """Dialer's first message: who it is and what its KV memory looks like.

    `staging` says where its slots may lie: "host"; "device"; "auto" is device memory if the acceptor's slots lie in
    some too. `checksums` are those it can compute. Both ends then know where each other's slots are.
    """

    worker_id: Name
    instance: Id
    fingerprint: KVFingerprint
    staging: Staging = "host"
    checksums: Annotated[tuple[Name, ...], msgspec.Meta(max_length=16)] = ("xxh3",)


class PeerReady(Message, frozen=True, kw_only=True):
    """The fingerprints agree.

    `staging` as in the hello, now the acceptor's; `checksum` is the one that every piece of this connection carries;
    `payload_host` is the IPv4 address that the acceptor's UCX connections come from.
    """

    worker_id: Name
    instance: Id
    staging: Staging = "host"
    checksum: Name = "xxh3"
    payload_host: Name = ""


class PeerRefused(Message, frozen=True, kw_only=True):
    """The acceptor will not talk: the fingerprints differ, or no checksum is known to both."""

    reason: Text


class PeerPath(Message, frozen=True, kw_only=True):
    """The dialer, then the acceptor: the UCX worker that this connection has there, and the way that it goes.

    `way` names UCX's transports, `worker` is its address, opaque, and `host` the IPv4 address that its connections
    come from. UCX ends the process over an address that is none, so `proof` says who made it: an HMAC by the cluster
    secret over the rest and both ends' instances, the sender's first.
    """

    way: Name
    worker: Annotated[bytes, msgspec.Meta(min_length=1, max_length=4096)]
    host: Name
    proof: Annotated[bytes, msgspec.Meta(max_length=32)]


class Tested(Message, frozen=True, kw_only=True):
    """Either side: the self-test's payload arrived here as it should. Who has said and heard it uses the connection."""


class Credit(Message, frozen=True, kw_only=True):
    """Decode: receives are posted under these tags, each of the agreed slot size. Each tag carries one piece."""

    tags: Annotated[tuple[Id, ...], msgspec.Meta(max_length=4096)]
    slot_bytes: Count


class Begin(Message, frozen=True, kw_only=True):
    """Prefill: this prompt is about to be computed; reserve its blocks now. Said again where a connection is new."""

    transfer_id: Id


class Grant(Message, frozen=True, kw_only=True):
    """Decode: blocks are reserved for this transfer; the first `num_cached_blocks` are here already."""

    transfer_id: Id
    num_blocks: Count
    num_cached_blocks: Count


class Piece(Message, frozen=True, kw_only=True):
    """Prefill: header of the payload sent under `tag`. `checksum` is over the payload, by PeerReady's name."""

    transfer_id: Id
    tag: Id
    first_block: Count
    num_blocks: Count
    first_layer: Count
    num_layers: Count
    num_bytes: Count
    checksum: Annotated[int, msgspec.Meta(ge=0)]


class Commit(Message, frozen=True, kw_only=True):
    """Prefill: every piece is on its way; `first_token_id` is output token 0."""

    transfer_id: Id
    num_blocks: Count
    first_token_id: TokenId


class Landed(Message, frozen=True, kw_only=True):
    """Decode: everything up to COMMIT stands in its blocks; prefill may let go."""

    transfer_id: Id


class Resend(Message, frozen=True, kw_only=True):
    """Decode: this piece arrived damaged; send these cells again, under a fresh tag. Asked once for each cell."""

    transfer_id: Id
    first_block: Count
    num_blocks: Count
    first_layer: Count
    num_layers: Count


class PeerAbort(Message, frozen=True, kw_only=True):
    """Either side: this transfer is over; late pieces will be refused.

    `is_failure`: something broke. Else it was called off, by the router or because nothing is left to send for.
    """

    transfer_id: Id
    reason: Text
    is_failure: bool = True


HandshakeMessage = Challenge | Proof | Accept
WorkerMessage = (
    Register
    | Heartbeat
    | Links
    | FirstToken
    | Readings
    | Tokens
    | Declined
    | Preempted
    | TransferFailed
    | GrammarFailed
)
RouterMessage = Welcome | Dismissed | Pulse | Members | Reserve | Prefill | Abort | Drain
PeerMessage = (
    PeerHello
    | PeerReady
    | PeerRefused
    | PeerPath
    | Tested
    | Credit
    | Begin
    | Grant
    | Piece
    | Commit
    | Landed
    | Resend
    | PeerAbort
)
AnyMessage = HandshakeMessage | WorkerMessage | RouterMessage | PeerMessage


class _Envelope(msgspec.Struct):
    message: AnyMessage


# The same bytes as msgpack.packb makes of the message's builtins, in a twentieth of the time.
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """Return one message as bytes.

    Raises:
        ProtocolError: larger than MAX_MESSAGE_BYTES.
    """
    data = _ENCODER.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{type(message).__name__} of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    return data


def decode(data: bytes) -> AnyMessage:
    """Return the message in `data`, validated field by field.

    Raises:
        ProtocolError: too large, not MessagePack, an extension type, an unknown type, or a field out of its bounds.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    try:
        plain = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            ext_hook=_refuse_extension,
            max_str_len=MAX_STRING_BYTES,
            max_bin_len=MAX_STRING_BYTES,
            max_array_len=MAX_PROMPT_TOKENS,
            max_map_len=256,
            max_ext_len=0,
        )
        # The struct around it is what msgspec caches its decoder by: 2 us a message, 46 us for the bare union.
        message = msgspec.convert({"message": plain}, _Envelope, builtin_types=(bytes,)).message
    except (ValueError, TypeError, msgpack.UnpackException, msgspec.ValidationError, RecursionError) as error:
        raise ProtocolError(f"malformed message: {error}") from error
    return message


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not allowed")
