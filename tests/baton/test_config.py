"""Sources of options: which one wins, what each refuses, and that every config field has its option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from baton import config
from baton.cli import build_parser
from baton.options import OPTIONS, options_of
from baton.settings import Settings, merge
from baton.values import core_set, number, whole
from decode.config import DecodeConfig
from engine.config import EngineConfig, ServiceConfig
from kvtransfer.config import TransferConfig
from prefill.config import PrefillConfig
from protocol.errors import ConfigError
from router.config import RouterConfig

# Fields that no option fills one to one, because `baton/config.py` finds or composes them.
COMPOSED: dict[type, set[str]] = {
    RouterConfig: {"model_path", "served_model_names", "secret", "chat_template"},
    EngineConfig: {"model", "num_threads"},
    ServiceConfig: {"worker_id", "router_urls", "secret"},
    PrefillConfig: {"engine", "service", "transfer", "cache_dir"},
    DecodeConfig: {"engine", "service", "transfer", "cache_dir"},
    TransferConfig: set(),
}
MODEL = config.ResolvedModel("/models/a.gguf", "/models/a.gguf", "a")


def settings(
    role: str = "serve",
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
    also: Mapping[str, object] | None = None,
    **arguments: object,
) -> Settings:
    return merge(role, {"model": "m", **(also or {}), **arguments}, environment or {}, file)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def secret_path(tmp_path: Path) -> str:
    """Return a file with a good cluster secret."""
    return str(write(tmp_path / "secret", "0123456789abcdef0123\n"))


def test_command_line_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "port: 1\nmax-num-seqs: 1\nblock_size: 32\n")
    found = settings(environment={"BATON_PORT": "2", "BATON_MAX_NUM_SEQS": "2"}, file=file, port="3")
    assert (found["port"], found["max_num_seqs"], found["block_size"], found["num_slots"]) == (3, 2, 32, 8)
    assert found.given == {"port", "max_num_seqs", "block_size"}


def test_the_model_may_come_from_any_source(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "model: from-file\n")
    assert merge("serve", {}, {}, file).model == "from-file"
    assert merge("serve", {}, {"BATON_MODEL": "from-env"}, file).model == "from-env"
    assert merge("serve", {"model": "from-line"}, {"BATON_MODEL": "from-env"}, file).model == "from-line"
    with pytest.raises(ConfigError, match="MODEL"):
        merge("serve", {}, {}, None)


def test_an_empty_variable_counts_as_unset() -> None:
    assert settings(environment={"BATON_PORT": ""})["port"] == 8000


def test_lists_come_repeated_by_commas_or_as_yaml(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "served-model-name: [a, b]\n")
    assert settings(file=file)["served_model_name"] == ("a", "b")
    assert settings(environment={"BATON_SERVED_MODEL_NAME": "a, b"})["served_model_name"] == ("a", "b")
    assert settings(served_model_name=["x", "y"])["served_model_name"] == ("x", "y")


def test_one_file_may_hold_options_of_every_role(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "prefill-chunk-tokens: 64\nport: 9\n")
    assert "prefill_chunk_tokens" not in settings("router", file=file).values
    assert settings("router", file=file)["port"] == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", r"unknown option 'prot'; did you mean port\?"),
        ("http-fd: 3", "unknown option 'http-fd'"),
        ("port: 1\nport : 2\nPort: 3", "unknown option 'Port'"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "max_num_seqs is set twice"),
        ("- a", "expected options"),
        ("port: {a", "not valid YAML"),
        ("port: true", "port: expected a whole number, got True"),
        ("port: [1]", "port: expected a whole number"),
        ("port: 99999", "port: must be at most 65535"),
        ("drain-s: .nan", "drain_s: expected a finite number"),
        ("mode: both", "mode: expected one of disaggregated, colocated"),
        ("served-model-name: []", "served_model_name: expected at least one"),
        ("enforce-eager: 1", "enforce_eager: expected true or false"),
    ],
)
def test_a_bad_file_is_an_error_that_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(file=write(tmp_path / "c.yaml", text))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config: cannot read"):
        settings(file=tmp_path / "none.yaml")


def test_errors_name_the_variable_or_the_flag() -> None:
    with pytest.raises(ConfigError, match="^BATON_PORT: expected a whole number.*enableServiceLinks"):
        settings(environment={"BATON_PORT": "tcp://10.0.0.1:80"})
    with pytest.raises(ConfigError, match="^--port: must be at least 0"):
        settings(port="-1")


def test_hidden_options_do_not_come_from_the_environment() -> None:
    assert settings("router", environment={"BATON_HTTP_FD": "3"})["http_fd"] is None


def test_a_switch_is_turned_on_by_name_or_by_value(tmp_path: Path) -> None:
    assert settings()["enforce_eager"] is False
    assert settings(file=write(tmp_path / "c.yaml", "enforce-eager: true\n"))["enforce_eager"] is True
    assert settings(environment={"BATON_ENFORCE_EAGER": "True"})["enforce_eager"] is True
    for line, expected in ((["--enforce-eager"], "true"), (["--enforce-eager", "false"], "false"), ([], None)):
        given = vars(build_parser().parse_args(["decode", "m", *line]))
        assert given.get("enforce_eager") == expected


def test_values_are_parsed_strictly() -> None:
    assert [whole("12"), whole(12), number("0.5"), number(2)] == [12, 12, 0.5, 2.0]
    assert core_set("0,2-4,3") == core_set([0, 2, "3-4"]) == (0, 2, 3, 4)
    assert core_set(1) == (1,)
    for parse, bad in [(whole, 1.5), (whole, ""), (number, "x"), (number, "inf"), (number, True)]:
        with pytest.raises(ValueError, match="expected"):
            parse(bad)
    for bad_cores in ("3-1", "a", "-1", "1-", "", "0-99999999"):
        with pytest.raises(ValueError, match="expected"):
            core_set(bad_cores)


@pytest.mark.parametrize("owner", list(COMPOSED), ids=lambda owner: owner.__name__)
def test_every_config_field_has_an_option(owner: type) -> None:
    filled = {name for option in OPTIONS for target, name in option.fills if target is owner}
    assert filled | COMPOSED[owner] == {field.name for field in fields(owner)}
    assert not filled & COMPOSED[owner]


def test_fields_that_share_an_option_share_its_default() -> None:
    for option in OPTIONS:
        for owner, name in option.fills:
            (default,) = (field.default for field in fields(owner) if field.name == name)
            assert default is not MISSING
            assert default == option.default_value(), f"{option.name}: {owner.__name__}.{name} differs"


def test_keys_and_variables_are_unique() -> None:
    assert len({option.key for option in OPTIONS}) == len({option.variable for option in OPTIONS}) == len(OPTIONS)


def test_router_config_takes_options_secret_and_template(tmp_path: Path, secret_path: str) -> None:
    template = write(tmp_path / "t.jinja", "{{ messages }}")
    given = settings("router", secret_file=secret_path, chat_template=str(template), port="9", drain_s="1.5")
    found = config.router_config(given, MODEL)
    assert (found.http_port, found.drain_s, found.chat_template) == (9, 1.5, "{{ messages }}")
    assert (found.secret, found.served_model_names) == (b"0123456789abcdef0123", ("a",))


def test_worker_configs_take_their_options(secret_path: str) -> None:
    shared = {"secret_file": secret_path, "worker_id": "w", "router_url": ["http://r:1"], "threads": "3"}
    prefill = config.prefill_config(settings("prefill", prefill_chunk_tokens="64", also=shared), MODEL)
    decode = config.decode_config(settings("decode", max_num_seqs="7", num_kv_blocks="99", also=shared), MODEL)
    assert (prefill.chunk_tokens, prefill.engine.num_threads, prefill.service.worker_id) == (64, 3, "w")
    assert (decode.max_num_seqs, decode.engine.num_kv_blocks, decode.transfer.transport) == (7, 99, "ucx")
    assert decode.service.router_urls == ("http://r:1",)


def test_colocated_configs_share_the_engine_and_move_blocks_in_process(secret_path: str) -> None:
    given = settings("colocated", secret_file=secret_path, worker_id="w", admin_port="700")
    prefill, decode = config.colocated_configs(given, MODEL)
    assert prefill.engine == decode.engine
    assert {prefill.transfer.transport, decode.transfer.transport} == {"inproc"}
    assert (prefill.service.worker_id, decode.service.worker_id) == ("w-prefill", "w-decode")
    assert (prefill.service.admin_port, decode.service.admin_port) == (700, 701)


def test_a_role_without_a_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="secret-file: this role needs"):
        config.router_config(settings("router"), MODEL)
    short = write(tmp_path / "short", "abc\n")
    with pytest.raises(ConfigError, match="holds 3 bytes"):
        config.router_config(settings("router", secret_file=str(short)), MODEL)
    with pytest.raises(ConfigError, match="cannot read"):
        config.router_config(settings("router", secret_file=str(tmp_path / "none")), MODEL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": "17"}, "--block-size: expected one of 8, 16, 32"),
        ({"dtype": "int3"}, "--dtype: expected one of auto"),
        ({"slot_bytes": "1"}, "slot_bytes must be"),
        ({"lease_ttl_s": "0.1"}, "lease_ttl_s"),
        ({"max_num_seqs": "0"}, "max_num_seqs must be"),
        ({"prefill_chunk_tokens": "0"}, "chunk_tokens must be"),
        ({"chat_template": "/nonexistent"}, "chat-template: cannot read"),
        ({"secret_file": "/nonexistent"}, "secret-file: cannot read"),
        ({"decode_cores": "60000"}, "decode-cores"),
        ({"mode": "colocated", "decode": "2"}, "decode: colocated mode"),
        ({"mode": "colocated", "prefill_cores": "0"}, "prefill-cores: has no meaning in colocated"),
    ],
)
def test_serve_checks_the_configuration_of_all_children(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.serve_config(settings(also=arguments))


def test_serve_plans_cores_only_for_separate_workers() -> None:
    found = config.serve_config(settings(device="cpu", prefill="2"))
    assert found.cores is not None
    assert (len(found.cores.prefill), len(found.cores.decode), found.is_colocated) == (2, 1, False)
    assert config.serve_config(settings(mode="colocated")).is_colocated


def test_a_model_is_named_by_its_reference_or_the_last_part_of_its_path(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    write(tmp_path / "tiny" / "config.json", "{}")
    write(tmp_path / "m.Q4.gguf", "")
    assert config.model_name("org/name") == "org/name"
    assert config.model_name(str(tmp_path / "tiny")) == "tiny"
    assert config.model_name(f"dummy:{tmp_path}/tiny/config.json") == "tiny"
    assert config.model_name(str(tmp_path / "m.Q4.gguf")) == "m.Q4"


def test_the_cache_is_where_the_option_or_variable_says(tmp_path: Path) -> None:
    assert config.cache_dir(settings(environment={"BATON_CACHE": str(tmp_path)})) == tmp_path
    assert config.cache_dir(settings()) == Path.home() / ".cache" / "baton"


def test_children_do_not_see_our_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_PORT", "1")
    monkeypatch.setenv("BATON_CONFIG", "f")
    monkeypatch.setenv("HF_HOME", "/hub")
    found = config.child_environment()
    assert not {"BATON_PORT", "BATON_CONFIG"} & set(found)
    assert found["HF_HOME"] == "/hub"


@pytest.mark.parametrize("role", ["serve", "router", "prefill", "decode", "colocated"])
def test_every_default_passes_its_own_check(role: str) -> None:
    for option in options_of(role):
        if (default := option.default_value()) not in (None, ()):
            assert option.read(default, "default") == default
