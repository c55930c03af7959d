"""Results as files: a table with all that it depends on, every round, a chart, and what moved."""

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from alexnet.errors import UserError
from benchmarks import charts
from benchmarks.table import Bars, Table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
_SPREAD = re.compile(r"^([\d.]+) \[([\d.]+)\.\.([\d.]+)\]$")
_ROUNDS = "Every round:"


@dataclass(frozen=True)
class Result:
    """A file as `write` leaves it. rows: by their first cell, without its marks; rounds: the
    values of the chart's bars, for ratios within a round."""

    path: Path
    name: str
    hardware: str
    date: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    rounds: Mapping[str, tuple[float, ...]]

    def cell(self, row: str, column: str) -> str:
        return self.rows[row][self.columns.index(column)]


def write(
    name: str, table: Table, machine: str, command: str, folder: Path = FOLDER
) -> tuple[Path, list[str]]:
    """NAME_HARDWARE_DATE-TIME.md, in UTC, and .svg where the table has a chart; and what moved
    against the newest result of the same hardware before. `machine` is table.machine() of before
    the run."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_{hardware(machine)}"
    path = folder / f"{stem}_{datetime.now(UTC):%Y-%m-%d-%H%M}.md"
    older = sorted(old for old in folder.glob(f"{stem}_*.md") if old.name < path.name)
    lines = list(moved(older[-1].read_text(), table)) if older else []
    parts = [f"# {name}", f"{machine}\nCommit {_commit()}; `{command}`.", table.markdown()]
    if older:
        told = lines or ["nothing moved out of its spread"]
        parts.append("\n".join([f"Against {older[-1].name}:", "", *(f"- {x}" for x in told)]))
    if isinstance(table.chart, Bars):
        parts.append(f"{_ROUNDS} {table.chart.title}.\n\n{_every_round(table.chart)}")
    if table.chart is not None and charts.draw(table.chart, path.with_suffix(".svg")):
        parts.append(f"![{table.chart.title}]({path.with_suffix('.svg').name})")
    path.write_text("\n\n".join(parts) + "\n")
    return path, lines


def newest(folder: Path = FOLDER) -> list[Result]:
    """The last result of each name and hardware."""
    found: dict[tuple[str, str], Result] = {}
    for path in sorted(folder.glob("*_*_*.md")):
        result = read(path)
        found[result.name, result.hardware] = result
    return list(found.values())


def read(path: Path) -> Result:
    name, hardware, date = path.stem.split("_")
    text, _, every = path.read_text().partition(_ROUNDS)
    columns, *rows = _tables(text)
    rounds = {label(row[0]): tuple(map(float, row[1:])) for row in list(_tables(every))[1:]}
    by_name = {label(row[0]): tuple(row) for row in rows}
    return Result(path, name, hardware, date, tuple(columns), by_name, rounds)


def label(cell: str) -> str:
    """A row's name without the marks that make it bold."""
    return cell.strip("*`")


def hardware(machine: str) -> str:
    """From a line of table.machine(): "amd-epyc-9b14-2cpus", or "nvidia-h200"."""
    words = re.sub(r"\(.*?\)", "", machine.split(";")[1])
    # Always matches: table.machine() wrote it.
    processor, cpus, accelerator = re.match(r"(.*), (\d+) CPUs(.*)", words).groups()  # type: ignore[union-attr]
    return _slug(accelerator) or f"{_slug(processor)}-{cpus}cpus"


def moved(before: str, table: Table) -> Iterator[str]:
    """The figures whose spreads of then and now do not touch."""
    columns, *rows = _tables(before.partition(_ROUNDS)[0]) or [()]
    if tuple(columns) != table.columns:
        yield "the columns are others, so that nothing can be compared"
        return
    known = {row[0]: row for row in rows}
    for row in table.rows:
        old_row = known.get(row[0], ())
        for column, old, new in zip(table.columns, old_row, row, strict=False):
            then, now = _SPREAD.match(old), _SPREAD.match(new)
            if not then or not now:
                continue
            if float(now[2]) > float(then[3]) or float(now[3]) < float(then[2]):
                yield f"{row[0]}, {column}: {old} → {new}"


def _every_round(chart: Bars) -> str:
    count = max(map(len, chart.values.values()), default=0)
    head = ["", *(str(number + 1) for number in range(count))]
    lines = [head, ["---"] * len(head)]
    lines += [[name, *(f"{value:.6g}" for value in of)] for name, of in chart.values.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tables(text: str) -> list[list[str]]:
    """Cells of the lines of tables, without the rules below their heads."""
    lines = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines]
    return [row for row in rows if set(row) != {"---"}]


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def refuse_uncommitted() -> None:
    """Raises UserError where a result could not name the code that it is of."""
    if _commit().endswith("-dirty"):
        raise UserError("this checkout has changes that are not committed; commit, or pass --out")


def _commit() -> str:
    git = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        told = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return told.stdout.strip() or "unknown"
