"""The tables of a run, as Markdown: every target with its verdict, every point with its figures or its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.gpu.points import Figure, Outcome
from bench.gpu.shapes import (
    LEAST_ATTENTION_SHARE,
    LEAST_PREFILL_SHARE,
    MODELS,
    MOST_CLIENT_OVER_DEVICE,
    MOST_P99_OVER_MEDIAN,
    TARGETS,
    Target,
)

_MISSING: Final = "–"
_NOT_ASKED: Final = "not asked for"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _share(value: Any) -> str:
    return f"{value:.0%}"


def _ratio(value: Any) -> str:
    return f"{value:.2f}"


def _verdict(value: Any) -> str:
    return "pass" if value else "**miss**"


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and the figure that stands below it."""

    heading: str
    key: str
    show: Callable[[Any], str] = _plain


_COLUMNS: Final[Mapping[str, tuple[Column, ...]]] = {
    "ceilings": (
        Column("read TB/s", "read_tb_per_s"),
        Column("copy TB/s", "copy_tb_per_s"),
        Column("bf16 matmul TFLOP/s", "matmul_tflop_per_s"),
    ),
    "piecewise": (
        Column("full graph, client ms", "full_client_ms"),
        Column("with copies", "full_with_copies_client_ms"),
        Column("piecewise", "piecewise_client_ms"),
        Column("full / piecewise", "full_over_piecewise", _ratio),
        Column("with copies / piecewise", "full_with_copies_over_piecewise", _ratio),
        Column("pieces", "num_pieces"),
    ),
    "prefill": (
        Column("ms", "wall_ms"),
        Column("on the device", "device_ms"),
        Column("tokens/s", "tokens_per_s"),
        Column("share of matmul rate", "matmul_share", _share),
        Column(f"target {LEAST_PREFILL_SHARE:.0%}", "meets_target", _verdict),
    ),
    "kernels": (
        Column("us", "us"),
        Column("floor us", "floor_us"),
        Column("over floor", "over_floor", _ratio),
        Column("of copy bandwidth", "copy_share", _share),
        Column("of matmul rate", "matmul_share", _share),
        Column("torch us", "torch_us"),
    ),
    "handoff": (
        Column("ms", "total_ms"),
        Column("gather", "gather_ms"),
        Column("copy", "copy_ms"),
        Column("scatter", "scatter_ms"),
        Column("over three passes", "over_three_passes", _ratio),
        Column("1k ms", "ms_1k"),
        Column("8k ms", "ms_8k"),
        Column("8k GB/s", "gb_per_s_8k"),
        Column("slots in", "slots"),
    ),
    "interference": (
        Column("ITL p50 ms", "itl_p50_ms"),
        Column("p99", "itl_p99_ms"),
        Column("max", "itl_max_ms"),
        Column("output tokens/s", "decode_tokens_per_s"),
        Column("TTFT of 8k, ms", "ttft_p50_ms"),
        Column("prompt tokens/s", "prompt_tokens_per_s"),
        Column("how", "detail"),
    ),
    "http": (
        Column("ITL p50 ms", "itl_p50_ms"),
        Column("p99", "itl_p99_ms"),
        Column("over floor", "over_floor", _ratio),
        Column("TTFT ms", "ttft_p50_ms"),
        Column("ready after s", "ready_s"),
    ),
}
TITLES: Final = {
    "ceilings": "Ceilings",
    "decode": "Decode",
    "piecewise": "Piecewise against full graph",
    "prefill": "Prefill",
    "kernels": "Kernels",
    "handoff": "Hand-off",
    "interference": "Interference: 64 streams at 1k while 8k prompts arrive",
    "profile": "Where the step's time goes",
    "transformers": "transformers' continuous batching",
    "http": "Over HTTP, both roles in one process",
}
_DECODE_HEAD: Final = (
    *("batch, context", "floor ms", "device ms", "client ms", "device / floor", "client / floor", "gate", "stretch"),
    *("client / device", "p99 / median", "eager ms"),
)
_HOW_DECODE_IS_MEASURED: Final = (
    "Rows in bold are the targets that Baton states. Floor: weights without the embedding's rows, the projection to "
    "the vocabulary and all keys and values, over the copy's bandwidth. Contexts are as long as stated on average over "
    "the steps counted. Client: where the tokens of a step reach the decode worker's event loop; the message to the "
    "router, detokenising and HTTP are left out here and measured at one point below."
)


def markdown(outcomes: Sequence[Outcome], about: Mapping[str, Any]) -> str:
    """Return the whole report. The decode targets of both models stand in it whatever was measured."""
    lines = ["# GPU benchmark", ""]
    if about.get("is_rehearsal"):
        lines += ["**A rehearsal on tiny models: it shows that every part runs, and no figure means anything.**", ""]
    lines += [f"- {name}: {value}" for name, value in about.items() if name != "is_rehearsal" and value != ""]
    for section, title in TITLES.items():
        if section == "decode":
            for model in TARGETS:
                lines += ["", f"## {title}, {MODELS[model].title}", "", *_decode_table(outcomes, model)]
            lines += ["", *_other_targets(outcomes)]
            continue
        found = [outcome for outcome in outcomes if outcome.section == section]
        if found:
            lines += ["", f"## {title}", "", *_SHOWN.get(section, _points_table)(found)]
    return "\n".join([*lines, "", *_missing(outcomes)]) + "\n"


def _decode_table(outcomes: Sequence[Outcome], model: str) -> list[str]:
    rows = [_decode_row(outcomes, model, target) for target in TARGETS[model]]
    lines = [*_table(_DECODE_HEAD, rows), "", _HOW_DECODE_IS_MEASURED]
    if any(o.section == "decode" and o.model == model and o.figures.get("has_graph") is False for o in outcomes):
        lines += ["", "**Without CUDA graphs: the steps of this table were launched kernel by kernel.**"]
    return lines


def _decode_row(outcomes: Sequence[Outcome], model: str, target: Target) -> list[str]:
    name = f"{target.batch}, {target.context_tokens // 1024}k"
    keys = {"batch": target.batch, "context_tokens": target.context_tokens}
    found = next((o for o in outcomes if (o.section, o.model, o.keys) == ("decode", model, keys)), None)
    head = f"**{name}**" if target.is_published else name
    gates = [f"{target.gate:.2f}", f"{target.stretch:.2f}"]
    if found is None or found.status != "measured":
        reason = _NOT_ASKED if found is None else f"{found.status}: {found.reason}"
        return [head, reason, *[_MISSING] * 4, *gates, *[_MISSING] * 3]
    figures: Any = found.figures
    gates = [
        f"{gate} {_verdict(figures[key])}" for gate, key in zip(gates, ("meets_gate", "meets_stretch"), strict=True)
    ]
    times = [_plain(figures[key]) for key in ("floor_ms", "device_ms", "client_ms")]
    ratios = [_ratio(figures[key]) for key in ("device_over_floor", "client_over_floor")]
    even = f"{figures['client_over_device']:.3f} {_verdict(figures['meets_client_over_device'])}"
    steady = f"{_ratio(figures['p99_over_median'])} {_verdict(figures['meets_p99_over_median'])}"
    return [head, *times, *ratios, *gates, even, steady, _plain(figures["eager_ms"])]


def _other_targets(outcomes: Sequence[Outcome]) -> list[str]:
    def judged(section: str, key: str, *, name: str = "") -> str:
        found = [o.figures[key] for o in outcomes if o.section == section and name in o.name and key in o.figures]
        return f"{sum(map(bool, found))} of {len(found)} pass" if found else _MISSING

    rows = [
        [f"client ITL / device step <= {MOST_CLIENT_OVER_DEVICE}", judged("decode", "meets_client_over_device")],
        [f"ITL p99 / median <= {MOST_P99_OVER_MEDIAN}, no prefill", judged("decode", "meets_p99_over_median")],
        [
            f"decode attention >= {LEAST_ATTENTION_SHARE:.0%} of copy bandwidth, 32 x 4k",
            judged("kernels", "meets_target", name="32 x 4k"),
        ],
        [f"prefill >= {LEAST_PREFILL_SHARE:.0%} of the matmul rate, from 2k", judged("prefill", "meets_target")],
    ]
    return _table(("target", "points"), rows)


def _points_table(outcomes: Sequence[Outcome]) -> list[str]:
    columns = _COLUMNS[outcomes[0].section]
    shown = [column for column in columns if any(column.key in outcome.figures for outcome in outcomes)]
    rows = []
    for outcome in outcomes:
        head = f"{outcome.model}: {outcome.name}" if outcome.model else outcome.name
        cells = [_cell(column, outcome.figures.get(column.key)) for column in shown]
        if outcome.status != "measured":
            cells = [f"{outcome.status}: {outcome.reason}", *cells[1:]]
        rows.append([head, *cells])
    return _table(["", *([column.heading for column in shown] or ["why"])], rows)


def _interference_tables(outcomes: Sequence[Outcome]) -> list[str]:
    lines = _points_table([outcome for outcome in outcomes if "rows" not in outcome.figures])
    for outcome in outcomes:
        measured: Any = outcome.figures.get("rows", ())
        rows = [[str(r["decode_sms"]), str(r["prefill_sms"]), _plain(r["copy_tb_per_s"])] for r in measured]
        if rows:
            lines += ["", *_table(("decode's multiprocessors", "prefill's", "copy TB/s on decode's"), rows)]
    return lines


def _profile_tables(outcomes: Sequence[Outcome]) -> list[str]:
    lines: list[str] = []
    for outcome in outcomes:
        lines += [f"{outcome.model}, {outcome.name}:", ""]
        if outcome.status != "measured":
            lines += [f"{outcome.status}: {outcome.reason}", ""]
            continue
        kernels: Any = outcome.figures["kernels"]
        rows = [[f"`{k['kernel']}`", *(_plain(k[f]) for f in ("calls_per_step", "us_per_step"))] for k in kernels]
        rows = [[*row, _share(k["share"])] for row, k in zip(rows, kernels, strict=True)]
        lines += [*_table(("kernel", "calls a step", "us a step", "share"), rows), ""]
    return lines[:-1]


def _peer_table(outcomes: Sequence[Outcome]) -> list[str]:
    rows = []
    for outcome in outcomes:
        if outcome.status != "measured":
            rows.append([f"{outcome.model}: {outcome.name}", f"{outcome.status}: {outcome.reason}", _MISSING])
            continue
        measured: Any = outcome.figures["rows"]
        for row in measured:
            head = f"{outcome.model}: batch {row['batch']}, context 1k"
            over = _ratio(row["over_floor"]) if "over_floor" in row else _MISSING
            rows.append([head, _plain(row.get("itl_p50_ms", row.get("error"))), over])
    return _table(("", "ITL p50 ms", "over floor"), rows)


_SHOWN: Final[Mapping[str, Callable[[Sequence[Outcome]], list[str]]]] = {
    "interference": _interference_tables,
    "profile": _profile_tables,
    "transformers": _peer_table,
}


def _missing(outcomes: Sequence[Outcome]) -> list[str]:
    left = [outcome for outcome in outcomes if outcome.status != "measured"]
    lines = ["## Not measured", ""]
    if not left:
        return [*lines, "Nothing was left out."]
    return [*lines, *(f"- {o.section} {o.model} {o.name}: {o.status}, {o.reason}".replace("  ", " ") for o in left)]


def _cell(column: Column, value: Figure) -> str:
    return _MISSING if value is None else column.show(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
