"""Compose the folders' configs from the settings of one command; the one place of this folder that reads the machine.

1. `baton/settings.py` has merged command line, environment, file and defaults.
2. What no option says is found here: the model's files, the cluster secret, the cores, a worker's name.
3. Each dataclass checks its own bounds; whatever is wrong is a ConfigError that names the option.
"""

from __future__ import annotations

import codecs
import importlib.util
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from baton.cores import CorePlan, CoreRequest, WorkerCores, plan_alone, plan_cores, plan_prefill
from baton.settings import Settings, variables
from decode.config import DecodeConfig
from engine.config import EngineConfig, ServiceConfig
from kvtransfer.config import TransferConfig
from prefill.config import PrefillConfig
from protocol.errors import ConfigError
from router.access import Access
from router.config import RouterConfig

MIN_SECRET_BYTES = 16


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """What the supervisor behind `baton serve` starts.

    Attributes:
        settings: passed on to the children as command lines.
        cores: share of each worker; None in colocated mode.
        drain_s: how long running requests may take on SIGTERM before everything is killed.
    """

    settings: Settings
    cores: CorePlan | None
    drain_s: float

    @property
    def is_colocated(self) -> bool:
        """Tell whether one process runs both roles."""
        return self.cores is None


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model found on this machine.

    Attributes:
        reference: what names it to another process on this machine.
        path: directory or GGUF file, for tokenizer and chat template.
        name: what clients call it unless told otherwise.
        is_encoder: it only embeds: no decode worker is needed.
    """

    reference: str
    path: str
    name: str
    is_encoder: bool = False


def environment() -> Mapping[str, str]:
    """Give the environment this process was started with."""
    return os.environ


def child_environment() -> dict[str, str]:
    """Give a child's environment: ours without BATON_* (its command line says all), importing this very code."""
    ours = variables()
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    here = str(Path(__file__).resolve().parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [kept.get("PYTHONPATH")])])
    kept["PYTHONUNBUFFERED"] = "1"
    return kept


def cache_dir(settings: Settings) -> Path:
    """Give the folder that fetched models are kept in."""
    return Path(settings["cache_dir"] or Path.home() / ".cache" / "baton").expanduser().absolute()


def usable_cores() -> tuple[int, ...]:
    """Give the cores that this process may run on."""
    return tuple(sorted(os.sched_getaffinity(0)))


def computes_on_gpu(settings: Settings) -> bool:
    """Tell whether workers will take a GPU, judged without torch by the driver's device file."""
    return settings["device"] == "cuda" or (settings["device"] == "auto" and Path("/dev/nvidiactl").exists())


def read_secret(path: str | None) -> bytes:
    """Read the cluster secret, less surrounding white space and what editors put before a text."""
    if path is None:
        raise ConfigError("secret-file: this role needs the cluster secret: a file with at least 16 random bytes")
    try:
        secret = Path(path).expanduser().read_bytes().removeprefix(codecs.BOM_UTF8).strip()
    except OSError as error:
        raise ConfigError(f"secret-file: cannot read {path}: {error.strerror or error}") from None
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"secret-file: {path} holds {len(secret)} bytes; at least {MIN_SECRET_BYTES} are needed")
    return secret


def resolve_model(settings: Settings, say: Callable[[str], None]) -> ResolvedModel:
    """Find or fetch the model that the settings name; `say` takes a line per stage. Raises ModelError."""
    from model.encoder_config import is_encoder
    from model.source import resolve

    files = resolve(settings.model, cache_dir(settings), say)
    reference = f"dummy:{files.config_path}" if files.format == "dummy" else str(files.path)
    return ResolvedModel(reference, str(files.path), model_name(settings.model), is_encoder(files))


def model_name(reference: str) -> str:
    """Give the name that clients use for a model: its reference, of a path the last part without its suffix."""
    given = Path(reference.removeprefix("dummy:")).expanduser()
    if not given.exists():
        return reference
    found = given.resolve()
    return (found.parent if found.name == "config.json" else found).name.removesuffix(".gguf")


def router_config(settings: Settings, model: ResolvedModel) -> RouterConfig:
    """Compose what `baton router` runs with."""
    template = settings["chat_template"]
    return RouterConfig(
        model_path=model.path,
        served_model_names=settings["served_model_name"] or (model.name,),
        secret=read_secret(settings["secret_file"]),
        chat_template=None if template is None else _read_text("chat-template", template),
        **settings.fill(RouterConfig),
    )


def prefill_config(settings: Settings, model: ResolvedModel) -> PrefillConfig:
    """Compose what `baton prefill` runs with."""
    return _prefill(settings, model, _service(settings), TransferConfig(**settings.fill(TransferConfig)))


def decode_config(settings: Settings, model: ResolvedModel) -> DecodeConfig:
    """Compose what `baton decode` runs with."""
    return _decode(settings, model, _service(settings), TransferConfig(**settings.fill(TransferConfig)))


def colocated_configs(settings: Settings, model: ResolvedModel) -> tuple[PrefillConfig, DecodeConfig]:
    """Compose what `baton colocated` runs with: two services, one port apart where the admin port is fixed."""
    transfer = TransferConfig(transport="inproc")
    port = settings["admin_port"]
    second_port = port + 1 if port else port
    return (
        _prefill(settings, model, _service(settings, suffix="-prefill"), transfer),
        _decode(settings, model, _service(settings, suffix="-decode", admin_port=second_port), transfer),
    )


def _check_grpc(settings: Settings) -> None:
    names = ("grpc", "grpc_health", "grpc_reflection")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if settings["grpc_port"] is not None and missing:
        raise ConfigError(
            f"grpc-port: needs the extra: pip install '.[grpc]' in the checkout (missing: {', '.join(missing)})"
        )


def serve_config(settings: Settings) -> ServeConfig:
    """Compose and check what `baton serve` starts, before anything starts."""
    _check_grpc(settings)
    if settings["mode"] == "colocated":
        _check_colocated(settings)
        cores = None
    else:
        if settings["prefill_sms"]:
            raise ConfigError("prefill-sms: divides a GPU between the roles of one process: only with --mode colocated")
        names = ("threads", "prefill_threads", "decode_threads")
        request = CoreRequest(
            **{name: settings[name] for name in names},
            prefill_cores=settings["prefill_cores"] or (),
            decode_cores=settings["decode_cores"] or (),
        )
        is_pinned = not computes_on_gpu(settings)
        cores = plan_cores(usable_cores(), settings["prefill"], settings["decode"], request, is_pinned=is_pinned)
    # The children's configs are built here once, only to have their bounds checked before anything is started.
    engine = EngineConfig(model=settings.model, num_threads=1, **settings.fill(EngineConfig))
    service = ServiceConfig("check", ("http://check",), b"0" * MIN_SECRET_BYTES, **settings.fill(ServiceConfig))
    transfer = TransferConfig(**settings.fill(TransferConfig))
    cache = cache_dir(settings)
    PrefillConfig(engine, service, transfer, cache, **settings.fill(PrefillConfig))
    DecodeConfig(engine, service, transfer, cache, **settings.fill(DecodeConfig))
    router = RouterConfig(settings.model, ("check",), service.secret, **settings.fill(RouterConfig))
    Access(router.api_keys, router.api_key_files, time.monotonic)
    if settings["chat_template"] is not None:
        _read_text("chat-template", settings["chat_template"])
    if settings["secret_file"] is not None:
        read_secret(settings["secret_file"])
    return ServeConfig(settings, cores, settings["drain_s"])


def without_decode(config: ServeConfig) -> ServeConfig:
    """Give what `baton serve` starts for an encoder: prefill workers alone, with every core.

    Raises ConfigError for options that speak of decode workers.
    """
    settings = config.settings
    for key in ("decode", "decode_threads", "decode_cores"):
        if key in settings.given:
            raise ConfigError(f"{key.replace('_', '-')}: has no meaning for a model that only embeds")
    if settings["mode"] == "colocated":
        raise ConfigError("mode: a model that only embeds has prefill workers alone, so nothing to colocate")
    cores = plan_prefill(
        usable_cores(),
        settings["prefill"],
        CoreRequest(
            threads=settings["threads"],
            prefill_threads=settings["prefill_threads"],
            prefill_cores=settings["prefill_cores"] or (),
        ),
        is_pinned=not computes_on_gpu(settings),
    )
    return replace(config, cores=cores)


def _check_colocated(settings: Settings) -> None:
    for key in ("prefill", "decode"):
        if settings[key] != 1:
            raise ConfigError(f"{key}: colocated mode runs both roles in one worker; got {settings[key]}")
    split = ("prefill_threads", "decode_threads", "prefill_cores", "decode_cores", "transport")
    for key in split:
        if key in settings.given:
            raise ConfigError(f"{key.replace('_', '-')}: has no meaning in colocated mode, which is one process")
    if settings["prefill_sms"] and not computes_on_gpu(settings):
        raise ConfigError("prefill-sms: divides the multiprocessors of a GPU; there is none, or --device says cpu")


def _prefill(
    settings: Settings, model: ResolvedModel, service: ServiceConfig, transfer: TransferConfig
) -> PrefillConfig:
    more = settings.fill(PrefillConfig)
    return PrefillConfig(engine_config(settings, model), service, transfer, cache_dir(settings), **more)


def _decode(settings: Settings, model: ResolvedModel, service: ServiceConfig, transfer: TransferConfig) -> DecodeConfig:
    more = settings.fill(DecodeConfig)
    return DecodeConfig(engine_config(settings, model), service, transfer, cache_dir(settings), **more)


def engine_config(settings: Settings, model: ResolvedModel) -> EngineConfig:
    """Compose what a worker computes with."""
    plan: WorkerCores = plan_alone(usable_cores(), settings["threads"], settings["cores"])
    return EngineConfig(model=model.reference, num_threads=plan.num_threads, **settings.fill(EngineConfig))


def _service(settings: Settings, *, suffix: str = "", admin_port: int | None = None) -> ServiceConfig:
    worker_id = settings["worker_id"] or f"{settings.role}-{platform.node()}-{os.getpid()}"
    fields = settings.fill(ServiceConfig)
    if admin_port is not None:
        fields["admin_port"] = admin_port
    secret = read_secret(settings["secret_file"])
    return ServiceConfig(worker_id=worker_id + suffix, router_urls=settings["router_url"], secret=secret, **fields)


def _read_text(option: str, path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: cannot read {path}: {error}") from None
