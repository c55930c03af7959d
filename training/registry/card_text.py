"""The sections of a model card as markdown and as HTML; both escape all text that they are given.

Nothing here knows what a section says.
"""

import base64
import html as entities
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Row = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """heads: empty for a table whose first column names the second; pictures: (name, caption),
    where the name is that of a PNG file without its ending; code: Python."""

    heading: str
    text: str = ""
    heads: Row = ()
    rows: tuple[Row, ...] = ()
    lines: tuple[str, ...] = ()
    pictures: tuple[tuple[str, str], ...] = ()
    code: str = ""


def markdown(title: str, sections: Sequence[Section], folder: str | None) -> str:
    """folder: where the pictures lie, relative to the text; None leaves them out."""
    parts = [f"# {_marked(title)}"]
    for section in sections:
        if folder is None and section == Section(section.heading, pictures=section.pictures):
            continue
        parts.append(f"## {_marked(section.heading)}")
        if section.text:
            parts.append(_marked(section.text))
        if section.rows:
            heads = section.heads or ("",) * len(section.rows[0])
            lines = [heads, ("---",) * len(heads)]
            lines += [tuple(map(_marked, row)) for row in section.rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        if section.lines:
            parts.append("\n".join(f"- {_marked(line)}" for line in section.lines))
        if section.code:
            parts.append(f"```python\n{section.code}\n```")
        if folder is not None:
            parts += [
                f"![{_marked(words)}]({folder}/{name}.png)" for name, words in section.pictures
            ]
    return "\n\n".join(parts) + "\n"


def page(title: str, sections: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """HTML that loads nothing; pictures: PNG files by name; those that are missing say so."""
    body = "".join(_section(section, pictures) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escaped(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{_escaped(title)}</h1>{body}</body></html>\n"
    )


def _section(section: Section, pictures: Mapping[str, bytes]) -> str:
    parts = [f"<h2>{_escaped(section.heading)}</h2>"]
    if section.text:
        parts.append(f"<p>{_escaped(section.text)}</p>")
    if section.rows:
        parts.append(_table(section.heads, section.rows))
    if section.lines:
        items = "".join(f"<li>{_escaped(line)}</li>" for line in section.lines)
        parts.append(f"<ul>{items}</ul>")
    if section.code:
        parts.append(f"<pre><code>{_escaped(section.code, lines=True)}</code></pre>")
    parts += [_figure(pictures.get(name), words) for name, words in section.pictures]
    return f"<section>{''.join(parts)}</section>\n"


def _table(heads: Row, rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{_escaped(name)}</th>" for name in heads)
    lines = "".join(
        f"<tr>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    kind = ' class="facts"' if not heads else ""
    head = f"<thead><tr>{head}</tr></thead>" if heads else ""
    return f'<div class="wide"><table{kind}>{head}<tbody>{lines}</tbody></table></div>'


def _figure(png: bytes | None, caption: str) -> str:
    words = _escaped(caption)
    if png is None:
        return f"<p>No picture: {words}.</p>"
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<figure><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'


def _marked(text: str) -> str:
    """Text that markdown shows as it is, in one line and in a table's cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", _printable(text))


def _escaped(text: str, lines: bool = False) -> str:
    """Text as HTML; `lines` keeps its line ends."""
    parts = text.split("\n") if lines else [text]
    return "\n".join(entities.escape(_printable(part)) for part in parts)


def _printable(text: str) -> str:
    """What cannot be printed (controls, reversed writing, line ends) as its number."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


_STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --ink: #1d1f23; --soft: #63676f;
  --line: #dcdcd8; --card: #f2f2ef; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181b; --ink: #e4e5e7; --soft: #9a9ea6;
  --line: #33373d; --card: #1f2226; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; margin: 0 auto;
  background: var(--ground); color: var(--ink); max-width: 60rem; overflow-wrap: anywhere;
  padding: 1.5rem clamp(.9rem, 3vw, 2rem) 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; font-weight: 600; margin: .5rem 0; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 2.2rem 0 .6rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
p, ul { max-width: 46rem; margin: .3rem 0 .8rem; } ul { padding-left: 1.2rem; }
pre { background: var(--card); padding: .7rem .9rem; border-radius: 6px; overflow-x: auto;
  overflow-wrap: normal; font: .86em/1.45 ui-monospace, Menlo, Consolas, monospace; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .3rem 0 .8rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem 1.2rem .25rem 0;
  border-bottom: 1px solid var(--line); }
th, .facts td:first-child { color: var(--soft); font-weight: 400; }
table:not(.facts) td { min-width: 4.5rem; overflow-wrap: normal; }
.facts td:first-child { min-width: 9.5rem; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: .88rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; display: block; }
@media (max-width: 34rem) {
  .facts, .facts tbody, .facts tr, .facts td { display: block; }
  .facts td { padding-right: 0; } .facts td:first-child { border: 0; padding-bottom: 0; } }
"""
