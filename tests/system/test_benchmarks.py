"""Each script runs at its tiniest size, with ours and the limits, and compares equal work; no
figure is judged."""

import math
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import (
    builder,
    images,
    loader,
    resize,
    task,
    train,
)
from benchmarks.table import Table

PEERS = ("streaming", "litdata", "ffcv", "dali")


@pytest.fixture(scope="module")
def raw() -> images.Raw:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ALEXNET_TEST_DATA", raising=False)
        return images.load(limit=6)


def cells(table: Table, column: str) -> list[str]:
    return [row[table.columns.index(column)] for row in table.rows]


def check(table: Table, columns: tuple[str, ...]) -> None:
    assert table.columns == columns
    assert all(len(row) == len(columns) and all(row) for row in table.rows)
    lines = table.markdown().splitlines()
    assert lines[2] == f"| {' | '.join(columns)} |"
    assert len(lines) == 4 + len(table.rows)


def without_peers(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("ALEXNET_BENCH_PEERS", str(folder / "none"))


def test_every_resize_path_cuts_the_same_image(raw: images.Raw) -> None:
    for path in resize.PATHS.values():
        pixels, encoded = path(raw.jpegs[0])
        assert pixels.shape == (227, 227, 3) and encoded[:2] == b"\xff\xd8"
        assert resize.psnr(pixels, resize.reference(raw.jpegs[0])) > 50


def test_the_reference_resize_is_lanczos_as_in_pillow() -> None:
    signal = np.random.default_rng(0).uniform(0, 255, 500).astype(np.float32)
    for size in (256, 700):
        row = Image.fromarray(np.tile(signal, (1, 1))).resize((size, 1), Image.Resampling.LANCZOS)
        wanted = np.asarray(row)[0]
        np.testing.assert_allclose(resize._weights(500, size) @ signal, wanted, atol=1e-3)


def test_task_compares_a_builders_task_with_its_parts(raw: images.Raw) -> None:
    table = task.run(raw, rounds=2)
    check(table, task.COLUMNS)
    parts = ["the parts alone", "the parts alone, RGB throughout"]
    assert cells(table, "path") == [*parts, "pipelines.write_shard"]
    assert table.chart is not None and list(table.chart.values) == cells(table, "path")


def test_steady_rate_is_that_of_the_tars_behind_each_workers_first(tmp_path: Path) -> None:
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


def test_a_builder_that_loses_a_image_is_refused(raw: images.Raw, tmp_path: Path) -> None:
    builder._parts(images.class_folders(tmp_path / "raw", raw, 6), tmp_path / "out")
    fewer = images.class_folders(tmp_path / "more", raw, 7)
    with pytest.raises(AssertionError, match="lost"):
        builder.examined(fewer, tmp_path / "out")


def test_loader_compares_ours_with_webdataset_and_the_limits(
    raw: images.Raw, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_peers(monkeypatch, tmp_path)
    table = loader.run(raw, rounds=1, samples=24, batch=8, threads=1)
    check(table, loader.COLUMNS)
    names = (loader.LIMIT, loader.COPY, loader.OURS, loader.DECODED, loader.PLAIN)
    assert [name.strip("*`") for name in cells(table, "loader")] == list(names)
    assert all(f"Not here: {peer} (not installed" in table.setting for peer in PEERS)


def test_a_loader_with_other_images_or_labels_is_refused() -> None:
    look: dict[str, Any] = {"images": 8, "labels": 28, "pixels": 100.0, "mixed": 450.0}
    look["shapes"] = [["uint8", 3, 227, 227]]
    loader.refuse_unequal({loader.LIMIT: look, "same": look}, 8)
    others = ({"images": 7}, {"labels": 29}, {"pixels": 90.0}, {"mixed": 470.0}, {"shapes": []})
    for other in others:
        with pytest.raises(AssertionError, match="other work"):
            loader.refuse_unequal({loader.LIMIT: look, "other": look | other}, 8)


def test_training_steps_of_different_networks_are_refused() -> None:
    steps = {"one": [train.Steps(1, 0, "6.60", 0)], "two": [train.Steps(1, 0, "4.13", 0)]}
    with pytest.raises(AssertionError, match="networks differ"):
        train.refuse_unequal(steps)


def test_a_small_trial_prints_and_writes_only_where_told(
    raw: images.Raw,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(images, "load", lambda *_: raw)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "SCRIPTS", {"resize": resize.run})
    assert command.main(["--small"]) == 0
    assert "| usual Pillow script |" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert command.main(["resize", "--rounds", "2", "--out", "results"]) == 0
    (written,) = (tmp_path / "results").glob("resize_*.md")
    assert "`python -m benchmarks resize --rounds 2`" in written.read_text()
    assert "2 rounds" in written.read_text()


def test_a_benchmark_that_fails_does_not_keep_the_others_from_running(
    raw: images.Raw,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def unequal(*_: object, **__: object) -> Table:
        raise AssertionError("a loader does other work")

    monkeypatch.setattr(images, "load", lambda *_: raw)
    monkeypatch.setattr(command, "SCRIPTS", {"loader": unequal, "resize": resize.run})
    assert command.main(["--small", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "error: loader was not measured: a loader does other work" in told.err
    assert "What moved:" in told.out and "met: PSNR of the resize" in told.out
    assert [path.stem.partition("_")[0] for path in tmp_path.glob("*.md")] == ["resize"]
