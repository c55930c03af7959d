"""Each script runs at its tiniest size, with ours and the limits, and compares equal work; no
figure is judged."""

import math
import os
import re
import sys
import tarfile
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import (
    builder,
    environments,
    images,
    loader,
    processes,
    resize,
    results,
    task,
    train,
)
from benchmarks.table import Bars, Table

PEERS = ("streaming", "litdata", "ffcv", "dali")


@pytest.fixture(scope="module")
def raw() -> images.Raw:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ALEXNET_TEST_DATA", raising=False)
        return images.load(limit=6)


def cells(table: Table, columns: tuple[str, ...]) -> list[str]:
    """The names in its first column, once it is seen to be whole."""
    assert table.columns == columns
    assert all(len(row) == len(columns) and all(row) for row in table.rows)
    assert f"| {' | '.join(columns)} |" in table.markdown().splitlines()
    return [row[0] for row in table.rows]


def test_every_resize_path_cuts_the_same_image(raw):
    for path in resize.PATHS.values():
        pixels, encoded = path(raw.jpegs[0])
        assert pixels.shape == (227, 227, 3) and encoded[:2] == b"\xff\xd8"
        assert resize.psnr(pixels, resize.reference(raw.jpegs[0])) > 50


def test_the_reference_resize_is_lanczos_as_in_pillow():
    signal = np.random.default_rng(0).uniform(0, 255, 500).astype(np.float32)
    for size in (256, 700):
        row = Image.fromarray(np.tile(signal, (1, 1))).resize((size, 1), Image.Resampling.LANCZOS)
        wanted = np.asarray(row)[0]
        np.testing.assert_allclose(resize._weights(500, size) @ signal, wanted, atol=1e-3)


def test_task_compares_a_builders_task_with_its_parts(raw):
    table = task.run(raw, rounds=2)
    names = ["the parts alone", "the parts alone, RGB throughout", "pipelines.write_shard"]
    assert cells(table, task.COLUMNS) == names
    assert table.chart is not None and list(table.chart.values) == names


def test_steady_rate_is_that_of_the_tars_behind_each_workers_first(tmp_path):
    for number, (images_in, second) in enumerate([(7, 9), (5, 10), (30, 12), (10, 20), (20, 15)]):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w") as tar:
            for key in range(images_in):
                tar.addfile(tarfile.TarInfo(f"{key}.jpg"))
                tar.addfile(tarfile.TarInfo(f"{key}.json"))
        os.utime(path, (second, second))
    assert builder.steady(tmp_path, 2) == (30 + 20 + 10) / (20 - 10)
    assert builder.steady(tmp_path, 4) == 10 / (20 - 15)
    assert math.isnan(builder.steady(tmp_path, 5))
    for path in tmp_path.glob("*.tar"):
        os.utime(path, (9, 9))
    assert math.isnan(builder.steady(tmp_path, 2))


def test_a_builder_that_loses_a_image_is_refused(raw, tmp_path):
    builder._parts(images.class_folders(tmp_path / "raw", raw, 6), tmp_path / "out")
    fewer = images.class_folders(tmp_path / "more", raw, 7)
    with pytest.raises(AssertionError, match="lost"):
        builder.examined(fewer, tmp_path / "out")


def test_loader_compares_ours_with_webdataset_and_the_limits(raw, monkeypatch, tmp_path):
    monkeypatch.setenv("ALEXNET_BENCH_PEERS", str(tmp_path / "none"))
    table = loader.run(raw, rounds=1, samples=24, batch=8, threads=1)
    names = [loader.LIMIT, loader.COPY, loader.OURS, loader.DECODED, loader.PLAIN, loader.FASTER]
    assert [name.strip("*`") for name in cells(table, loader.COLUMNS)] == names
    assert all(f"Not here: {peer} (not installed" in table.setting for peer in PEERS)


def test_a_loader_with_other_images_or_labels_is_refused():
    look: dict[str, Any] = {"images": 8, "labels": 28, "pixels": 100.0, "mixed": 450.0}
    look["shapes"] = [["uint8", 3, 227, 227]]
    loader.refuse_unequal({loader.LIMIT: look, "same": look}, 8)
    others = ({"images": 7}, {"labels": 29}, {"pixels": 90.0}, {"mixed": 470.0}, {"shapes": []})
    for other in others:
        with pytest.raises(AssertionError, match="other work"):
            loader.refuse_unequal({loader.LIMIT: look, "other": look | other}, 8)


def test_training_steps_of_different_networks_are_refused():
    steps = {"one": [train.Steps(1, 0, "6.60", 0)], "two": [train.Steps(1, 0, "4.13", 0)]}
    with pytest.raises(AssertionError, match="networks differ"):
        train.refuse_unequal(steps)


@pytest.fixture
def scripts(raw: images.Raw, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Those that the command runs."""
    monkeypatch.setattr(images, "load", lambda *_: raw)
    monkeypatch.setattr(command, "SCRIPTS", chosen := {"resize": resize.run})
    return chosen


def test_a_small_trial_prints_and_writes_only_where_told(scripts, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command.main(["--small"]) == 0
    assert "| usual Pillow script |" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert command.main(["resize", "--rounds", "2", "--out", "results"]) == 0
    (written,) = (tmp_path / "results").glob("resize_*.md")
    assert "`python -m benchmarks resize --rounds 2`" in written.read_text()


def test_a_benchmark_that_fails_does_not_keep_the_others_from_running(scripts, capsys, tmp_path):
    def unequal(*_: object, **__: object) -> Table:
        raise AssertionError("a loader does other work")

    run = scripts.pop("resize")
    scripts |= {"loader": unequal, "resize": run}
    assert command.main(["--small", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "error: loader was not measured: a loader does other work" in told.err
    assert "What moved:" in told.out and "met: PSNR of the resize" in told.out
    assert [path.stem.partition("_")[0] for path in tmp_path.glob("*.md")] == ["resize"]


# What they stand on: processes and their CPU time, peers' environments, result files

MACHINE = "2026-01-01 00:00 UTC; AMD EPYC (Zen 4) 9B14, 2 CPUs; Python 3.11.7, torch 2; load 0."
BURN = "import time\nwhile time.process_time() < 0.6: pass"


def of_python(code: str) -> processes.Finished:
    return processes.run([sys.executable, "-c", code], on=processes.cpus(1))


def test_cpu_time_counts_children_of_children_that_are_gone():
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}])"
    done = of_python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])")
    assert 0.6 <= done.cpu_seconds < 3


def test_cpu_time_counts_children_that_nobody_waits_for():
    burnt = f"{BURN}\nprint(flush=True)\ntime.sleep(1)"
    orphan = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {burnt!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "time.sleep(2)"
    )
    assert of_python(orphan).cpu_seconds > 0.5


def test_a_command_is_pinned_and_the_caller_is_not():
    before = os.sched_getaffinity(0)
    done = of_python("import os; print(len(os.sched_getaffinity(0)))")
    assert done.answer() == 1
    assert os.sched_getaffinity(0) == before


def test_a_command_that_fails_tells_its_last_words():
    with pytest.raises(processes.Failed, match="exit code 3\nalas"):
        of_python("import sys; print('alas', file=sys.stderr); sys.exit(3)")


def test_every_requirement_of_a_peer_is_pinned_and_torch_is_ours():
    constraints = (processes.ROOT / "constraints.txt").read_text()
    for name in environments.names():
        lines = (processes.PEERS / f"{name}.txt").read_text().splitlines()
        assert all(re.match(r"^[A-Za-z0-9._-]+==\S+( +#.*)?$", line) for line in lines), name
        for line in lines:
            if line.startswith("torch=="):
                assert line in constraints.splitlines(), f"{name} would download another torch"


def test_a_peer_half_installed_or_of_other_versions_is_absent(monkeypatch, tmp_path):
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
    assert environments.main(["nobody"]) == 2


def test_a_result_names_hardware_date_commit_and_command_and_what_moved_since(tmp_path):
    columns = ("what", "img/s", "ratio")
    rows = [("ours", "50 [40..60]", "1.0 [0.9..1.1]"), ("peer", "7 [6..8]", "–")]
    before = tmp_path / "theme_amd-epyc-9b14-2cpus_2000-01-01.md"
    before.write_text(Table(columns, tuple(rows), "Then.").markdown())
    rows[0] = ("ours", "70 [65..80]", "1.1 [1.0..1.2]")
    table = Table(columns, tuple(rows), "Now.", Bars("t", {"ours": [5.0]}))
    path, moved = results.write("theme", table, MACHINE, "python -m benchmarks theme", tmp_path)
    assert re.fullmatch(r"theme_amd-epyc-9b14-2cpus_\d{4}-\d\d-\d\d-\d{4}\.md", path.name)
    text = path.read_text()
    assert MACHINE in text and "`python -m benchmarks theme`" in text
    assert re.search(r"Commit [0-9a-f]{7,}|Commit unknown", text)
    assert path.with_suffix(".svg").name in text and path.with_suffix(".svg").exists()
    told = [line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")]
    assert told == moved == ["ours, img/s: 50 [40..60] → 70 [65..80]"]
