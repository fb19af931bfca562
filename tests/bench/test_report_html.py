"""The HTML report: well formed, self-contained, small, and deaf to what servers say."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.html import write_report
from bench.html_axes import LinearScale, LogScale, TailScale
from bench.html_markup import Markup, element, text
from bench.html_requests import shown_records
from bench.records import Record, Run, RunFile, Slo, load, save
from tests.bench.scenes import closed, interference, interference_in_turns, record, run, stream, two_servers

VOID = {"meta", "br"}
LOADING_ATTRIBUTES = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background", "ping"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;\x00\u202e"


class Page(HTMLParser):
    """A parsed page: raises on a tag that closes what is not open."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag}: an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        (self.styles if self.open and self.open[-1] == "style" else self.words).append(data)

    @property
    def text(self) -> str:
        """All words that a reader sees, hover titles included."""
        return " ".join(self.words)

    def with_class(self, class_: str) -> int:
        """Count the elements of a class."""
        return sum(name == "class" and class_ in value.split() for _, name, value in self.attributes)


def page_of(tmp_path: Path, runs: list[Run], machine: str = "2 cores") -> Page:
    """Write a report, and return it parsed."""
    path = tmp_path / "report.html"
    write_report(path, RunFile(tuple(runs), machine))
    return Page(path.read_text(encoding="utf-8"))


def assert_loads_nothing(page: Page) -> None:
    """Fail if anything on the page could make a browser fetch or run something."""
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in LOADING_ATTRIBUTES or a[1].startswith("on")]
    assert not [a for a in page.attributes if "://" in a[2] or "url(" in a[2]]
    assert not re.search(r"url\(|@import|://", "".join(page.styles))
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_interference_has_every_part_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(tmp_path, two_servers(interference_in_turns), "Zen 3\n2 cores")
    assert_loads_nothing(page)
    for words in ("interference", "baton", "llama-server Q4_0", "2026-03-05", "2 cores", "http://127.0.0.1:8000"):
        assert words in page.text
    # Two servers: a TTFT line each (long prompts), an ITL line for each of two phases, and two marks on each line.
    assert page.with_class("mark") == 2 * (2 + 4)
    assert sum(tag == "figcaption" for tag in page.tags) == 2
    # One timeline for each server and phase; the arrivals of five prompts stand in the two that have them.
    assert page.with_class("name") == 4
    assert page.with_class("arrival") == page.with_class("prefill") == 2 * 5
    assert page.text.count("prompt of 8 tokens sent at 10.00 s") == 2
    assert "×67" in page.text and "worse" in page.text and "num_streams" in page.text
    assert "p99 of its own gaps ≤ 100 ms" in page.text and "No request failed." in page.text


def test_light_and_dark_are_both_styled(tmp_path: Path) -> None:
    style = "".join(page_of(tmp_path, [closed("baton", 1, 4, gap_s=0.01, num_gaps=3)]).styles)
    light, dark = style.split("prefers-color-scheme: dark", 1)
    names = set(re.findall(r"(--[a-z0-9]+):", light))
    assert names - {"--c"} == set(re.findall(r"(--[a-z0-9]+):", dark.split("} }")[0])) and "--c5" in names
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", style)) <= names | {"--c"}


def test_what_a_server_or_user_wrote_stays_words(tmp_path: Path) -> None:
    bad = msgspec.structs.replace(record([1.0, 1.1], kind=HOSTILE, request_id=HOSTILE, finished_s=1.2))
    failed = record(error=HOSTILE, request_id="failed")
    whole = run([bad, failed], server=HOSTILE, workload=HOSTILE, parameters={HOSTILE: HOSTILE}, slo=Slo(ttft_s=0.1))
    whole = msgspec.structs.replace(whole, model=HOSTILE, url=f"http://u:secret@host/{HOSTILE}", started_at=HOSTILE)
    other = msgspec.structs.replace(whole, server=f"{HOSTILE} 2")
    page = page_of(tmp_path, [whole, other], HOSTILE)
    assert_loads_nothing(page)
    assert "<script>alert(1)</script>" in page.text
    assert "\x00" not in page.text and "\u202e" not in page.text
    assert "secret" not in page.text and "http://host/" in page.text


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_escaped_words_come_back_as_they_were(words: str) -> None:
    page = Page(element("p", words, title=words))
    shown = Page(f"<p>{text(words)}</p>").text
    assert page.text == shown
    visible = "".join(c for c in words if c.isprintable())
    assert "".join(c for c in shown if c.isprintable() and c != "\ufffd") == visible.replace("\ufffd", "")
    assert page.tags == ["p"]


def test_only_markup_goes_in_unescaped_and_long_words_are_cut() -> None:
    assert element("b", "<i>", Markup("<i>x</i>"), class_=None, stroke_width=1.5) == (
        '<b stroke-width="1.5">&lt;i&gt;<i>x</i></b>'
    )
    assert text("<" * 9, max_chars=4) == "&lt;&lt;&lt;…"


def test_five_thousand_requests_stay_small_and_keep_the_extremes(tmp_path: Path) -> None:
    whole = closed("baton", 1, 5000, gap_s=0.02, num_gaps=20, num_failed=3)
    stall = stream(30.0, 0.1, [0.02, 7.5], kind="request", request_id="the stall")
    slow = stream(20.0, 9.0, [0.02], kind="request", request_id="the slow start")
    whole = msgspec.structs.replace(whole, records=(*whole.records, stall, slow))
    path = tmp_path / "report.html"
    write_report(path, RunFile((whole,), "m"))
    assert path.stat().st_size < 1_000_000
    page = Page(path.read_text())
    assert "the stall" in page.text and "the slow start" in page.text
    assert "longest gap 7.50 s" in page.text
    assert "5,002 requests, 1,800 of them listed" in page.text
    assert "req-04999" in page.text and page.text.count("HTTP 429") >= 3


def test_many_runs_share_the_room_for_requests(tmp_path: Path) -> None:
    runs = two_servers(lambda server, seed: [closed(server, seed, 200, gap_s=0.02, num_gaps=3)], range(10))
    page_of(tmp_path, runs)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_a_failure_is_listed_once_with_its_count(tmp_path: Path) -> None:
    page = page_of(tmp_path, [closed("baton", 1, 30, gap_s=0.01, num_gaps=3, num_failed=7)])
    words = re.sub(r"\s+", " ", page.text)
    assert "HTTP 429: <b>overloaded</b> baton request 7" in words


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [run([])],
        [run([record(error="refused")], slo=Slo(ttft_s=1.0))],
        [run([record([1.0])]), run([record([2.0])], server="b")],
        [run([record([1.0, 1.0, 1.0])], duration_s=0.0)],
        [run([record([1.0, 1.0 + 1e-9, 1.4], kind="of its own")], workload="made up", parameters={})],
        [interference("a", 1, arrivals=True, stall_s=1.0, gap_s=0.5)],
        [run([record([1.0, 1.2], kind="steady"), record(kind="arrival", error="x")], workload="interference")],
    ],
    ids=["none", "empty", "failed", "one chunk", "no gap", "own kind", "no baseline", "failed arrival"],
)
def test_runs_with_parts_missing_still_make_a_page(tmp_path: Path, runs: list[Run]) -> None:
    page = page_of(tmp_path, runs)
    assert_loads_nothing(page)
    assert "nan" not in "".join(value for _, _, value in page.attributes).lower()


def test_a_saved_file_makes_the_same_page(tmp_path: Path) -> None:
    file = RunFile((closed("baton", 1, 12, gap_s=0.01, num_gaps=4),), "m")
    save(tmp_path / "runs.json", file)
    write_report(tmp_path / "a.html", file)
    write_report(tmp_path / "b.html", load(tmp_path / "runs.json"))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def _records(failed: list[int], total: int) -> list[Record]:
    return [
        record([n + 1.0, n + 1.5], started_s=float(n), request_id=str(n), error="x" if n in failed else None)
        for n in range(total)
    ]


def test_listed_requests_keep_failures_and_order() -> None:
    records = _records([3, 50, 399], 400)
    listed = shown_records(records[::-1], 40)
    assert len(listed) == 40 and listed == sorted(listed, key=lambda r: r.started_s)
    assert {r.request_id for r in listed if r.error} == {"3", "50", "399"}
    assert shown_records(records, 400) == records


def test_failures_beyond_half_of_the_room_leave_the_rest_to_others() -> None:
    listed = shown_records(_records(list(range(300)), 400), 40)
    assert (
        len(listed) == 40 and sum(r.error is not None for r in listed) >= 20 > sum(r.error is None for r in listed) > 4
    )


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-4, 1e6), st.floats(1, 1e6), st.integers(3, 9))
def test_ticks_of_a_log_scale_lie_on_it_and_are_few(least: float, factor: float, max_ticks: int) -> None:
    scale = LogScale.around(least, least * factor, 0, 100)
    ticks = scale.ticks(max_ticks)
    assert len(ticks) <= max_ticks and ticks == sorted(ticks)
    assert ticks or factor < 1.5
    assert all(scale.low_ms <= t <= scale.high_ms and 0 <= scale.at(t) <= 100 for t in ticks)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 1e6))
def test_ticks_of_a_linear_scale_start_at_zero_and_do_not_run_over(high: float) -> None:
    ticks = LinearScale(high, 0, 100).ticks(12)
    assert ticks[0] == 0 and 4 <= len(ticks) <= 13 and ticks[-1] <= high * (1 + 1e-9)


def test_each_further_nine_has_the_same_height() -> None:
    scale = TailScale(4, 0, 400)
    at = [scale.at(share) for share in (0, 0.9, 0.99, 0.999, 1)]
    assert at == pytest.approx([0, 100, 200, 300, 400], abs=20) and at == sorted(at)
