"""The report's HTML: one page that loads nothing, in light and dark, from phone to desktop width.

Whatever comes from a file's name or content goes through `escape`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NOTHING = "–"  # in a cell
_MAX_ROWS = 2000  # of one table
_LONG = 40  # characters of a cell that may be broken into lines


@dataclass(frozen=True)
class Section:
    anchor: str
    heading: str
    body: str  # HTML


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """`lead` is HTML that stands above the links to the sections."""
    links = "".join(f'<a href="#{part.anchor}">{escape(part.heading)}</a>' for part in sections)
    bodies = "\n".join(
        f'<section id="{part.anchor}"><h2>{escape(part.heading)}</h2>{part.body}</section>'
        for part in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{lead}<nav>{links}</nav>\n{bodies}\n</body></html>\n"
    )


def escape(text: str) -> str:
    """Text as HTML; what cannot be printed (controls, reversed writing) as its number."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return html.escape(text)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Cells are text, or integers; a column of integers is set flush right."""
    numeric = [
        bool(rows) and all(isinstance(row[i], int) or row[i] == NOTHING for row in rows)
        for i in range(len(heads))
    ]

    def cell(value: Any, number: bool) -> str:
        text = f"{value:,}" if isinstance(value, int) else str(value)
        kind = " class=n" if number else " class=long" if len(text) > _LONG else ""
        return f"<td{kind}>{escape(text)}</td>"

    names = "".join(
        f"<th{' class=n' if number else ''}>{escape(name)}</th>"
        for name, number in zip(heads, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(cell, row, numeric))}</tr>" for row in rows[:_MAX_ROWS])
    more = f"<p class=note>{len(rows) - _MAX_ROWS:,} more rows are not shown.</p>"
    return (
        f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>'
        f"</div>{more if len(rows) > _MAX_ROWS else ''}"
    )


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, escaped."""
    items = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>" for a, b in rows)
    return f'<dl class="facts">{items}</dl>'


def figures(rows: Sequence[tuple[str, str]]) -> str:
    """The few numbers to see first: (number, what it counts)."""
    cards = "".join(f"<div><b>{escape(n)}</b><span>{escape(of)}</span></div>" for n, of in rows)
    return f'<div class="figures">{cards}</div>'


def folded(summary: str, body: str, is_open: bool = False) -> str:
    state = " open" if is_open else ""
    return f"<details{state}><summary>{escape(summary)}</summary>{body}</details>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def in_bytes(number: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} bytes"


def share(part: int, whole: int) -> str:
    if not whole:
        return NOTHING
    percent = 100 * part / whole
    return f"{percent:.0f}%" if percent >= 10 else f"{percent:.2g}%"


_STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --ink: #1d1f23; --soft: #63676f;
  --line: #dcdcd8; --card: #f2f2ef; --a: #3465a4; --b: #b4562a; --c: #3f8a5d; --d: #8a5aa8;
  --e: #a08a1e; --bad: #b3382c; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181b; --ink: #e4e5e7; --soft: #9a9ea6;
  --line: #33373d; --card: #1f2226; --a: #7fa8dd; --b: #e0936b; --c: #7cc498; --d: #c29ade;
  --e: #d3bf5c; --bad: #ec8577; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  background: var(--ground); color: var(--ink); margin: 0 auto; max-width: 68rem;
  padding: 1.5rem clamp(.9rem, 3vw, 2rem) 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; font-weight: 600; margin: .5rem 0 .3rem; }
h2 { font-size: 1.2rem; font-weight: 600; margin: 3rem 0 .8rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; font-weight: 600; margin: 1.4rem 0 .3rem; }
p { margin: .3rem 0 .8rem; max-width: 46rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: 1.4rem; }
nav a { color: var(--a); text-decoration: none; } nav a:hover { text-decoration: underline; }
code, pre { font: .86em/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre { background: var(--card); padding: .7rem .9rem; border-radius: 6px; overflow-x: auto;
  margin: .5rem 0; }
.note, figcaption, .soft { color: var(--soft); } .note { font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .3rem 0 .8rem; }
th { text-align: left; font-weight: 600; font-size: .85rem; color: var(--soft); }
td, th { padding: .25rem 1.4rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td { font-variant-numeric: tabular-nums; } td.n, th.n { text-align: right; }
td, th { white-space: nowrap; } td.long { white-space: normal; min-width: 16rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr));
  gap: .7rem; margin: 1.2rem 0; }
.figures div { background: var(--card); border-radius: 8px; padding: .7rem .9rem; }
.figures b { display: block; font-size: 1.35rem; font-weight: 600; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: .88rem; }
.facts { margin: 0; } .facts div { display: flex; gap: 0 1rem; flex-wrap: wrap;
  border-bottom: 1px solid var(--line); padding: .25rem 0; }
.facts dt { color: var(--soft); flex: 0 0 11rem; } .facts dd { margin: 0; flex: 1 1 16rem;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
details { margin: .6rem 0; } summary { cursor: pointer; padding: .2rem 0; }
.sheet { display: flex; flex-wrap: wrap; gap: 1rem 1.2rem; margin: .6rem 0;
  align-items: flex-end; }
.sheet > figure { margin: 0; max-width: 100%; min-width: 6.6rem; }
.sheet figcaption { width: 0; min-width: 100%; font-size: .82rem; line-height: 1.3;
  margin-bottom: .25rem; overflow: hidden; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 2; line-clamp: 2; }
.sheet figcaption b { color: var(--ink); font-weight: 600; }
.thumbs { display: flex; flex-wrap: wrap; gap: 4px; }
.thumbs img, .blank { width: 80px; height: 80px; border-radius: 4px; background: var(--card);
  display: block; }
.blank { font-size: .7rem; color: var(--soft); padding: .3rem; overflow: hidden; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr));
  gap: 1rem; }
.cards > figure { margin: 0; background: var(--card); border-radius: 8px; padding: .8rem;
  font-size: .88rem; min-width: 0; }
.cards img { max-width: 100%; max-height: 160px; border-radius: 4px; display: block;
  margin-bottom: .5rem; }
.cards pre { background: none; padding: 0; margin: 0 0 .5rem; font-size: .72rem; }
.cards p { margin: .25rem 0; overflow-wrap: anywhere; }
.reason { color: var(--bad); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: 1.2rem 2.4rem; align-items: end; }
.chart { margin: 1rem 0 0; padding-bottom: .5rem; min-width: 0; }
.chart figcaption { font-size: .88rem; margin-bottom: .4rem; }
.plot { position: relative; margin: 0 1.6rem 1.5rem 3.4rem; border-left: 1px solid var(--line);
  border-bottom: 1px solid var(--line); }
.plot svg { display: block; width: 100%; height: 9rem; overflow: visible; }
.plot.square { max-width: 24rem; } .plot.square svg { height: auto; aspect-ratio: 1; }
.plot span { position: absolute; font-size: .75rem; line-height: 1; color: var(--soft);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.plot .x { top: 100%; transform: translate(-50%, .35rem); }
.plot .start { transform: translate(0, .35rem); }
.plot .end { transform: translate(-100%, .35rem); }
.names { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; max-width: none; }
.plot .y { right: 100%; transform: translate(-.35rem, 50%); }
.plot path, .plot polyline, .plot line { vector-effect: non-scaling-stroke; }
.bar { fill: var(--a); }
.line0 { stroke: var(--a); color: var(--a); } .line1 { stroke: var(--b); color: var(--b); }
.line2 { stroke: var(--c); color: var(--c); } .line3 { stroke: var(--d); color: var(--d); }
.line4 { stroke: var(--e); color: var(--e); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.mark { stroke: var(--bad); stroke-width: 1.2; stroke-dasharray: 4 4; }
.gap { fill: var(--soft); opacity: .18; }
.bars { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr max-content;
  gap: .2rem .8rem; align-items: center; font-size: .9rem; max-width: 46rem; }
.bars span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; max-width: 18rem; }
.bars svg { width: 100%; height: .8rem; display: block; }
.bars b { font-weight: 400; text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 34rem) {
  .bars { grid-template-columns: minmax(4rem, max-content) 1fr max-content; }
  .bars span { max-width: 9rem; }
  .facts dt { flex-basis: 100%; } td.long { min-width: 12rem; } td, th { padding-right: .9rem; }
  .plot { margin-left: 2.6rem; margin-right: .9rem; } .thumbs img, .blank { width: 72px;
  height: 72px; } }
"""
