"""A file of runs as one HTML page that needs nothing else: no network, no script, light and dark.

    RunFile ─► a section per workload ─► tiles, medians, ratios ─► distributions ─► timelines
                                      └► SLO, trust, parameters, failures, requests (folded)

Whatever a server or a user wrote reaches the page through `html_markup`, which escapes it. The page's own policy
forbids every load, should something slip through after all.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from bench.html_markup import Markup, element
from bench.html_sections import section
from bench.html_style import CSS
from bench.records import RunFile
from bench.spreads import Ledger, server_names

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(path: Path, file: RunFile) -> None:
    """Write runs as a self-contained HTML page; raises OSError where the file cannot be written."""
    path.write_text(_page(file), encoding="utf-8")


def _page(file: RunFile) -> str:
    workloads = list(dict.fromkeys(run.workload for run in file.runs))
    servers = server_names(file.runs)
    title = f"{', '.join(workloads)} on {', '.join(servers)}" if servers else "no runs"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"Baton bench: {title}"),
        element("style", Markup(CSS)),
    )
    ledger = Ledger()
    sections = [
        section(ledger, workload, [run for run in file.runs if run.workload == workload], servers, len(file.runs))
        for workload in workloads
    ]
    main = element("main", element("h1", f"Baton bench: {title}"), _facts(file), *sections)
    return "<!DOCTYPE html>\n" + element("html", head, element("body", main), lang="en") + "\n"


def _facts(file: RunFile) -> Markup:
    runs = file.runs
    if not runs:
        return element("p", "This file holds no runs.")
    started = sorted(run.started_at for run in runs)
    endpoints = dict.fromkeys(f"{run.server}: {run.model} at {_without_secrets(run.url)}" for run in runs)
    measured_s = sum(run.duration_s for run in runs)
    entries = {
        "when": started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}",
        "machine": file.machine,
        "servers": "\n".join(endpoints),
        "runs": f"{len(runs)}, {measured_s:.0f} s measured in all; warm-up is excluded",
    }
    pairs = (part for name, words in entries.items() for part in (element("dt", name), element("dd", words)))
    return element("dl", *pairs, class_="facts")


def _without_secrets(url: str) -> str:
    """Return scheme, host and path: a user's name, password and query stay out of a page that is passed around."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
