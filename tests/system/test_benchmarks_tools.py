"""What the benchmarks stand on: processes and their CPU time, peers' environments, result files."""

import os
import re
import sys
from pathlib import Path

import pytest

from benchmarks import charts, environments, processes, results, turns
from benchmarks.table import Bars, Lines, Panel, Table

MACHINE = "2026-01-01 00:00 UTC; AMD EPYC (Zen 4) 9B14, 2 CPUs; Python 3.11.7, torch 2; load 0."
BURN = "import time\nwhile time.process_time() < 0.6: pass"


def run(code: str, **more: float) -> processes.Finished:
    return processes.run([sys.executable, "-c", code], on=processes.cpus(1), **more)


def test_cpu_time_counts_children_of_children_that_are_gone() -> None:
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}])"
    done = run(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])")
    assert 0.6 <= done.cpu_seconds < 3


def test_cpu_time_counts_children_that_nobody_waits_for() -> None:
    burnt = f"{BURN}\nprint(flush=True)\ntime.sleep(1)"
    orphan = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {burnt!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "time.sleep(2)"
    )
    assert run(orphan).cpu_seconds > 0.5


def test_a_command_is_pinned_and_the_caller_is_not() -> None:
    before = os.sched_getaffinity(0)
    done = run("import os; print(len(os.sched_getaffinity(0)))")
    assert done.answer() == 1
    assert os.sched_getaffinity(0) == before


def test_a_command_that_fails_tells_its_last_words() -> None:
    with pytest.raises(processes.Failed, match="exit code 3\nalas"):
        run("import sys; print('alas', file=sys.stderr); sys.exit(3)")


def test_a_command_that_takes_too_long_is_ended() -> None:
    with pytest.raises(processes.Failed):
        run("import time; time.sleep(60)", timeout=0.5)


def test_turns_alternate() -> None:
    order: list[str] = []
    contenders = {name: lambda number, name=name: order.append(name) for name in "abc"}
    turns.in_turns(contenders, 2)
    assert "".join(order) == "abccba"


def test_every_requirement_of_a_peer_is_pinned_and_torch_is_ours() -> None:
    constraints = (processes.ROOT / "constraints.txt").read_text()
    for name in environments.names():
        lines = (processes.PEERS / f"{name}.txt").read_text().splitlines()
        assert all(re.match(r"^[A-Za-z0-9._-]+==\S+( +#.*)?$", line) for line in lines), name
        for line in lines:
            if line.startswith("torch=="):
                assert line in constraints.splitlines(), f"{name} would download another torch"


def test_a_peer_that_cannot_be_installed_leaves_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALEXNET_BENCH_PEERS", str(tmp_path))
    monkeypatch.setattr(environments, "PEERS", tmp_path)
    (tmp_path / "peer.txt").write_text(f"{tmp_path}/no-such-wheel.whl\n")
    assert environments.main(["peer"]) == 0
    with pytest.raises(environments.Absent, match="no-such-wheel"):
        environments.python("peer")
    assert not (tmp_path / "peer").exists()


def test_a_peer_half_installed_or_of_other_versions_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALEXNET_BENCH_PEERS", str(tmp_path))
    made_from = tmp_path / "dali" / "made-from.txt"
    (tmp_path / "dali" / "bin").mkdir(parents=True)
    (tmp_path / "dali" / "bin" / "python").touch()
    with pytest.raises(environments.Absent, match="not installed"):
        environments.python("dali")
    made_from.write_text("another==1\n")
    with pytest.raises(environments.Absent, match="other versions"):
        environments.python("dali")
    made_from.write_text((environments.PEERS / "dali.txt").read_text())
    assert environments.python("dali") == tmp_path / "dali" / "bin" / "python"


def test_an_unknown_peer_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert environments.main(["nobody"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_result_names_hardware_date_commit_and_command(tmp_path: Path) -> None:
    table = Table(("what", "img/s"), (("ours", "5 [4..6]"),), "Words.", Bars("t", {"ours": [5.0]}))
    path, _ = results.write("theme", table, MACHINE, "python -m benchmarks theme", tmp_path)
    assert re.fullmatch(r"theme_amd-epyc-9b14-2cpus_\d{4}-\d\d-\d\d\.md", path.name)
    text = path.read_text()
    assert MACHINE in text and "`python -m benchmarks theme`" in text
    assert re.search(r"Commit [0-9a-f]{7,}|Commit unknown", text)
    assert path.with_suffix(".svg").name in text and path.with_suffix(".svg").exists()


def test_a_result_says_what_moved_since_the_one_before(tmp_path: Path) -> None:
    columns = ("what", "img/s", "ratio")
    rows = [("ours", "50 [40..60]", "1.0 [0.9..1.1]"), ("peer", "7 [6..8]", "–")]
    before = tmp_path / "theme_amd-epyc-9b14-2cpus_2000-01-01.md"
    before.write_text(Table(columns, tuple(rows), "Then.").markdown())
    rows[0] = ("ours", "70 [65..80]", "1.1 [1.0..1.2]")
    path, moved = results.write(
        "theme", Table(columns, tuple(rows), "Now."), MACHINE, "x", tmp_path
    )
    told = [line for line in path.read_text().splitlines() if line.startswith("- ")]
    assert told == ["- ours, img/s: 50 [40..60] → 70 [65..80]"]
    assert moved == ["ours, img/s: 50 [40..60] → 70 [65..80]"]


def test_a_second_run_of_the_same_day_is_compared_with_the_first(tmp_path: Path) -> None:
    for rate in ("5 [4..6]", "50 [40..60]"):
        table = Table(("what", "img/s"), (("ours", rate),), "Words.")
        path, moved = results.write("theme", table, MACHINE, "x", tmp_path)
    assert moved == ["ours, img/s: 5 [4..6] → 50 [40..60]"]
    assert "Against the run before, of the same day:" in path.read_text()


def test_lines_are_drawn_in_panels(tmp_path: Path) -> None:
    points = {"plan": [(10.0, 1.0), (100.0, 2.0)]}
    panels = [Panel("pictures", "seconds", points), Panel("shards", "MB", points)]
    assert charts.draw(Lines("t", panels), tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text()
    assert all(words in drawn for words in ("pictures", "shards", "seconds", "MB", "plan"))


def test_bars_without_a_figure_are_drawn_empty(tmp_path: Path) -> None:
    bars = Bars("t", {"ours": [5.0, 6.0], "nothing": [float("nan")]})
    assert charts.draw(bars, tmp_path / "x.svg")
    assert "nothing" in (tmp_path / "x.svg").read_text()


def test_the_largest_memory_of_a_command_is_known() -> None:
    small, large = (
        run(f"import time; x = bytearray({size}); time.sleep(1)").peak_mb
        for size in (1, 200_000_000)
    )
    assert 195 < large - small < 205
