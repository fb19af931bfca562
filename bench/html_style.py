"""The report's style sheet. Colours come from the Okabe-Ito palette, darkened or lightened to stand out on the page.

Servers differ by colour, variants of one server by dash pattern, and every line is named in a legend, so that nobody
needs to tell two colours apart.
"""

from __future__ import annotations

from typing import Final

NUM_COLOURS: Final = 6
NUM_DASHES: Final = 4

CSS: Final = """
:root { color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1c2127; --quiet: #59636e; --edge: #d5d9de; --grid: #e9ecef;
  --good: #00694b; --bad: #a84300; --bound: #8a1f5c; --prefill: #8a93a026; --hover: #1c212712;
  --c0: #0072b2; --c1: #d55e00; --c2: #008f68; --c3: #b0408c; --c4: #8a6a00; --c5: #55606c; }
@media (prefers-color-scheme: dark) { :root {
  --page: #121519; --card: #1a1e24; --ink: #e7eaee; --quiet: #9ca6b2; --edge: #39414b; --grid: #272d35;
  --good: #43d3a3; --bad: #ff9f5c; --bound: #f08cc4; --prefill: #b4becb1f; --hover: #ffffff14;
  --c0: #56b4e9; --c1: #ff8f45; --c2: #2ccb9b; --c3: #e495c6; --c4: #e6c84b; --c5: #aab4bf; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; font-size: 15px; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 10px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 44px 0 12px; padding-top: 18px; border-top: 2px solid var(--edge); }
h3 { font-size: 16px; margin: 28px 0 8px; }
p { margin: 6px 0; max-width: 78ch; }
.quiet, .note { color: var(--quiet); }
.note { font-size: 13px; }
dl.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 18px; margin: 0;
  font-size: 14px; }
dl.facts dt { color: var(--quiet); }
dl.facts dd { margin: 0; white-space: pre-line; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr)); gap: 14px; }
.tile { background: var(--card); border: 1px solid var(--edge); border-left: 5px solid var(--c); border-radius: 8px;
  padding: 12px 16px 14px; }
.tile:only-child { max-width: 420px; }
.tile b { display: block; font-weight: 600; overflow-wrap: anywhere; }
.tile .big { font-size: 32px; line-height: 1.2; font-weight: 650; margin-top: 6px; font-variant-numeric: tabular-nums; }
.tile dl { display: grid; grid-template-columns: 1fr auto; gap: 2px 12px; margin: 8px 0 0; font-size: 14px; }
.tile dt { color: var(--quiet); }
.tile dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 14px 16px;
  min-width: 0; }
figure.wide { padding: 12px 14px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
svg.swatch { display: inline-block; width: 32px; flex: none; }
.legend { list-style: none; margin: 10px 0 0; padding: 0; font-size: 13.5px; display: grid; gap: 3px; }
.legend li { display: flex; flex-wrap: wrap; gap: 2px 9px; align-items: center; }
.legend span { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums;
  background: var(--card); }
th, td { padding: 6px 9px; text-align: right; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { font-weight: 600; color: var(--quiet); border-bottom: 1px solid var(--edge); vertical-align: bottom; }
th:first-child, td:first-child, td.words, th.words { text-align: left; }
td.words { overflow-wrap: break-word; min-width: 9ch; }
td:first-child.words { min-width: 20ch; }
.scroll + .scroll { margin-top: 14px; }
td small, th small { display: block; color: var(--quiet); font-size: 11.5px; font-weight: 400; white-space: nowrap; }
.compact td { padding: 3px 9px; }
.compact td small { display: inline-block; min-width: 9ch; margin-left: 7px; text-align: left; }
table.narrow { width: auto; min-width: 280px; }
.chip-text { display: inline-block; width: 11px; height: 11px; border-radius: 3px; background: var(--c);
  margin-right: 7px; }
.good { color: var(--good); } .bad { color: var(--bad); }
details { margin: 10px 0; background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 0 14px; }
details > .scroll, details > p { margin-bottom: 12px; }
summary { cursor: pointer; padding: 9px 0; font-weight: 600; }
details details { border-width: 1px 0 0; border-radius: 0; padding: 0; margin: 0; }
details details summary { font-weight: 400; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.curve { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; }
.d1 { stroke-dasharray: 7 4; } .d2 { stroke-dasharray: 2 3; } .d3 { stroke-dasharray: 11 3 2 3; }
.mark { fill: var(--card); stroke: var(--c); stroke-width: 2; }
.bars { fill: none; stroke: var(--c); stroke-width: 3.6; stroke-linecap: round; stroke-opacity: .8; }
.median { fill: none; stroke: var(--ink); stroke-width: 1.3; stroke-opacity: .75; }
.grid { stroke: var(--grid); } .edge { stroke: var(--quiet); }
.bound { stroke: var(--bound); stroke-width: 1.4; stroke-dasharray: 5 4; }
.prefill { fill: var(--prefill); pointer-events: none; }
.arrival { stroke: var(--quiet); stroke-width: 1.2; } .arrow { fill: var(--quiet); }
.hover { fill: transparent; } .hover:hover { fill: var(--hover); }
.chip { fill: var(--c); }
text { fill: var(--quiet); font-size: 12.5px; } text.name { fill: var(--ink); font-size: 14px; font-weight: 600; }
@media print { main { max-width: none; } details { break-inside: avoid; } }
"""
