"""Result files, the table made of them, aims that are judged by them, and costs that follow."""

from pathlib import Path

import pytest

from benchmarks import cost, results
from benchmarks.aims import Aim, judge
from benchmarks.table import Bars, Table

MACHINE = "2026-01-01 00:00 UTC; AMD EPYC (Zen 4) 9B14, 2 CPUs; Python 3.11.7, torch 2; load 0."
LIMIT, OURS, PEER = "the parts alone, one process per CPU", "pipelines build", "img2dataset 1.47.0"
COLUMNS = ("builder", "steady img/s", "start-up, s")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A result of `builder` where ours reaches 0.95 of the limit and 1.4 times a peer."""
    rates = {LIMIT: [100.0, 200.0], OURS: [95.0, 190.0], PEER: [100.0, 100.0]}
    rows = (
        (LIMIT, "150 [100..200]", "1.0"),
        (f"**`{OURS}`**", "142 [95..190]", "9.5 [9.0..10.0]"),
        (PEER, "100 [100..100]", "6.0"),
        ("Ray alone: start, one empty map, end", "–", "7.5"),
    )
    table = Table(COLUMNS, rows, "Words.", Bars("steady img/s", rates))
    results.write("builder", table, MACHINE, "python -m benchmarks builder", tmp_path)
    return tmp_path


def aim(**changed: object) -> Aim:
    fields = {"text": "t", "theme": "builder", "of": "pipelines build$", "column": "steady img/s"}
    return Aim(**(fields | {"sign": "≥", "value": 0.9} | changed))  # type: ignore[arg-type]


def test_a_result_is_read_as_it_was_written(folder: Path) -> None:
    (result,) = results.newest(folder)
    assert (result.name, result.hardware) == ("builder", "amd-epyc-9b14-2cpus")
    assert result.columns == COLUMNS and list(result.rows)[:3] == [LIMIT, OURS, PEER]
    assert result.cell(OURS, "start-up, s") == "9.5 [9.0..10.0]"
    assert result.rounds[OURS] == (95.0, 190.0)


def test_only_the_newest_result_of_a_hardware_counts(folder: Path) -> None:
    table = Table(COLUMNS, ((OURS, "1 [1..1]", "1"),), "Then.")
    (newest,) = folder.glob("*.md")
    for name in ("builder_amd-epyc-9b14-2cpus_2000-01-01", "builder_other-4cpus_2000-01-01"):
        (folder / f"{name}.md").write_text(table.markdown())
    found = {result.hardware: result for result in results.newest(folder)}
    assert found.keys() == {"amd-epyc-9b14-2cpus", "other-4cpus"}
    assert found["amd-epyc-9b14-2cpus"].path == newest


@pytest.mark.parametrize(
    ("changed", "shown", "met"),
    [
        ({"against": "the parts"}, "0.95 [0.95..0.95]", True),
        ({"against": "img2dataset", "value": 1.5}, "1.42 [0.95..1.90]", False),
        ({"column": "start-up, s", "sign": "≤", "value": 3, "against": "Ray alone", "less": True},
         "2.0", True),
        ({"column": "start-up, s", "sign": "≤", "value": 9}, "9.5 [9.0..10.0]", False),
        ({"of": ".*", "column": "start-up, s", "sign": "≤", "value": 9},
         f"9.5 [9.0..10.0] ({OURS})", False),
        ({"against": "litdata"}, "not measured", None),
        ({"of": "nobody"}, "not measured", None),
        ({"column": "another"}, "not measured", None),
    ],
)  # fmt: skip
def test_an_aim_is_judged_within_rounds_by_the_worst_row(
    folder: Path, changed: dict[str, object], shown: str, met: bool | None
) -> None:
    (result,) = results.newest(folder)
    judged = judge(aim(**changed), result)
    assert (judged.shown, judged.met) == (shown, met)
    assert judge(aim(**changed), None).met is None


def test_costs_follow_from_the_newest_results(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cost.main(["--results", str(folder), "--price", "c7a.4xlarge=3.6"]) == 0
    out = capsys.readouterr().out
    seconds = 1000 / (142 / 2 * 16)  # 142 images a second on 2 CPUs, 16 of the machine
    row = next(line for line in out.splitlines() if "build | c7a.4xlarge" in line)
    assert f"| {seconds:.3g} | CPUs | {seconds * 3.6 / 3600:.6f} |" in row
    assert "71 images/s per CPU built (builder_amd-epyc-9b14-2cpus_" in out
