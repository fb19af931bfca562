"""The one table of options: what the command line, the environment, the configuration file and the docs know.

1. Each option names the roles that take it and the fields of the folders' config dataclasses that it fills.
2. Its default is read from the first such field, so that no default is written down twice.
3. `baton/settings.py` merges the sources, `baton/config.py` fills the dataclasses, which check their own bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from baton.option import Option
from baton.values import core_set, number, switch, text, type_name, whole
from decode.config import DecodeConfig
from engine.config import DEVICES, GRAMMAR_BACKENDS, KERNELS, QUANTIZATIONS, EngineConfig, ServiceConfig
from kvtransfer.config import TransferConfig
from prefill.config import POOLINGS, PrefillConfig
from protocol.kv_layout import DTYPE_BYTES
from router.access_log import STYLES
from router.config import RouterConfig

SERVE = frozenset({"serve"})
ROUTER = frozenset({"router"})
PREFILL = frozenset({"prefill"})
DECODE = frozenset({"decode"})
COLOCATED = frozenset({"colocated"})
WORKERS = PREFILL | DECODE | COLOCATED
ROLES = ("serve", "router", "prefill", "decode", "colocated")

MODES = ("disaggregated", "colocated")
LOG_LEVELS = ("debug", "info", "warning", "error")
BLOCK_SIZES = (8, 16, 32, 64, 128)
DTYPES = ("auto", *DTYPE_BYTES)


_GRAMMAR_BUDGETS: Final = {
    "slow": "CPU time per token, on the average, from which an answer's grammar is worked on beside the decode steps.",
    "heavy": "As above, from which it gets only what everything else leaves of the machine.",
    "mean": "As above, from which the grammar fails and the request ends with an error.",
    "worst": "CPU time of a single token from which the grammar fails.",
}


def _served_model() -> tuple[Option, ...]:
    group, cpu_roles = "model", SERVE | WORKERS
    everyone = cpu_roles | ROUTER
    return (
        Option(
            name="served-model-name", group=group, roles=SERVE | ROUTER, parse=text, is_list=True,
            default_text="MODEL as given; of a path, its last part",
            help="Name that clients ask for; may be repeated, the first is reported.",
        ),
        Option(
            name="max-model-len", group=group, roles=everyone, parse=whole, unit="tokens", bounds=(1, None),
            fills=((EngineConfig, "max_model_len"), (RouterConfig, "max_model_len")),
            default_text="what model and KV pool allow", help="Longest prompt plus output.",
        ),
        Option(
            name="dtype", group=group, roles=cpu_roles, parse=type_name, fills=((EngineConfig, "dtype"),),
            choices=DTYPES, help="Type of weights and activations; auto is float32 on a CPU and bfloat16 on a GPU.",
        ),
        Option(
            name="quantization", group=group, roles=cpu_roles, parse=text, fills=((EngineConfig, "quantization"),),
            choices=QUANTIZATIONS,
            help="Of weights; auto keeps a GGUF file's own on a CPU unless dtype is given; fp8 is for a GPU.",
        ),
        Option(
            name="kernels", group=group, roles=cpu_roles, parse=text, fills=((EngineConfig, "kernels"),),
            choices=KERNELS,
            help="auto takes native on a CPU, triton on a GPU; either name insists on its own, torch avoids both.",
        ),
        Option(
            name="enforce-eager", group=group, roles=SERVE | DECODE | COLOCATED, parse=switch,
            fills=((EngineConfig, "enforce_eager"),), default_text="false",
            help="On a GPU launch decode steps kernel by kernel, without CUDA graphs; slower, for debugging.",
        ),
        Option(
            name="grammar-backend", group=group, roles=cpu_roles, parse=text,
            fills=((EngineConfig, "grammar_backend"),), choices=GRAMMAR_BACKENDS,
            help="Library behind structured output; auto takes llguidance. xgrammar must be installed beside Baton.",
        ),
        *(
            Option(
                name=f"grammar-{name}-ms", group=group, roles=cpu_roles, parse=number, unit="ms", bounds=(1e-3, 1e6),
                fills=((EngineConfig, f"grammar_{name}_ms"),), help=what,
            )
            for name, what in _GRAMMAR_BUDGETS.items()
        ),
        Option(
            name="device", group=group, roles=cpu_roles, parse=text, fills=((EngineConfig, "device"),),
            choices=DEVICES, help="What computes; auto is a GPU where torch sees one.",
        ),
        Option(
            name="chat-template", group=group, roles=SERVE | ROUTER, parse=text, unit="path",
            default_text="the model's own", help="File with a Jinja chat template.",
        ),
        Option(
            name="dummy-seed", group=group, roles=cpu_roles, parse=whole, fills=((EngineConfig, "dummy_seed"),),
            help="Seed of the random weights of a dummy: model.",
        ),
        Option(
            name="cache-dir", group=group, roles=everyone, parse=text, unit="path",
            default_text="~/.cache/baton", help="Where fetched models are kept.",
        ),
    )  # fmt: skip


def _processes() -> tuple[Option, ...]:
    group = "processes"
    return (
        Option(
            name="mode", group=group, roles=SERVE, parse=text, default="disaggregated", choices=MODES,
            help="Prefill and decode in processes of their own, or colocated in one.",
        ),
        Option(
            name="prefill", group=group, roles=SERVE, parse=whole, default=1, bounds=(1, 64), unit="processes",
            help="Prefill workers.",
        ),
        Option(
            name="decode", group=group, roles=SERVE, parse=whole, default=1, bounds=(1, 64), unit="processes",
            help="Decode workers.",
        ),
        Option(
            name="drain-s", group=group, roles=frozenset(ROLES), parse=number, unit="s", bounds=(0, 86400),
            fills=((RouterConfig, "drain_s"), (ServiceConfig, "drain_s")),
            help="On SIGTERM, how long running requests may take to finish.",
        ),
        Option(
            name="secret-file", group=group, roles=frozenset(ROLES), parse=text, unit="path",
            default_text="serve makes a secret of its own; every other role needs one",
            help="File with the cluster secret, at least 16 bytes.",
        ),
        Option(
            name="log-level", group=group, roles=frozenset(ROLES), parse=text, default="info", choices=LOG_LEVELS,
            help="Least severe messages that are logged; debug also shows tracebacks of errors.",
        ),
    )  # fmt: skip


def _cpu() -> tuple[Option, ...]:
    group = "CPU"
    per_role = tuple(
        option
        for role in ("prefill", "decode")
        for option in (
            Option(
                name=f"{role}-threads", group=group, roles=SERVE, parse=whole, unit="threads", bounds=(1, 1024),
                default_text="one per core of the worker", help=f"Compute threads of each {role} worker.",
            ),
            Option(
                name=f"{role}-cores", group=group, roles=SERVE, parse=core_set, unit="cores",
                default_text="an even share of the usable cores", help=f"Cores that the {role} workers share out.",
            ),
        )
    )  # fmt: skip
    return (
        Option(
            name="threads", group=group, roles=SERVE | WORKERS, parse=whole, unit="threads", bounds=(1, 1024),
            default_text="one per core of the worker", help="Compute threads of each worker.",
        ),
        *per_role,
        Option(
            name="cores", group=group, roles=WORKERS, parse=core_set, unit="cores", fills=((EngineConfig, "cores"),),
            default_text="not pinned", help="Cores this process is pinned to, like 0,2-5.",
        ),
    )  # fmt: skip


def _memory() -> tuple[Option, ...]:
    group, roles = "KV cache", SERVE | WORKERS
    return (
        Option(
            name="block-size", group=group, roles=roles, parse=whole, unit="tokens",
            fills=((EngineConfig, "block_size"),), choices=BLOCK_SIZES, help="Tokens per KV block.",
        ),
        Option(
            name="kv-cache-dtype", group=group, roles=roles, parse=type_name, choices=DTYPES,
            fills=((EngineConfig, "kv_cache_dtype"),), 
            help="Type of keys and values; auto is float16 where weights are quantised, else dtype.",
        ),
        Option(
            name="num-kv-blocks", group=group, roles=roles, parse=whole, unit="blocks", bounds=(2, None),
            fills=((EngineConfig, "num_kv_blocks"),), default_text="what kv-cache-gib holds",
            help="KV blocks of each worker.",
        ),
        Option(
            name="kv-cache-gib", group=group, roles=roles, parse=number, unit="GiB",
            fills=((EngineConfig, "kv_cache_gib"),), default_text="2 on a CPU, kv-memory-share on a GPU",
            help="Memory of each worker's KV blocks.",
        ),
        Option(
            name="kv-memory-share", group=group, roles=roles, parse=number,
            fills=((EngineConfig, "kv_memory_share"),),
            default_text="0.8; under serve divided among the workers, who share one GPU",
            help="Share of a GPU's free memory that a worker's KV blocks take.",
        ),
    )  # fmt: skip


def _scheduling() -> tuple[Option, ...]:
    group, prefills, decodes = "scheduling", SERVE | PREFILL | COLOCATED, SERVE | DECODE | COLOCATED
    return (
        Option(
            name="prefill-chunk-tokens", group=group, roles=prefills, parse=whole, unit="tokens",
            fills=((PrefillConfig, "chunk_tokens"),), default_text="256 on a CPU, 2048 on a GPU; colocated 64 and 512",
            help="Most prompt tokens computed in one step.",
        ),
        Option(
            name="prefill-max-num-seqs", group=group, roles=prefills, parse=whole, unit="sequences",
            fills=((PrefillConfig, "max_num_seqs"),), help="Prompts that a prefill worker holds at once.",
        ),
        Option(
            name="num-layer-groups", group=group, roles=prefills, parse=whole, unit="groups",
            fills=((PrefillConfig, "num_layer_groups"),),
            help="Pushes that the layers of a large chunk are split into, so that sending overlaps computing.",
        ),
        Option(
            name="layer-push-min-tokens", group=group, roles=prefills, parse=whole, unit="tokens",
            fills=((PrefillConfig, "layer_push_min_tokens"),), help="Smaller chunks are pushed whole.",
        ),
        Option(
            name="pooling", group=group, roles=prefills, parse=text, fills=((PrefillConfig, "pooling"),),
            choices=POOLINGS, help="How embeddings are made of a text's tokens; auto is what the model's files say, "
            "else the mean for encoders and the last token for decoders. cls is for encoders.",
        ),
        Option(
            name="prefill-sms", group=group, roles=SERVE | COLOCATED, parse=whole, unit="multiprocessors",
            fills=((PrefillConfig, "num_sms"),),
            help="Colocated on a GPU: multiprocessors that prompts are computed on, a multiple of 8; decode has the "
            "others to itself. 0 does not divide them.",
        ),
        Option(
            name="max-num-seqs", group=group, roles=decodes, parse=whole, unit="sequences",
            fills=((DecodeConfig, "max_num_seqs"),), help="Sequences that a decode worker holds at once.",
        ),
        Option(
            name="watermark-blocks", group=group, roles=decodes, parse=whole, unit="blocks",
            fills=((DecodeConfig, "watermark_blocks"),),
            help="Blocks kept back from new sequences so that running ones can grow.",
        ),
    )  # fmt: skip


def _router() -> tuple[Option, ...]:
    group, roles = "router", SERVE | ROUTER

    def limit(name: str, parse: Callable[[object], Any], unit: str, help_text: str) -> Option:
        fills = ((RouterConfig, name.replace("-", "_")),)
        return Option(name=name, group=group, roles=roles, parse=parse, unit=unit, fills=fills, help=help_text)

    return (
        Option(
            name="host", group=group, roles=roles, parse=text, fills=((RouterConfig, "http_host"),),
            help="Address that clients connect to.",
        ),
        Option(
            name="port", group=group, roles=roles, parse=whole, bounds=(0, 65535),
            fills=((RouterConfig, "http_port"),), help="Port that clients connect to; 0 takes any free one.",
        ),
        Option(
            name="grpc-port", group=group, roles=roles, parse=whole, bounds=(0, 65535),
            fills=((RouterConfig, "grpc_port"),), default_text="no gRPC",
            help="Port that gRPC clients connect to, at --host; 0 takes any free one. Needs the extra grpc.",
        ),
        Option(
            name="control-host", group=group, roles=roles, parse=text, fills=((RouterConfig, "control_host"),),
            help="Address that workers connect to.",
        ),
        Option(
            name="control-port", group=group, roles=roles, parse=whole, bounds=(0, 65535),
            fills=((RouterConfig, "control_port"),), default_text="8001; under serve any free one",
            help="Port that workers connect to.",
        ),
        limit("max-num-requests", whole, "requests", "Unfinished requests; more are answered with 429."),
        limit("max-wait-s", number, "s", "While a newcomer would wait longer for its first token, 429 is the answer."),
        limit("max-body-bytes", whole, "bytes", "Longest HTTP body; longer ones are answered with 413."),
        limit("heartbeat-s", number, "s", "How often workers report."),
        limit("lease-ttl-s", number, "s", "A worker silent for this long is lost."),
        limit("stall-s", number, "s", "A worker with work in hand that makes no progress for this long is lost."),
        limit("ttft-slo-s", number, "s", "First-token deadline that orders the prefill queue, without the prompt."),
        limit("ttft-slo-per-token-s", number, "s", "What each prompt token adds to that deadline."),
        limit("max-placements", whole, "times", "A request fails when so many placements have failed in a row."),
        limit("placement-wait-s", number, "s", "How long an accepted request may wait for workers."),
        limit("startup-wait-s", number, "s", "How long after a router's start requests wait for its first workers."),
        limit("client-stall-s", number, "s", "A client that reads nothing of its answer for this long is cut."),
        limit("max-unread-bytes", whole, "bytes", "Of answers that wait to be read; beyond it, clients are cut."),
        limit("max-answer-values", whole, "values", "Choices x tokens x log probabilities that one answer may hold."),
        limit("max-resume-s", number, "s", "Longest time that a stream is kept for a client that lost its connection."),
        limit("request-read-s", number, "s", "How long a client may take to send a body; then the answer is 408."),
        limit("idle-s", number, "s", "A connection without a request, or with half of its head, is closed after it."),
        Option(
            name="api-key", group=group, roles=roles, parse=text, is_list=True, fills=((RouterConfig, "api_keys"),),
            default_text="everybody may ask", help="Key that clients must show; may be repeated.",
        ),
        Option(
            name="api-key-file", group=group, roles=roles, parse=text, unit="path", is_list=True,
            fills=((RouterConfig, "api_key_files"),), default_text="none",
            help="File with a key, and maybe the tenant it belongs to, a line; read again when it changes.",
        ),
        Option(
            name="access-log", group=group, roles=roles, parse=text, fills=((RouterConfig, "access_log"),),
            choices=STYLES, help="How the log has a line for each request: as text, as JSON, or not at all.",
        ),
        Option(
            name="allowed-origins", group=group, roles=roles, parse=text, is_list=True,
            fills=((RouterConfig, "allowed_origins"),), default_text="none",
            help="Origin whose pages may ask from a browser, like https://example.com, or *; may be repeated.",
        ),
        Option(
            name="http-fd", group=group, roles=ROUTER, parse=whole, fills=((RouterConfig, "http_fd"),),
            is_hidden=True, help="Listening socket inherited for clients.",
        ),
        Option(
            name="control-fd", group=group, roles=ROUTER, parse=whole, fills=((RouterConfig, "control_fd"),),
            is_hidden=True, help="Listening socket inherited for workers.",
        ),
    )  # fmt: skip


def _worker() -> tuple[Option, ...]:
    group = "worker"
    return (
        Option(
            name="worker-id", group=group, roles=WORKERS, parse=text, default_text="role, host name and process id",
            help="Name of this worker, unique at its routers.",
        ),
        Option(
            name="router-url", group=group, roles=WORKERS, parse=text, is_list=True,
            default=("http://127.0.0.1:8001",), help="Control address of a router; may be repeated.",
        ),
        Option(
            name="admin-host", group=group, roles=WORKERS, parse=text, fills=((ServiceConfig, "admin_host"),),
            help="Address of this worker's /health and /census.",
        ),
        Option(
            name="admin-port", group=group, roles=WORKERS, parse=whole, bounds=(0, 65535),
            fills=((ServiceConfig, "admin_port"),),
            help="Port of /health and /census; 0 takes any free one, which the log names.",
        ),
        Option(
            name="connect-retry-s", group=group, roles=SERVE | WORKERS, parse=number, unit="s",
            fills=((ServiceConfig, "connect_retry_s"),), help="Longest pause between attempts to reach a router.",
        ),
    )  # fmt: skip


def _transfer() -> tuple[Option, ...]:
    group, roles = "KV transfer", SERVE | PREFILL | DECODE

    def budget(name: str, help_text: str) -> Option:
        fills = ((TransferConfig, name.replace("-", "_")),)
        return Option(name=name, group=group, roles=roles, parse=number, unit="s", fills=fills, help=help_text)

    return (
        Option(
            name="transport", group=group, roles=roles, parse=text, fills=((TransferConfig, "transport"),),
            choices=("ucx",), help="How blocks travel between processes; colocated mode moves none.",
        ),
        Option(
            name="transfer-host", group=group, roles=PREFILL | DECODE, parse=text, fills=((TransferConfig, "host"),),
            help="Address that a prefill worker's peer port binds to and decode workers dial. A public one is refused.",
        ),
        Option(
            name="transfer-device", group=group, roles=PREFILL | DECODE, parse=text,
            fills=((TransferConfig, "device"),),
            help="Network device that UCX uses between hosts; without it, the one whose address is used.",
        ),
        Option(
            name="allow-public-transfer", group=group, roles=PREFILL | DECODE, parse=switch,
            fills=((TransferConfig, "allow_public"),),
            help="Let UCX use a public address. Who reaches its ports owns the worker: see SECURITY.md.",
        ),
        Option(
            name="kv-staging", group=group, roles=roles, parse=text, fills=((TransferConfig, "kv_staging"),),
            choices=("auto", "device", "host"),
            help="Memory that KV is sent from and received into: auto is a GPU's if both ends have one and it passes "
            "the test at registration, else the host's; device insists on a GPU's, host never takes it.",
        ),
        Option(
            name="slot-bytes", group=group, roles=roles, parse=whole, unit="bytes",
            fills=((TransferConfig, "slot_bytes"),), default_text="4 MiB on a GPU, 1 MiB on a CPU",
            help="Size of a staging slot, the largest piece sent.",
        ),
        Option(
            name="num-slots", group=group, roles=roles, parse=whole, unit="slots",
            fills=((TransferConfig, "num_slots"),),
            help="Receive slots per connection (decode), send slots per worker (prefill).",
        ),
        budget("connect-s", "Budget for connecting and self-testing one peer."),
        budget("progress-s", "A transfer whose piece makes no progress for this long is broken."),
        budget("grant-wait-s", "How long a grant waits for an unknown prompt, and a finished prompt for its grant."),
        budget("tombstone-s", "How long an ended transfer is remembered to refuse late messages."),
    )  # fmt: skip


OPTIONS: tuple[Option, ...] = (
    *_served_model(),
    *_processes(),
    *_cpu(),
    *_memory(),
    *_scheduling(),
    *_router(),
    *_worker(),
    *_transfer(),
)
BY_KEY: dict[str, Option] = {option.key: option for option in OPTIONS}


def options_of(role: str) -> tuple[Option, ...]:
    """Give the options that a command takes."""
    return tuple(option for option in OPTIONS if role in option.roles)


def in_process_options() -> dict[str, Option]:
    """Give the options that make sense for an engine in the caller's process, by the names of its keyword arguments."""
    groups = {"model", "CPU", "KV cache", "scheduling"}
    ours = {option.key: option for option in options_of("colocated") if option.group in groups}
    of_router = ("served_model_name", "chat_template", "max_num_requests", "max_placements")
    return ours | {option.key: option for option in options_of("router") if option.key in of_router}
