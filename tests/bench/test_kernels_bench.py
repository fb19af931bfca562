"""The kernel benchmark: floors and work by hand, inputs held against the reference kernels, runs of a tiny shape."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.kernels import ceilings, shape
from bench.kernels.__main__ import REPORT_COLUMNS, main
from bench.kernels.batches import QUICK, Menu, Pools
from bench.kernels.ceilings import Ceilings, CoreProbe, cache_sizes
from bench.kernels.native import NativeCases, random_step
from bench.kernels.plain import PlainCases, Setting
from bench.kernels.report import amount_text, time_text
from bench.kernels.shape import Load, Shape, Work
from bench.kernels.timing import Bench, Call, Case, Plan, Sample
from kernels import reference
from kernels.cpu.packed import FloatRows, pack
from tests.kernels.native_cases import kernels_for

TINY = Shape(
    hidden=64, intermediate=96, num_heads=4, num_kv_heads=2, head_dim=16, num_layers=2, vocab=160, activation_bytes=4
)
TINY_OPTIONS = "--hidden 64 --intermediate 96 --layers 2 --heads 4 --kv-heads 2 --head-dim 16 --vocab 160".split()
SIZES = ceilings.CacheSizes(second=64 << 10, last=1 << 20)
COLD = 1 << 20
PEAKS = Ceilings(10.0, 50.0, 100.0, 200.0, 400.0, {"read_4k_1": 10.0})


def nothing(_: str) -> None:
    """Take a line of progress."""


# Floors and work


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [
        (Work(num_bytes=1e9, float_operations=1e9), 0.1, "memory"),
        (Work(num_bytes=1e6, float_operations=1e9), 0.01, "float"),
        (Work(num_bytes=1e6, int8_operations=1e9), 0.005, "int8"),
        (Work(num_bytes=1e6, int4_operations=1e9), 0.0025, "int4"),
        (Work(cached_bytes=1e9, float_operations=1e8), 0.02, "cache"),
        # Operations of all kinds share the core; the most expensive kind gives the name.
        (Work(float_operations=1e8, int8_operations=1e9, int4_operations=4e8), 0.007, "int8"),
    ],
)
def test_a_floor_is_the_larger_of_bytes_and_operations(work: Work, seconds: float, bound: str) -> None:
    floor = PEAKS.floor(work)
    assert floor.seconds == pytest.approx(seconds)
    assert floor.bound == bound


def test_without_peaks_the_floor_is_that_of_memory() -> None:
    floor = Ceilings(10.0, None, None, None, None, {}).floor(Work(1e9, 2e9, int8_operations=1e15))
    assert floor.seconds == pytest.approx(0.2)


def test_median_ceilings_leave_out_what_was_not_measured() -> None:
    rounds = [Ceilings(speed, None, speed * 10, None, None, {"a": speed}) for speed in (3.0, 9.0, 4.0)]
    assert ceilings.median_of(rounds) == Ceilings(4.0, None, 40.0, None, None, {"a": 4.0})


def test_work_of_products() -> None:
    work = shape.linear_work(TINY, ((96, 64), (32, 64)), 3, "q4_1")
    assert work.num_bytes == 128 * 64 * 5 / 8
    assert work.int4_operations == work.num_operations == 2 * 3 * 128 * 64
    assert work.cached_bytes == 4 * 3 * (96 + 64 + 32 + 64)


def test_work_of_attention() -> None:
    # Four queries at the end of ten positions see 7, 8, 9 and 10 of them.
    work = shape.attention_work(TINY, Load(2, 10, 4), 2)
    assert Load(2, 10, 4).num_pairs == 2 * (7 + 8 + 9 + 10)
    assert work.num_bytes == 2 * 10 * 2 * 2 * 16 * 2
    assert work.float_operations == 4 * 2 * 34 * 4 * 16


def test_work_of_a_step_leaves_out_rows_that_nobody_asks_for() -> None:
    qkv, rest, head = 128 * 64, 64 * 64 + 192 * 64 + 64 * 96, 160 * 64
    work = shape.step_work(TINY, Load(2, 8, 8), "q4_0", "q8_0", 4)
    assert work.int4_operations == 2 * (2 * 16 * qkv + 16 * rest + 2 * rest)
    assert work.int8_operations == 2 * 2 * head
    kv_bytes = 2 * 2 * 8 * 2 * 16 * 4
    assert work.num_bytes == pytest.approx(2 * (qkv + rest) * 4.5 / 8 + head * 8.5 / 8 + 2 * kv_bytes)
    # Decode: every row is asked for.
    assert shape.step_work(TINY, Load(2, 8), "f32", "f32", 4).float_operations == pytest.approx(
        2 * 2 * (2 * (qkv + rest) + head) + 2 * 4 * 2 * 8 * 4 * 16
    )


# Ceilings


def test_the_probe_measures_every_ceiling_where_there_is_a_compiler() -> None:
    probe = CoreProbe(8 << 20, 64 << 10)
    try:
        if "compiled" not in probe.how:
            pytest.skip(probe.how)
        found = probe.measure()
    finally:
        probe.close()
    assert {f"read_{pages}_{n}" for pages in ("4k", "huge") for n in (1, 2, 4)} == set(found.details)
    assert found.memory_gb_s == max(found.details.values()) > 0.5
    assert found.float_gop_s is not None and found.float_gop_s > 1
    assert found.cache_gb_s is not None and found.cache_gb_s > 1


def test_without_a_compiler_only_reads_are_measured_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings.shutil, "which", lambda _: None)  # type: ignore[attr-defined]
    probe = CoreProbe(8 << 20, 64 << 10)
    found = probe.measure()
    probe.close()
    assert "no compiler" in probe.how
    assert found.memory_gb_s > 0.1
    assert (found.float_gop_s, found.int8_gop_s, found.int4_gop_s) == (None, None, None)


def test_cache_sizes_are_those_that_linux_tells(tmp_path: Path) -> None:
    folder = tmp_path / "sys/devices/system/cpu/cpu3/cache"
    for index, (level, kind, size) in enumerate(
        [(1, "Data", "32K"), (2, "Instruction", "7K"), (2, "Unified", "2M"), (3, "Unified", "48M")]
    ):
        (folder / f"index{index}").mkdir(parents=True)
        for name, value in (("level", str(level)), ("type", kind), ("size", size)):
            (folder / f"index{index}" / name).write_text(value + "\n")
    sizes = cache_sizes(3, tmp_path)
    assert (sizes.second, sizes.last) == (2 << 20, 48 << 20)
    assert sizes.large_bytes >= 3 * sizes.last and sizes.cold_bytes > sizes.last
    assert cache_sizes(4, tmp_path) == ceilings.CacheSizes()


# Timing


class Clock:
    """A stopwatch whose samples are foretold; the wall moves by a second a sample."""

    def __init__(self, busy: Iterable[float]) -> None:
        self._busy = iter(busy)

    def sample(self, call: Call, count: int) -> Sample:
        """Call once and return the next time."""
        call()
        return Sample(next(self._busy), 1.0)


def test_each_time_is_held_against_the_floor_and_the_torch_time_of_its_own_round() -> None:
    rounds = iter([Ceilings(speed, None, None, None, None, {}) for speed in (10.0, 5.0, 10.0)])
    case = Case("g", "n", Work(num_bytes=1e9), lambda: lambda: None, "plain")
    plain = Case("g", "plain", Work(), lambda: lambda: None)
    # Warm-up of both, then case and plain in turns: the machine is half as fast in the second round.
    clock = Clock([1.0, 1.0, 0.2, 0.6, 0.4, 1.2, 0.3, 0.6])
    (timing,), found = Bench([case], {"plain": plain}, clock, Plan(3, 1e9, 0.0), nothing).run(lambda: next(rounds))
    assert len(found) == timing.busy_s.n == 3
    assert timing.over_floor.low == timing.over_floor.median == pytest.approx(2.0)
    assert timing.plain_over is not None and timing.plain_over.median == pytest.approx(3.0)
    assert timing.busy_s.median == pytest.approx(0.3)


def test_no_round_begins_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bench.kernels.timing.time.perf_counter", lambda: now[0])

    def slow() -> None:
        now[0] += 10.0

    case = Case("g", "n", Work(num_bytes=1e9), lambda: slow)
    # 10 s of warm-up and 10 s a round: after three rounds 40 s are gone and a fourth would end at 50.
    timings, _ = Bench([case], {}, Clock([1.0] * 20), Plan(9, 45.0, 0.0), nothing).run(lambda: PEAKS)
    assert timings[0].busy_s.n == 3


# Cases


def native_cases(menu: Menu) -> NativeCases:
    """Build the native cases of the tiny shape."""
    return NativeCases(kernels_for(), TINY, menu, SIZES, Pools(TINY, menu, "cpu", COLD))


def plain_cases(menu: Menu, dtype: torch.dtype = torch.float32) -> PlainCases:
    """Build the torch cases of the tiny shape."""
    weight_format = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    return PlainCases(
        TINY, menu, Setting("cpu", dtype, weight_format, COLD, 32 << 10, 8), Pools(TINY, menu, "cpu", COLD)
    )


@pytest.mark.parametrize("menu", [Menu(), Menu(each_matrix=True), QUICK])
def test_every_native_case_has_a_title_of_its_own_and_a_torch_case_beside_it(menu: Menu) -> None:
    native = list(native_cases(menu).all())
    plain = [case.name for case in plain_cases(menu).all()]
    assert len({case.title for case in native}) == len(native)
    assert len(set(plain)) == len(plain)
    assert {case.plain for case in native} == set(plain)


@pytest.mark.parametrize("load", [Load(3, 40), Load(2, 48, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_is_asked_what_the_reference_is_asked(load: Load, dtype: torch.dtype) -> None:
    menu = Menu(decodes=(load,), prefills=())
    calls = native_cases(menu).attention_calls(load, dtype)
    assert len(calls) > 1
    for call in calls[:3]:
        call()
        q, out, starts, lengths, tables, kv_layer = call.kept
        wanted = reference.paged_prefill_attention(q, kv_layer, tables, starts, lengths, TINY.head_dim**-0.5)
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
    places = [set(call.kept[4].flatten().tolist()) for call in calls[::4]]
    assert not places[0] & places[1], "calls after each other must read other memory"


def test_products_are_those_of_all_matrices() -> None:
    cases = native_cases(Menu())
    values = torch.randn(48, 64)
    matrix = pack(kernels_for().library, [FloatRows(values.numpy())], "f32")
    (sequence,) = cases.product_calls([[matrix]], 5)
    sequence()
    _, x, out = sequence.calls[0].kept
    torch.testing.assert_close(out, x @ values.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_cases_run_in_the_dtypes_of_cpu_and_gpu(dtype: torch.dtype) -> None:
    menu = Menu(
        *((2,), (1,), ("f32",), (dtype,), (Load(2, 32),), (Load(1, 32, 8),), (Load(2, 32), Load(1, 16, 16))),
        each_matrix=True,
    )
    with torch.inference_mode():
        results = {case.title: case.start()() for case in plain_cases(menu, dtype).all()}
    logits = results["step: decode 2 x 32"]
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, TINY.vocab) and bool(logits.isfinite().all())


def test_layers_of_a_random_step_do_not_share_memory() -> None:
    step = random_step(kernels_for(), TINY, "q4_1")
    matrices = step._model.matrices()
    assert len({m.data.ctypes.data for m in matrices}) == len(matrices) == 4 * TINY.num_layers + 1


# The command


@pytest.mark.slow
def test_a_quick_run_gives_sane_ratios_in_a_table_and_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels_for()
    path = tmp_path / "kernels.json"
    assert main([*TINY_OPTIONS, "--quick", "--rounds", "2", "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    timings = found["cpu"]["timings"]
    assert found["shape"]["hidden"] == 64 and len(found["cpu"]["ceilings"]["rounds"]) == 2
    assert {t["group"] for t in timings} == {"linear", "attention", "rows", "step"}
    for t in timings:
        for value in (t["busy_s"]["median"], t["wall_s"]["median"], t["floor_s"], t["plain_over"]["median"]):
            assert math.isfinite(value) and value > 0, t["name"]
        # Nothing beats its floor by far; tiny calls lie far above it.
        assert 0.3 < t["over_floor"]["median"] < math.inf, t["name"]
    printed = capsys.readouterr().out
    assert "GB/s" in printed and "x floor" in printed and "store_kv" in printed
    assert max(map(len, printed.splitlines())) <= REPORT_COLUMNS


def test_only_what_matches_is_measured(tmp_path: Path) -> None:
    kernels_for()
    path = tmp_path / "kernels.json"
    only = ["--quick", "--rounds", "1", "--only", "rows: (rope|silu)", "--json", str(path)]
    assert main([*TINY_OPTIONS, *only]) == 0
    names = [t["name"].split(",")[0] for t in json.loads(path.read_text())["cpu"]["timings"]]
    assert names == ["silu_mul", "rope"]


def test_a_pattern_that_nothing_matches_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    kernels_for()
    assert main([*TINY_OPTIONS, "--only", "no such kernel"]) == 2
    assert "no case matches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", "50"], "multiples of 32"),
        (["--head-dim", "24"], "multiple of 16"),
        (["--heads", "5"], "multiple of --kv-heads"),
        (["--layers", "0"], "positive"),
        (["--core", "100000"], "this process may use"),
        (["--only", "("], "--only"),
        (["--rounds", "0"], "at least one"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*TINY_OPTIONS, *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_figures_are_shown_with_three_digits() -> None:
    assert [time_text(s) for s in (4.1e-7, 3.14159e-5, 9.99e-4, 0.01234, 1.5)] == [
        *("0.41 us", "31.4 us", "999 us", "12.3 ms", "1500 ms"),
    ]
    assert [amount_text(n) for n in (0, 12, 999.9, 7.08e6, 5.51e10)] == ["0", "12.0", "1.00k", "7.08M", "55.1G"]
