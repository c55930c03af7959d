"""Each script runs with a tiny setting and returns the table it promises; no figure is judged."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import build, loader, pictures, resize, train
from benchmarks.table import Table, spread


@pytest.fixture(scope="module")
def raw() -> pictures.Raw:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ALEXNET_TEST_DATA", raising=False)
        return pictures.load(limit=6)


def cells(table: Table, column: str) -> list[str]:
    return [row[table.columns.index(column)] for row in table.rows]


def check(table: Table, columns: tuple[str, ...]) -> None:
    assert table.columns == columns
    assert all(len(row) == len(columns) and all(row) for row in table.rows)
    lines = table.markdown().splitlines()
    assert lines[2] == f"| {' | '.join(columns)} |"
    assert len(lines) == 4 + len(table.rows)


def test_without_photos_the_pictures_are_drawn_and_said_to_be(raw: pictures.Raw) -> None:
    assert len(raw.jpegs) == 6
    assert "DRAWN" in raw.origin


def test_resize_compares_three_paths(raw: pictures.Raw) -> None:
    table = resize.run(raw, rounds=2)
    check(table, resize.COLUMNS)
    assert cells(table, "path") == list(resize.PATHS)
    assert cells(table, "ratio")[0] == "1.00 [1.00..1.00]"


def test_every_resize_path_cuts_the_same_picture(raw: pictures.Raw) -> None:
    for path in resize.PATHS.values():
        pixels, encoded = path(raw.jpegs[0])
        assert pixels.shape == (227, 227, 3) and encoded[:2] == b"\xff\xd8"
        assert resize._psnr(pixels, resize._reference(raw.jpegs[0])) > 50


def test_build_compares_a_task_with_its_parts(raw: pictures.Raw) -> None:
    table = build.run(raw, rounds=2)
    check(table, build.COLUMNS)
    assert cells(table, "path") == ["the parts alone", "pipelines.produce"]


def test_the_reference_resize_is_lanczos_as_in_pillow() -> None:
    signal = np.random.default_rng(0).uniform(0, 255, 500).astype(np.float32)
    for size in (256, 700):
        row = Image.fromarray(np.tile(signal, (1, 1))).resize((size, 1), Image.Resampling.LANCZOS)
        wanted = np.asarray(row)[0]
        np.testing.assert_allclose(resize._weights(500, size) @ signal, wanted, atol=1e-3)


# webdataset leaves its tars to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file.*train-000000.tar:ResourceWarning")
def test_loader_compares_two_loaders_on_the_same_shards(raw: pictures.Raw) -> None:
    table = loader.run(raw, samples=20, batch_size=8, workers=0, rounds=1)
    check(table, loader.COLUMNS)
    assert len(table.rows) == 2


def test_train_measures_the_real_loop(raw: pictures.Raw) -> None:
    table = train.run(raw, steps=1, batch_size=2, classes=3, recipes=("smoke",), threads=1)
    check(table, train.COLUMNS)
    assert cells(table, "recipe")[0] == "smoke"
    assert cells(table, "batch")[0] == "2"


def test_spread_is_median_lowest_and_highest() -> None:
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 [1.0..3.0]"


def test_the_command_prints_and_writes_only_where_told(
    raw: pictures.Raw,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(pictures, "load", lambda: raw)
    monkeypatch.chdir(tmp_path)
    tiny = {"resize": lambda pictures_: resize.run(pictures_, rounds=1)}
    monkeypatch.setattr(command, "SCRIPTS", tiny)
    assert command.main([]) == 0
    assert "| usual Pillow script |" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert command.main(["resize", "--out", "results.md"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]
    with pytest.raises(SystemExit):
        command.main(["nonsense"])
    assert "there are resize" in capsys.readouterr().err
