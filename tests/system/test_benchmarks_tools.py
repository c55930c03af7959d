"""What the benchmarks stand on: processes and their CPU time, peers' environments, result files."""

import os
import re
import sys
from pathlib import Path

import pytest

from benchmarks import environments, processes, results
from benchmarks.table import Bars, Table

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


def test_every_requirement_of_a_peer_is_pinned_and_torch_is_ours() -> None:
    constraints = (processes.ROOT / "constraints.txt").read_text()
    for name in environments.names():
        lines = (processes.PEERS / f"{name}.txt").read_text().splitlines()
        assert all(re.match(r"^[A-Za-z0-9._-]+==\S+( +#.*)?$", line) for line in lines), name
        for line in lines:
            if line.startswith("torch=="):
                assert line in constraints.splitlines(), f"{name} would download another torch"


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
