"""One table of the last results: ours, each peer and the limit, and the aims.

    python -m benchmarks.summary [--results FOLDER] [--write]

--write puts it into benchmarks/README.md, between the marks that are there for it.
"""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from alexnet.errors import UserError
from benchmarks import aims, results
from benchmarks.aims import AIMS, Aim, Judged
from benchmarks.results import Result
from pipelines import command

README = results.ROOT / "benchmarks" / "README.md"
BEGIN = "<!-- measured: made by `python -m benchmarks.summary --write` -->"
END = "<!-- end of measured -->"
_RATIO = "ours ÷ it, round by round; of the medians"
_HEAD = ("", "beside", "its figure", "ours", _RATIO, "aim", "measured on")

# theme, what is measured, our row, its column, the rows beside it
COMPARED = (
    ("builder", "raw JPEGs to shards, img/s", "pipelines build", "steady img/s", ""),
    ("builder", "6,000 of them, the whole job, s", "pipelines build", "whole job, s", ""),
    (
        "loader",
        "shards to uint8 batches, img/s",
        "training.loader",
        "img/s",
        "(?!training|limit: copying|.*decoder: none)",
    ),
    (
        "loader",
        "the same, decoded before, img/s",
        "training.loader, decoded file (--cache decoded), not mirrored",
        "img/s",
        "limit|.*not mirrored",
    ),
    (
        "train",
        "training steps on CPUs, img/s",
        "training/run.py, through Ray Train and MLflow",
        "img/s",
        "",
    ),
    ("resize", "one image's way, img/s per core", "pipelines.transform", "img/s per core", ""),
)


def document(folder: Path = results.FOLDER) -> str:
    """Markdown; links are relative to README."""
    found = results.newest(folder)
    lines = [_HEAD, tuple("---" for _ in _HEAD)]
    for theme, what, ours, column, others in COMPARED:
        for result in found:
            if result.name == theme:
                lines += _beside(result, what, ours, column, others)
    for aim in AIMS:
        if not _has_row(aim, found):
            lines += _alone(aim, [result for result in found if result.name == aim.theme])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *_reasons(found)])


def told(folder: Path, themes: Sequence[str]) -> Iterator[str]:
    """One line for each aim of these themes, of their last results."""
    found = results.newest(folder)
    for aim in AIMS:
        for result in found:
            if result.name == aim.theme and result.name in themes:
                judged = aims.judge(aim, result)
                yield f"{_verdict(judged)}: {aim.text}: {judged.shown}, aim {aim.wanted}"


def _beside(
    result: Result, what: str, ours: str, column: str, others: str
) -> Iterator[tuple[str, ...]]:
    """A row for each other contender, the limits among them."""
    for name in result.rows if ours in result.rows and column in result.columns else ():
        if name == ours or not re.match(others, name) or "–" in result.cell(name, column):
            continue
        divided = (a for a in AIMS if _divides(a, result, ours, name) and a.column == column)
        aim = next(divided, None)
        yield (
            what,
            name,
            result.cell(name, column),
            result.cell(ours, column),
            _both_ratios(result, ours, name, column),
            "" if aim is None else _cell(aim, aims.judge(aim, result)),
            _link(result),
        )


def _both_ratios(result: Result, ours: str, other: str, column: str) -> str:
    """The rounds of a result are those of its chart's column alone."""
    mine, theirs = (aims.number(result.cell(name, column)) for name in (ours, other))
    medians = f"{mine / theirs:.2f}" if theirs else "–"
    rounds = aims.ratio(result, ours, other, column)
    if column == "whole job, s" or len(rounds) == 1:
        return medians
    return f"{aims.shown_ratio(rounds)}; {medians}"


def _alone(aim: Aim, found: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """An aim with no contender's row: what it asks for, and what there is."""
    for result in found or [None]:
        judged = aims.judge(aim, result)
        where = _link(result) if result is not None else ""
        ratio = aim.against and not aim.less
        shown = "" if judged.met is None else judged.shown
        own = ("", shown) if ratio else (shown, "")
        yield (aim.text, aim.against, "", *own, _cell(aim, judged), where)


def _has_row(aim: Aim, found: Sequence[Result]) -> bool:
    return any(
        result.name == theme and _divides(aim, result, ours, name)
        for theme, _, ours, _, _ in COMPARED
        for result in found
        for name in result.rows
    )


def _divides(aim: Aim, result: Result, ours: str, name: str) -> bool:
    """Whether it is our row by this other one that `aims.judge` looks at."""
    if aim.theme != result.name or not aim.against or aim.less or _row_of(aim, result) != ours:
        return False
    return name == next((row for row in result.rows if row.startswith(aim.against)), "")


def _row_of(aim: Aim, result: Result) -> str:
    return next((name for name in result.rows if re.match(aim.of, name)), "")


def _cell(aim: Aim, judged: Judged) -> str:
    return f"{aim.wanted}: {_verdict(judged)}"


def _verdict(judged: Judged) -> str:
    return {True: "met", False: "**missed**", None: "not measured"}[judged.met]


def _link(result: Result) -> str:
    path = os.path.relpath(result.path, README.parent)
    return f"[{result.hardware}, {result.date}]({path})"


def _reasons(found: Sequence[Result]) -> list[str]:
    lines = []
    for aim in AIMS:
        judged = [aims.judge(aim, result) for result in found if result.name == aim.theme]
        if aim.reason and (not judged or any(not each.met for each in judged)):
            lines.append(f"- {aim.text}: {aim.reason}")
    return ["\n".join(["Why not:", "", *lines])] if lines else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("python -m benchmarks.summary", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="FOLDER")
    parser.add_argument("--write", action="store_true", help="into benchmarks/README.md")
    return command.answered(lambda: _written(parser.parse_args(argv)))


def _written(arguments: argparse.Namespace) -> int:
    text = document(arguments.results)
    if not arguments.write:
        print(text)
        return 0
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{README} lacks {BEGIN} … {END}; put them in")
    README.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    command.begin()
    command.leave(main)
