"""Results as files: a table with all that it depends on, a chart, and what moved since the last."""

import re
import statistics
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.table import Bars, Lines, Table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
_SPREAD = re.compile(r"^([\d.]+) \[([\d.]+)\.\.([\d.]+)\]$")


def write(name: str, table: Table, machine: str, command: str, folder: Path = FOLDER) -> Path:
    """NAME_HARDWARE_DATE.md, and .svg where the table has a chart. `machine` is table.machine() of
    before the run; the file says what moved against the newest older one of the same hardware."""
    folder.mkdir(parents=True, exist_ok=True)
    today = datetime.now(UTC).date().isoformat()
    stem = f"{name}_{hardware(machine)}"
    path = folder / f"{stem}_{today}.md"
    older = sorted(old for old in folder.glob(f"{stem}_*.md") if old.name < path.name)
    parts = [f"# {name}", f"{machine}\nCommit {_commit()}; `{command}`.", table.markdown()]
    if older:
        lines = list(moved(older[-1].read_text(), table)) or ["nothing moved out of its spread"]
        parts.append("\n".join([f"Against {older[-1].name}:", "", *(f"- {x}" for x in lines)]))
    if table.chart is not None:
        draw(table.chart, path.with_suffix(".svg"))
        parts.append(f"![{table.chart.title}]({path.with_suffix('.svg').name})")
    path.write_text("\n\n".join(parts) + "\n")
    return path


def hardware(machine: str) -> str:
    """From a line of table.machine(): "amd-epyc-9b14-2cpus"."""
    words = re.sub(r"\(.*?\)", "", "".join(machine.split(";")[1]))
    processor, _, cpus = words.rpartition(",")
    slug = re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-")
    return f"{slug}-{cpus.split()[0]}cpus"


def moved(before: str, table: Table) -> Iterator[str]:
    """The figures whose spreads of then and now do not touch."""
    rows = [line.strip("| ").split(" | ") for line in before.splitlines() if line.startswith("|")]
    if not rows or tuple(rows[0]) != table.columns:
        yield "the columns are others, so that nothing can be compared"
        return
    known = {row[0]: row for row in rows[2:]}
    for row in table.rows:
        old_row = known.get(row[0], ())
        for column, old, new in zip(table.columns, old_row, row, strict=False):
            then, now = _SPREAD.match(old), _SPREAD.match(new)
            if not then or not now:
                continue
            if float(now[2]) > float(then[3]) or float(now[3]) < float(then[2]):
                yield f"{row[0]}, {column}: {old} → {new}"


def draw(chart: Bars | Lines, path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import, and not needed to print

    if isinstance(chart, Lines):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        for axes, (panel, lines) in zip(
            figure.subplots(1, len(chart.panels)), chart.panels.items(), strict=True
        ):
            for name, points in lines.items():
                axes.loglog(*zip(*points, strict=True), marker="o", label=name)
            axes.set(xlabel=chart.across, ylabel=panel)
            axes.legend(fontsize="small", frameon=False)
    else:
        names = list(chart.values)[::-1]
        values = [chart.values[name] for name in names]
        middle = [statistics.median(of_name) for of_name in values]
        figure = Figure(figsize=(8, 0.8 + 0.4 * len(names)), layout="constrained")
        axes = figure.subplots()
        low = [m - min(v) for m, v in zip(middle, values, strict=True)]
        high = [max(v) - m for m, v in zip(middle, values, strict=True)]
        axes.barh(names, middle, xerr=(low, high), capsize=3, color="#4878a8")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(chart.title, fontsize="medium")
    figure.savefig(path, metadata={"Date": None})


def _commit() -> str:
    git = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    told = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    return told.stdout.strip() or "unknown"
