"""What a newcomer types: vLLM's options, slips of the pen, and what the command answers. Nothing is started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from baton import cli, launch
from baton.command_line import describe
from baton.config import ServeConfig, serve_config
from baton.options import OPTIONS, ROLES, options_of
from baton.settings import Settings, merge, misspelt
from baton.vllm_names import ALIASES, ELSEWHERE, SHORT
from protocol.errors import ConfigError


def settings(*line: str, environment: Mapping[str, str] | None = None) -> Settings:
    parsed = cli.parse(line)
    return merge(parsed.pop("role"), parsed, environment or {}, None)


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every BATON_ variable away."""
    for name in list(os.environ):
        if name.startswith("BATON_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("serv smollm2", "baton: there is no command 'serv'; did you mean serve?"),
        ("runbatch", "did you mean run-batch?"),
        ("smollm2", "did you mean baton serve smollm2?"),
        ("ORG/NAME --port 1", "did you mean baton serve ORG/NAME?"),
        ("help serv", "did you mean serve?"),
        ("serve", "as in: baton serve smollm2"),
        ("serve m --prot 1", "baton serve: --prot: there is no such option; did you mean --port?"),
        ("serve m --max-num-seq=1", "did you mean --max-num-seqs?"),
        ("serve m --gpu-memory-utilisation 0.9", "did you mean --gpu-memory-utilization?"),
        ("serve m --xyzzy", "--xyzzy: there is no such option"),
        ("router m --router-url x", "--router-url: is not an option of baton router, but of decode, prefill"),
        ("serve m --served-model-name a b", "unexpected 'b'"),
        ("serve m --mode colocatd", "got 'colocatd'; did you mean colocated?"),
        ("serve m --dtype floot16", "did you mean float16?"),
        ("serve m --max_num_seqs x", "--max-num-seqs: expected a whole number"),
        (
            "serve smolm2 --port 0",
            "no model 'smolm2': no such path, and not a name that can be fetched; did you mean",
        ),
        ("serve --model a b", "--model: MODEL is given already: b"),
        ("serve m --prefill-chunk-tokens 64 --max-num-batched-tokens 64", "is the same as --prefill-chunk-tokens"),
        ("serve m --tensor-parallel-size 2", "--tensor-parallel-size: a model lies on one device"),
        ("serve m -tp 2", "--tensor-parallel-size: a model lies on one device"),
        ("serve m --trust-remote-code", "--trust-remote-code: no code out of a model's folder is ever run"),
        ("serve m --no-enable-prefix-caching", "prefixes are always cached"),
        ("serve m --async-scheduling", "on a GPU steps are always prepared ahead"),
        ("serve m --attention-backend FLASH_ATTN", "say --kernels"),
        ("serve m --tensor-parallel-siez 2", "did you mean --tensor-parallel-size?"),
        ("serve m --some-backend x", "--some-backend: there is no such option\n"),
        ("run-batch a b --modle m", "--modle: there is no such option; did you mean --model?"),
        ("serve m --swap-space 4", "--swap-space: nothing is swapped"),
    ],
)
@pytest.mark.usefixtures("no_variables")
def test_what_is_meant_is_said_in_one_line(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


def test_options_of_vllm_mean_the_same_here() -> None:
    found = settings(
        *("serve", "--model", "m", "--gpu-memory-utilization", "0.5", "--max_num_batched_tokens=128", "-q", "int8"),
        *("--dtype", "half", "--uvicorn-log-level", "warning", "--num-gpu-blocks-override", "64"),
        *("--allowed-origins", '["https://a.example", "https://b.example"]'),
    )
    assert found.model == "m"
    assert {key: found[key] for key in ("kv_memory_share", "prefill_chunk_tokens", "quantization", "dtype")} == {
        "kv_memory_share": 0.5,
        "prefill_chunk_tokens": 128,
        "quantization": "int8",
        "dtype": "float16",
    }
    assert (found["log_level"], found["num_kv_blocks"]) == ("warning", 64)
    assert found["allowed_origins"] == ("https://a.example", "https://b.example")
    assert settings("serve", "m", environment={"BATON_MAX_NUM_BATCHED_TOKENS": "32"})["prefill_chunk_tokens"] == 32


def test_what_is_so_anyway_may_be_asked_for() -> None:
    line = (
        "serve m -tp 1 --pipeline-parallel-size 1 --enable-prefix-caching --enable-chunked-prefill "
        "--enable-auto-tool-choice --no-trust-remote-code --swap-space 0"
    )
    assert settings(*line.split()).given == frozenset()


def test_vllms_names_stand_in_files_too(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_bytes(b"\xef\xbb\xbfmodel: m\ngpu-memory-utilization: 0.5\ntensor_parallel_size: 1\nswap-space: null\n")
    assert merge("serve", {}, {}, file)["kv_memory_share"] == 0.5
    file.write_text("tensor-parallel-size: 4")
    with pytest.raises(ConfigError, match="vllm.yaml: tensor-parallel-size: a model lies on one device"):
        merge("serve", {"model": "m"}, {}, file)


@pytest.mark.parametrize(("name", "share"), [("--gpu-memory-utilization", 0.3), ("--kv-memory-share", None)])
def test_memory_under_vllms_name_is_that_of_all_workers(
    name: str, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "computes_on_gpu", lambda _: True)
    given = settings("serve", "m", name, "0.6")
    divided = launch._memory_option(ServeConfig(given, serve_config(given).cores, 1.0))
    assert divided.get("kv_memory_share") == share


def test_variables_that_are_very_like_ours_are_spoken_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = ["BATON_SERVICE_HOST", "BATON_SERVICE_PORT", "BATON_PORT_8000_TCP_ADDR", "BATON_TEST_MUTATION", "PORT"]
    assert misspelt([*theirs, "BATON_PORT", "BATON_MODEL", "BATON_CACHE", "BATON_GPU_MEMORY_UTILIZATION"]) == []
    assert misspelt(["BATON_PROT"]) == ["BATON_PROT is not read: there is no such variable; did you mean BATON_PORT?"]
    [line] = misspelt(["BATON_TENSOR_PARALLEL_SIZE"])
    assert line.startswith("BATON_TENSOR_PARALLEL_SIZE is not read: a model lies on one device")
    monkeypatch.setenv("BATON_LOGLEVEL", "debug")
    assert cli.main(["serve", "m", "--port", "x"]) == 2
    assert "did you mean BATON_LOG_LEVEL?" in capsys.readouterr().err


def test_no_name_of_vllms_hides_one_of_ours() -> None:
    ours = {option.key for option in OPTIONS}
    assert set(ALIASES.values()) <= ours and not (set(ALIASES) | set(ELSEWHERE)) & ours
    assert set(SHORT.values()) <= ours | set(ELSEWHERE) and not set(ALIASES) & set(ELSEWHERE)
    assert all(len(elsewhere.says) < 110 for elsewhere in ELSEWHERE.values())


@pytest.mark.parametrize("role", ROLES)
def test_help_shows_choices_defaults_and_units(
    role: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        cli.main(["help", role])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for option in options_of(role):
        if option.is_hidden:
            continue
        assert " ".join(describe(option).split()) in shown
        assert all(str(choice) in describe(option) for choice in option.choices)
        assert describe(option).endswith("]") and not describe(option).endswith("[]")
