"""The router's own configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from protocol.errors import ConfigError

RELOADED: Final = frozenset(
    {"api_keys", "api_key_files", "allowed_origins", "max_num_requests", "max_wait_s", "request_read_s", "max_resume_s"}
    | {"ttft_slo_s", "ttft_slo_per_token_s"}
)
"""Fields that `Router.reload` takes over."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How one router listens, what it serves and how much it takes.

    Attributes:
        model_path: resolved local path of the model: a directory, or a GGUF file (for tokenizer and chat template).
        served_model_names: names that clients may use; the first is reported.
        secret: cluster secret, at least 16 bytes; every worker proves it.
        http_host, http_port: where clients connect; `http_fd` is an already listening socket and wins.
        grpc_port: where gRPC clients connect, at `http_host`; None opens no such port.
        control_host, control_port: where workers connect; loopback unless told otherwise; `control_fd` wins.
        chat_template: text of a Jinja template that replaces the model's own, or None.
        max_model_len: upper bound of prompt plus output tokens, or None for what the workers report.
        max_num_requests: accepted and unfinished requests; more are shed with 429.
        max_wait_s: requests are shed with 429 while a newcomer would wait longer than this for its first token.
        max_body_bytes: larger HTTP bodies get 413.
        heartbeat_s, lease_ttl_s: what workers are told; a worker silent for `lease_ttl_s` is lost.
        stall_s: a worker with work in hand whose compute makes no progress for this long is lost: longer than any step.
        ttft_slo_s: deadline for the first token used to order the prefill queue: base plus per-token allowance.
        ttft_slo_per_token_s: allowance per prompt token.
        max_placements: a request fails when so many placements in a row have failed without a new token from decode;
            giving way, or being declined, is no failure.
        placement_wait_s: how long an accepted request may wait for a pair of workers.
        startup_wait_s: in so many seconds after its start a router lets requests wait for the first pair of workers,
            which may be on their way back from its predecessor; later they get 503.
        client_stall_s: a client that reads nothing of its answer for this long, though there is something, is cut.
        max_unread_bytes: of answers that wait for their clients, all connections together; beyond it clients are cut,
            first who has been silent for longest.
        max_answer_values: log probabilities that one answer may hold: choices, tokens and alternatives multiplied.
        request_read_s: how long a client may take to send a body.
        idle_s: a connection on which no request has come for this long, not even the whole head of one, is closed.
        api_keys: keys that clients may show; without keys and key files everybody may ask.
        api_key_files: files with a key, and maybe its tenant, a line; read again when they change.
        access_log: how each request has a line in the log: "text", "json", or "off".
        allowed_origins: origins whose pages may ask, as browsers name them; `*` for all.
        max_resume_s: longest time that a client may ask its stream to be kept for after it lost the connection.
        drain_s: on SIGTERM, how long running streams may take to finish.
    """

    model_path: str
    served_model_names: tuple[str, ...]
    secret: bytes = field(repr=False)
    http_host: str = "127.0.0.1"
    http_port: int = 8000
    http_fd: int | None = None
    grpc_port: int | None = None
    control_host: str = "127.0.0.1"
    control_port: int = 8001
    control_fd: int | None = None
    chat_template: str | None = None
    max_model_len: int | None = None
    max_num_requests: int = 1024
    max_wait_s: float = 30.0
    max_body_bytes: int = 16 << 20
    heartbeat_s: float = 0.5
    lease_ttl_s: float = 3.0
    stall_s: float = 20.0
    ttft_slo_s: float = 0.25
    ttft_slo_per_token_s: float = 0.002
    max_placements: int = 5
    placement_wait_s: float = 60.0
    startup_wait_s: float = 5.0
    client_stall_s: float = 30.0
    max_unread_bytes: int = 256 << 20
    max_answer_values: int = 1 << 20
    max_resume_s: float = 60.0
    request_read_s: float = 60.0
    idle_s: float = 75.0
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_files: tuple[str, ...] = ()
    access_log: str = "text"
    allowed_origins: tuple[str, ...] = ()
    drain_s: float = 30.0

    def reloaded(self, found: RouterConfig) -> RouterConfig:
        """Return this with what may change while a router runs taken from another one."""
        return replace(self, **{name: getattr(found, name) for name in RELOADED})

    def __post_init__(self) -> None:
        if not self.served_model_names:
            raise ConfigError("served_model_names: at least one name is needed")
        if len(self.secret) < 16:
            raise ConfigError("secret: the cluster secret must have at least 16 bytes")
        for name in ("max_num_requests", "max_body_bytes", "max_placements", "max_unread_bytes", "max_answer_values"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        positive = ("heartbeat_s", "stall_s", "ttft_slo_s", "placement_wait_s", "max_wait_s", "client_stall_s")
        if self.startup_wait_s < 0:
            raise ConfigError(f"startup_wait_s must not be negative, got {self.startup_wait_s}")
        for name in (*positive, "max_resume_s", "request_read_s", "idle_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for origin in self.allowed_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")) or origin.endswith("/"):
                raise ConfigError(f"allowed_origins: {origin!r} is no origin like https://example.com, and not *")
        if self.lease_ttl_s < 2 * self.heartbeat_s:
            raise ConfigError(f"lease_ttl_s ({self.lease_ttl_s}) must be at least twice heartbeat_s")
