"""The GPU benchmark: floors by hand, the clock, verdicts, and a rehearsal of every section on the CPU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bench.gpu import __main__ as command
from bench.gpu import interference, peer, recording, serving, shapes, sharing, transformers_peer
from bench.gpu.decoding import device_steps_s, judged
from bench.gpu.piecewise import cut_step
from bench.gpu.points import Clock, DeviceLost, Figures, Outcome, Point, Runner, Section, Skip
from bench.gpu.profiling import kernel_table
from bench.gpu.report import TITLES, markdown
from bench.gpu.rig import REHEARSAL, Scale, Stage, decode_items
from bench.gpu.shapes import MODELS, TARGETS, Target
from bench.gpu.timing import percentile
from bench.gpu.weights import make_weights
from engine.device_queue import HostQueue, open_queue
from kernels.table import REFERENCE
from model.dummy_weights import DummyWeights
from model.weights import assemble

CPU = torch.device("cpu")
LLAMA, QWEN = MODELS["8b"].shape, MODELS["1.7b"].shape
COPY_BYTES_PER_S = 4.3e12


def quiet(line: str) -> None:
    """Say nothing."""


def tiny_stage() -> Stage:
    """Return the stage of a rehearsal."""
    return Stage(CPU, {name: model.tiny() for name, model in MODELS.items()}, REHEARSAL, REFERENCE, quiet)


@pytest.fixture(scope="module")
def stage() -> Stage:
    """Return a stage that the tests of this module share."""
    return tiny_stage()


# Floors


def test_a_step_of_llama_8b_streams_15_gigabytes_and_takes_3_52_ms_at_the_copys_bandwidth() -> None:
    layer = 6144 * 4096 + 4096 * 4096 + 2 * 14336 * 4096 + 4096 * 14336
    assert shapes.streamed_bytes(LLAMA) == 2 * (32 * layer + 128256 * 4096) == 15_009_316_864
    assert shapes.kv_token_bytes(LLAMA) == 128 << 10
    assert shapes.step_bytes(LLAMA, 1, 1024) / COPY_BYTES_PER_S == pytest.approx(3.52e-3, abs=5e-6)


def test_a_step_of_qwen_1_7b_streams_3_44_gigabytes_with_its_tied_head_counted_once() -> None:
    layer = 4096 * 2048 + 2048 * 2048 + 2 * 6144 * 2048 + 2048 * 6144
    assert shapes.streamed_bytes(QWEN) == 2 * (28 * layer + 151936 * 2048) == 3_440_902_144
    assert shapes.kv_token_bytes(QWEN) == 112 << 10


@pytest.mark.parametrize(
    ("name", "batch", "context_tokens", "floor_ms"),
    [
        *(("8b", 1, 8192, 3.74), ("8b", 8, 8192, 5.49), ("8b", 32, 1024, 4.49), ("8b", 32, 8192, 11.48)),
        *(("8b", 64, 8192, 19.47), ("1.7b", 1, 1024, 0.83), ("1.7b", 8, 8192, 2.55), ("1.7b", 32, 1024, 1.67)),
        *(("1.7b", 64, 1024, 2.55), ("1.7b", 64, 8192, 14.78)),
    ],
)
def test_floors_are_those_of_the_published_table(name: str, batch: int, context_tokens: int, floor_ms: float) -> None:
    found = shapes.step_bytes(MODELS[name].shape, batch, context_tokens) / COPY_BYTES_PER_S
    assert found * 1e3 == pytest.approx(floor_ms, abs=0.006)


def test_prefill_of_8k_counts_every_product_once_causal_pairs_only_and_one_row_of_logits() -> None:
    num_tokens, first = 8192, 6144 * 4096
    rest = LLAMA.layer_weights - first
    # After the last layer's attention a single row goes on.
    products = 32 * num_tokens * first + (31 * num_tokens + 1) * rest + 128256 * 4096
    pairs = num_tokens * (num_tokens + 1) // 2
    assert shapes.prefill_operations(LLAMA, num_tokens) == 2.0 * products + 32 * 4.0 * pairs * 4096
    assert 32 * 4.0 * pairs * 4096 == pytest.approx(17.6e12, rel=2e-3)
    behind = shapes.prefill_operations(LLAMA, 1, num_tokens - 1) - shapes.prefill_operations(LLAMA, 1)
    assert behind == 32 * 4.0 * (num_tokens - 1) * 4096


def test_a_hand_off_of_8k_tokens_of_llama_moves_a_gibibyte() -> None:
    assert shapes.handoff_bytes(LLAMA, 8192) == 1 << 30


def test_the_targets_are_the_stated_ones() -> None:
    published = {
        name: [(t.batch, t.context_tokens, t.gate, t.stretch) for t in targets if t.is_published]
        for name, targets in TARGETS.items()
    }
    assert published == {
        "8b": [(1, 1024, 1.20, 1.10), (8, 1024, 1.22, 1.12), (32, 1024, 1.30, 1.18), (64, 8192, 1.18, 1.12)],
        "1.7b": [(1, 1024, 1.60, 1.28), (8, 1024, 1.60, 1.30), (32, 1024, 1.50, 1.30), (64, 8192, 1.18, 1.12)],
    }
    for targets in TARGETS.values():
        points = {(t.batch, t.context_tokens) for t in targets}
        assert points == {(batch, context) for batch in (1, 8, 32, 64) for context in (1024, 8192)}


@pytest.mark.parametrize("name", list(MODELS))
def test_weights_made_on_the_device_have_the_shapes_of_loaded_ones(name: str) -> None:
    config = MODELS[name].tiny().config
    made = make_weights(config, torch.float32, CPU)
    loaded = assemble(config, DummyWeights(0), torch.float32, CPU, None)
    assert made.num_bytes() == loaded.num_bytes()
    assert (made.lm_head is made.embedding) == (loaded.lm_head is loaded.embedding) == config.tie_embeddings
    for ours, theirs in zip(made.layers, loaded.layers, strict=True):
        for field in ("attention_norm", "qkv", "q_norm", "attention_out", "mlp_norm", "gate_up", "down"):
            mine, other = getattr(ours, field), getattr(theirs, field)
            assert (mine is None) == (other is None) == (field == "q_norm" and not config.qk_norm)
            if mine is not None:
                assert mine.shape == other.shape and float(mine.std()) == pytest.approx(float(other.std()), rel=0.5)


# Clock, points


def section(name: str, share_s: float, *points: Point) -> Section:
    """Return a section without a model."""
    return Section(name, "", share_s, points)


def point(name: str, measure: Any = dict, need_s: float = 0.0) -> Point:
    """Return a point that gives no figures unless told otherwise."""
    return Point(name, {}, need_s, measure)


def runner(on_change: Any = lambda outcomes: None, kept: Sequence[Outcome] = (), is_lost: bool = False) -> Runner:
    """Return a runner that says nothing."""
    return Runner(quiet, on_change, lambda: is_lost, kept)


def test_a_section_may_use_what_those_before_it_left_but_not_what_later_ones_are_promised() -> None:
    clock = Clock(100.0, [1.0, 3.0])
    assert clock.left_s(0) == pytest.approx(25.0, abs=1.0)
    assert clock.left_s(1) == pytest.approx(100.0, abs=1.0)


def test_a_point_without_time_is_skipped_with_the_reason_and_the_next_section_keeps_its_share() -> None:
    run = runner()
    run.run([section("a", 1.0, point("long", need_s=60.0)), section("b", 1.0, point("short", need_s=40.0))], 100.0)
    assert [(o.name, o.status) for o in run.outcomes] == [("long", "skipped"), ("short", "measured")]
    assert "no time left" in run.outcomes[0].reason and "60 s needed" in run.outcomes[0].reason


def test_skips_and_failures_are_noted_and_the_run_goes_on() -> None:
    def skips() -> Figures:
        raise Skip("not here")

    def breaks() -> Figures:
        raise RuntimeError("out of memory")

    seen: list[int] = []
    run = runner(lambda outcomes: seen.append(len(outcomes)))
    run.run([section("a", 1.0, point("s", skips), point("f", breaks), point("m", lambda: {"x": 1.5}))], 10.0)
    assert [(o.status, o.reason) for o in run.outcomes] == [
        ("skipped", "not here"),
        ("failed", "RuntimeError: out of memory"),
        ("measured", ""),
    ]
    assert run.outcomes[2].figures == {"x": 1.5}
    assert seen == [1, 2, 3]


def test_a_point_that_takes_the_device_along_ends_the_run_and_what_was_kept_is_not_measured_again() -> None:
    def breaks() -> Figures:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    sections = [section("a", 1.0, point("first"), point("bad", breaks), point("last"))]
    run = runner(is_lost=True)
    with pytest.raises(DeviceLost):
        run.run(sections, 10.0)
    again = runner(kept=run.outcomes)
    again.run(sections, 10.0)
    assert [(o.name, o.status) for o in again.outcomes] == [
        ("first", "measured"),
        ("bad", "failed"),
        ("last", "measured"),
    ]
    assert again.outcomes[:2] == run.outcomes


def test_every_point_can_begin_within_its_sections_share() -> None:
    real = Stage(CPU, MODELS, Scale(), REFERENCE, quiet)
    sections = command.plan(real, list(MODELS), "python")
    assert {s.name for s in sections} == set(TITLES)
    assert sum(s.share_s for s in sections) == pytest.approx(command.BUDGET_S, rel=0.02)
    for one in sections:
        assert sum(p.need_s for p in one.points) <= one.share_s * 1.02, one.name


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(i) for i in range(1, 101)]
    assert (percentile(values, 0.99), percentile(values, 0.5), percentile([7.0], 0.99)) == (99.0, 50.0, 7.0)


def test_verdicts_follow_from_medians_over_windows() -> None:
    target = Target(1, 1024, 1.20, 1.10, True)
    figures = judged([1.13e-3] * 9, [[1.15e-3] * 99 + [2e-3], [1.15e-3] * 100, [1.3e-3] * 100], 1e-3, target)
    assert figures["client_over_floor"] == pytest.approx(1.15)
    assert (figures["meets_gate"], figures["meets_stretch"]) == (True, False)
    assert figures["client_over_device"] == pytest.approx(1.15 / 1.13) and figures["meets_client_over_device"]
    assert figures["p99_over_median"] == 1.0 and figures["meets_p99_over_median"]
    assert figures["client_high_ms"] == pytest.approx(1.3) and figures["num_steps"] == 300


# Rig, recording


def test_sequences_of_a_batch_share_no_block_and_no_prompt(stage: Stage) -> None:
    one = stage.rig("8b")
    placed = one.sequences(4, 20, 4) + one.sequences(4, 20, 4, first_block=12)
    blocks = [block for sequence in placed for block in sequence.block_ids]
    assert len(set(blocks)) == len(blocks) == 8 * 3
    assert len({tuple(sequence.names) for sequence in placed}) == 8
    assert all(item.start == 20 and item.num_tokens == 1 for item in decode_items(placed))


def test_a_batch_that_does_not_fit_the_kv_memory_is_skipped_with_the_numbers(stage: Stage) -> None:
    one = stage.rig("8b")
    with pytest.raises(Skip, match=f"room for {one.num_blocks}"):
        one.sequences(64, 8 * one.num_blocks, 1)
    with pytest.raises(Skip, match=f"room for {one.num_blocks}"):
        one.block_tables(one.num_blocks + 1, 1)


def test_a_step_is_timed_as_often_as_asked_and_moves_its_sequences_on(stage: Stage) -> None:
    one = stage.rig("8b")
    scale = replace(REHEARSAL, num_eager_steps=5)
    assert len(device_steps_s(one, one.eager, 3, 30, scale)) == 5
    # One step to enter, four to warm up, five timed, from a prompt that puts the stated length in their middle.
    assert one.state.all.positions[:3].tolist() == [30 - 2 - 4 + 10] * 3


def test_a_step_in_pieces_is_cut_at_each_attention_and_gives_the_tokens_of_the_whole(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Logged(recording.NoGraph):
        def capture_begin(self, pool: Any) -> None:
            events.append("begin")

        def capture_end(self) -> None:
            events.append("end")

        def replay(self) -> None:
            events.append("replay")

    monkeypatch.setattr(recording, "NoGraph", Logged)
    one = stage.rig("8b")
    pieces = cut_step(one)
    num_layers = one.loaded.fingerprint.num_layers
    assert events == ["begin", "end"] * (num_layers + 1)
    tokens = []
    for step in (one.eager, pieces):
        events.clear()
        items = decode_items(one.sequences(1, 20, 4))
        with one.queue.active():
            one.kv_cache.tensor.fill_(0.5)
        run = one.new_runner(step)
        tokens.append([run.launch(items).results()[0].token_id for _ in range(3)])
    assert tokens[0] == tokens[1]
    assert events == ["replay"] * (num_layers + 1) * 3


def test_what_stands_between_pieces_runs_on_the_memory_that_the_next_piece_reads() -> None:
    step = recording.RecordedStep(1, open_queue(CPU))
    source = torch.zeros(4)
    results: list[Tensor] = []
    attend = step.cutting(lambda query: query + 1)

    def compute(num_lanes: int, adjusts: bool) -> Tensor:
        results.append(attend(source))
        return results[-1]

    step.record(compute)
    cut = results[-1]
    source.fill_(41.0)
    step(1, False)
    assert cut.tolist() == [42.0] * 4


# Interference


@dataclass
class SlowFlight:
    """A step that is done at the n-th look."""

    num_looks: int

    def is_done(self) -> bool:
        """Count a look."""
        self.num_looks -= 1
        return self.num_looks <= 0

    def results(self) -> list[Any]:
        """Give one result that wants nothing more."""
        return [object()]


class ScriptedRunner:
    """Runs nothing, two ahead, and notes what it was asked for."""

    depth = 2

    def __init__(self, log: list[str], name: str, num_looks: int) -> None:
        self._log, self._name, self._num_looks = log, name, num_looks

    def launch(self, items: Sequence[Any]) -> SlowFlight:
        """Note a launch."""
        self._log.append(self._name if len(items) > 1 else f"{self._name}{items[0].start}")
        return SlowFlight(self._num_looks)


def test_streams_go_on_between_the_chunks_of_prompts_that_arrive_one_after_another(stage: Stage) -> None:
    log: list[str] = []
    one = stage.rig("8b")
    streams, prompts = one.sequences(2, 8, 40), one.sequences(2, 24, 1, first_block=20)
    decode: Any = ScriptedRunner(log, "d", 1)
    prefill: Any = ScriptedRunner(log, "p", 3)
    window = interference.play(
        interference.Decoding(decode, streams), interference.Prompts(prefill, prompts, 8), 4, 200
    )
    assert [entry for entry in log if entry != "d"] == ["p0", "p8", "p16"] * 2
    assert len(window.ttft_s) == 6  # every chunk's flight gives a result here
    first, last = log.index("p0"), len(log) - 1 - log[::-1].index("p16")
    assert log[first:last].count("d") >= 6
    assert len(window.gaps_s) >= 6 and min(window.gaps_s) > 0


def test_a_split_records_its_own_step_and_drives_streams_and_prompts(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for what only a GPU has: streams of a green context, and graphs."""
    shares = SimpleNamespace(stream=None, num_sms=72), SimpleNamespace(stream=None, num_sms=60)
    monkeypatch.setattr(sharing, "_split_streams", lambda device, share: shares)
    monkeypatch.setattr(sharing, "CudaQueue", lambda device, stream: HostQueue(device))
    one = stage.rig("8b")
    before = one.graphs
    monkeypatch.setitem(one.__dict__, "graphs", object())
    (way, *_) = [way for way in sharing.SHARINGS if way.name.startswith("split")]
    runners = way.open(one)
    assert runners.detail == "decode on 60 multiprocessors, prefill on 72"
    streams, prompts = one.sequences(64, 8, 40), one.sequences(1, 24, 1, first_block=64 * 6)
    arriving = interference.Prompts(runners.prefill, prompts, 8)
    window = interference.play(interference.Decoding(runners.decode, streams), arriving, 4, 30)
    assert len(window.ttft_s) == 1 and len(window.gaps_s) >= 2
    rows = sharing.share_curve(CPU, 1 << 16, 2)
    assert [row["decode_sms"] for row in rows] == [60] * len(rows) and min(float(r["copy_tb_per_s"]) for r in rows) > 0
    monkeypatch.setitem(one.__dict__, "graphs", before)
    with pytest.raises(Skip, match="no graphs"):
        way.open(one)


def test_figures_of_a_window_are_its_gaps_and_its_prompts() -> None:
    window = interference.Window([0.01] * 98 + [0.02, 0.05], [0.2, 0.4], 1.0)
    figures = interference.figures_of(window, 8192)
    assert (figures["itl_p50_ms"], figures["itl_p99_ms"], figures["itl_max_ms"]) == (10.0, 20.0, 50.0)
    assert figures["prompt_tokens_per_s"] == pytest.approx(2 * 8192 / 0.6)
    assert figures["decode_tokens_per_s"] == pytest.approx(64 * 100 / 1.05)


# Profile, peer, server


def test_the_kernel_table_has_the_fifteen_that_take_most_time() -> None:
    @dataclass
    class Average:
        key: str
        count: int
        self_device_time_total: float

    rows = kernel_table([Average(f"k{i}", 8, 80.0 * i) for i in range(20)], 8, is_gpu=True)
    assert [row["kernel"] for row in rows] == [f"k{i}" for i in range(19, 4, -1)]
    assert rows[0]["us_per_step"] == 190.0 and rows[0]["calls_per_step"] == 1.0
    assert rows[0]["share"] == pytest.approx(19 / 190)


def test_the_peers_gaps_count_only_while_all_of_its_streams_run() -> None:
    early = [0.0, 1.0, 2.0, 3.0]
    late = [1.5, 2.5, 3.5, 9.0]
    found = transformers_peer.figures([early, late], -1.0, 0)
    assert (found["num_gaps"], found["itl_p50_ms"], found["first_tokens_s"]) == (2, 1000.0, 2.5)
    assert "error" in transformers_peer.figures([[0.0, 1.0], [5.0, 6.0]], 0.0, 0)


def peer_program(folder: Path, *lines: str, ending: str = "") -> str:
    """Write a program that answers as the peer does; return its path."""
    program = folder / "python"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + ending + "\n")
    program.chmod(0o755)
    return str(program)


def peer_outcome(stage: Stage, program: str) -> Outcome:
    """Run the peer's section with another program in its place."""
    run = runner()
    run.run([peer.section(stage, "8b", 1.0, program)], 10.0)
    return run.outcomes[0]


def test_the_peers_lines_become_rows_beside_their_floors(stage: Stage, tmp_path: Path) -> None:
    said = ['{"loaded": "5.0", "attention": "sdpa"}', '{"batch": 1, "itl_p50_ms": 20.0}', '{"batch": 8, "error": "x"}']
    figures: Any = peer_outcome(stage, peer_program(tmp_path, *said)).figures
    floor_s = shapes.step_bytes(stage.models["8b"].shape, 1, stage.scale.tokens(1024)) / stage.ceilings.copy_bytes_per_s
    assert figures["version"] == "5.0" and figures["rows"][0]["over_floor"] == pytest.approx(0.02 / floor_s)
    assert figures["rows"][1] == {"batch": 8, "error": "x"}


def test_a_peer_that_is_not_there_or_breaks_is_a_skip_with_its_words(stage: Stage, tmp_path: Path) -> None:
    missing = peer_outcome(stage, peer_program(tmp_path, '{"skip": "no such package"}'))
    assert (missing.status, missing.reason) == ("skipped", "no such package")
    broken = peer_outcome(stage, peer_program(tmp_path, ending="echo 'CUDA out of memory' >&2; exit 3"))
    assert broken.status == "skipped" and "CUDA out of memory" in broken.reason
    nowhere = peer_outcome(stage, str(tmp_path / "nowhere"))
    assert nowhere.status == "skipped" and "cannot be started" in nowhere.reason


def test_the_server_gets_a_config_it_can_read_and_a_tokenizer_with_a_word_for_every_id(tmp_path: Path) -> None:
    model = MODELS["1.7b"].tiny()
    serving.write_model(model, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    vocab = model.config.vocab_size
    assert tokenizer.get_vocab_size() == vocab
    words = [tokenizer.decode([token_id]) for token_id in range(256, vocab)]
    assert len(set(words)) == len(words) and words[0] == " w256"
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == model.config.num_layers


# The whole


def test_without_a_gpu_it_says_so_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_report_shows_every_target_even_where_nothing_was_measured() -> None:
    text = markdown([], {"gpu": "none"})
    assert text.count("| **64, 8k** | not asked for |") == 2
    for targets in TARGETS.values():
        for target in targets:
            assert f"{target.batch}, {target.context_tokens // 1024}k" in text


def test_a_lost_device_is_left_behind_for_a_new_process_with_the_rest_of_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Replaced(Exception):
        """The process would be another one now."""

    calls: list[list[str]] = []

    def breaks() -> Figures:
        raise RuntimeError("CUDA error")

    def replace_process(program: str, words: list[str]) -> None:
        calls.append(words)
        raise Replaced

    num_threads = torch.get_num_threads()
    monkeypatch.setattr(command, "_is_lost", lambda device: True)
    monkeypatch.setattr(command, "plan", lambda *_: [section("decode", 1.0, point("bad", breaks), point("left"))])
    monkeypatch.setattr(os, "execv", replace_process)
    asked = ["--rehearse", "--out", str(tmp_path), "--budget-s", "60"]
    with pytest.raises(Replaced):
        command.main(asked)
    torch.set_num_threads(num_threads)
    assert calls[0][:-2] == [sys.executable, "-m", "bench.gpu", *asked] and calls[0][-2] == "--resume"
    assert 0 < float(calls[0][-1].removeprefix("--budget-s=")) <= 60
    (kept,) = json.loads((tmp_path / command.JSON).read_text())["points"]
    assert (kept["name"], kept["status"]) == ("bad", "failed")


def points_of(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Read what a run wrote, by section, model and name of each point."""
    said = json.loads((folder / command.JSON).read_text())
    assert said["format"] == command.FORMAT and said["is_rehearsal"]
    return {(p["section"], p["model"], p["name"]): p for p in said["points"]}


@pytest.mark.slow
@pytest.mark.ucx
def test_a_rehearsal_gives_every_point_figures_or_a_reason_and_resumes(tmp_path: Path) -> None:
    num_threads = torch.get_num_threads()
    sections = [title for title in TITLES if title != "http"]
    asked = ["--rehearse", "--out", str(tmp_path), "--only", *sections]
    try:
        assert command.main(asked) == 0
        found = points_of(tmp_path)
        assert command.main([*asked, "--resume", "--models", "8b"]) == 0
    finally:
        torch.set_num_threads(num_threads)
    planned = [s for s in command.plan(tiny_stage(), list(MODELS), "") if s.name in sections]
    assert set(found) == {(s.name, s.model, p.name) for s in planned for p in s.points}
    skipped = {key: p["reason"] for key, p in found.items() if p["status"] == "skipped"}
    assert [key for key, p in found.items() if p["status"] == "failed"] == []
    assert all(reason for reason in skipped.values())
    # Graphs and multiprocessors are all that a CPU cannot rehearse; transformers may be there or not.
    assert {key[::2] for key in skipped if key[0] != "transformers"} == {
        ("decode", "recording"),
        ("interference", "split, prefill on 50%"),
        ("interference", "split, prefill on 75%"),
        ("interference", "bandwidth by multiprocessors"),
    }
    assert all(p["figures"] for p in found.values() if p["status"] == "measured")
    for name in MODELS:
        for target in TARGETS[name]:
            figures = found["decode", name, f"batch {target.batch}, context {target.context_tokens // 1024}k"][
                "figures"
            ]
            assert figures["num_steps"] == REHEARSAL.num_steps and figures["client_ms"] > 0 < figures["device_ms"]
    again = points_of(tmp_path)
    assert {k: p for k, p in again.items() if p["status"] == "measured"} == {
        k: p for k, p in found.items() if p["status"] == "measured"
    }
    text = (tmp_path / command.MARKDOWN).read_text()
    assert "rehearsal" in text and text.count("| **64, 8k** |") == 2
    assert all(f"## {TITLES[name]}" in text for name in sections)


@pytest.mark.slow
@pytest.mark.e2e
def test_the_http_section_measures_streams_of_a_server_of_its_own(stage: Stage) -> None:
    run = runner()
    run.run([serving.section(stage, "1.7b", 1.0)], 100.0)
    (outcome,) = run.outcomes
    assert outcome.status == "measured", outcome.reason
    figures: Any = outcome.figures
    assert 0 < figures["itl_p50_ms"] <= figures["itl_p99_ms"] and figures["num_gaps"] > 100
