"""The one exception tree.

BatonError
├── ConfigError                 a configuration, flag or file that cannot be used
├── RequestRejected             the client's fault, told before any work (HTTP 4xx)
│   ├── InvalidRequest          400: a field has the wrong type, value or combination
│   ├── ContextTooLong          400: prompt (plus max_tokens) exceeds the model's context
│   ├── Unauthorized            401: no API key, or none that is known
│   ├── UnknownModel            404: the model is not served here
│   └── Overloaded              429: shed early; carries retry_after_s
├── RequestFailed               accepted, then not completed (HTTP 5xx or an error event)
│   ├── NotReady                503: nobody can take it now; carries retry_after_s
│   ├── DeadlineExceeded        504: its deadline passed
│   ├── AnswerImpossible        400: what its answer must obey cannot be gone on with; asked again it fails again
│   └── RequestAborted          499: ended by its id before it had finished
├── ProtocolError               a peer said what the wire does not allow; the connection is closed
│   ├── AuthenticationFailed    wrong cluster secret, or none
│   ├── VersionMismatch         the peer speaks another wire version
│   └── FingerprintMismatch     the peer's model or KV layout differs: not one block may move
├── TransferError               a hand-off's bytes did not arrive
│   ├── PeerLost                the connection or the process behind it is gone
│   ├── ChecksumMismatch        a piece arrived damaged
│   └── TransferStalled         no piece made progress within its budget
├── LeaseExpired                the holder did not renew in time
├── GrammarError                a grammar cannot be compiled, costs too much, or does not allow what it should
├── GrammarUnavailable          a grammar cannot be compiled here, or not now; it may well be elsewhere
├── OutOfBlocks                 the KV pool cannot give that many blocks now
└── EngineDead                  the compute thread died: fatal to its process
"""

from __future__ import annotations


class BatonError(Exception):
    """Base of every error that Baton raises on purpose."""


class ConfigError(BatonError):
    """A configuration that cannot be used; the message names the option."""


class RequestRejected(BatonError):
    """The client's fault, told before any work is done.

    Args:
        message: what is wrong, in words the client can act on.
        param: the offending field, or None.
    """

    status = 400
    error_type = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestRejected):
    """A field has the wrong type, value or combination."""


class ContextTooLong(RequestRejected):
    """Prompt, or prompt plus max_tokens, exceeds the context of the model."""


class Unauthorized(RequestRejected):
    """No API key was given, or none that is known."""

    status = 401
    error_type = "authentication_error"


class UnknownModel(RequestRejected):
    """The named model is not served here."""

    status = 404
    error_type = "not_found_error"


class Overloaded(RequestRejected):
    """Shed before any work; the client should come back after `retry_after_s`."""

    status = 429
    error_type = "rate_limit_error"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestFailed(BatonError):
    """Accepted, then not completed. The client may retry."""

    status = 500
    error_type = "server_error"


class NotReady(RequestFailed):
    """Nobody can take the request now; the client should come back after `retry_after_s`."""

    status = 503

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(RequestFailed):
    """The request's deadline passed before it finished."""

    status = 504


class AnswerImpossible(RequestFailed):
    """The grammar of the answer failed while it was written: the client's own, so that asking again does not help.

    Attributes:
        param: the field that asked for it, once it is known.
    """

    status = 400
    error_type = "invalid_request_error"
    param: str | None = None


class RequestAborted(RequestFailed):
    """The request was ended by its id before it had finished."""

    status = 499


class ProtocolError(BatonError):
    """A peer said what the wire does not allow; its connection is closed."""


class AuthenticationFailed(ProtocolError):
    """The peer does not hold the cluster secret."""


class VersionMismatch(ProtocolError):
    """The peer speaks another wire version."""


class FingerprintMismatch(ProtocolError):
    """Model or KV layout of the two ends differ."""


class TransferError(BatonError):
    """The bytes of a hand-off did not arrive."""


class PeerLost(TransferError):
    """The connection, or the process behind it, is gone."""


class ChecksumMismatch(TransferError):
    """A piece arrived damaged."""


class TransferStalled(TransferError):
    """No piece made progress within its budget."""


class LeaseExpired(BatonError):
    """The holder did not renew its lease in time."""


class GrammarError(BatonError):
    """A grammar cannot be compiled, costs too much, or does not allow the tokens that are there already.

    It says so wherever it is tried.
    """


class GrammarUnavailable(BatonError):
    """A grammar cannot be compiled on this worker, or not now: nothing is known to be wrong with it."""


class OutOfBlocks(BatonError):
    """The KV pool cannot give that many blocks now."""


class EngineDead(BatonError):
    """The compute thread died; the process must end and be restarted."""
