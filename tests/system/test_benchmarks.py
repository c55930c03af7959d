"""Each script runs at its tiniest size, with ours and the limits, and compares equal work; no
figure is judged. Peers run where `make bench-peers` has made their environments."""

import math
import os
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import (
    builder,
    environments,
    grown_workers,
    growth,
    images,
    loader,
    processes,
    recipes,
    resize,
    task,
    train,
)
from benchmarks.table import Table, spread

PEERS = ("streaming", "litdata", "ffcv", "dali")


@pytest.fixture(scope="module")
def raw() -> images.Raw:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ALEXNET_TEST_DATA", raising=False)
        return images.load(limit=6)


@pytest.fixture(scope="module")
def shards(raw: images.Raw, tmp_path_factory: pytest.TempPathFactory) -> str:
    """64 images in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    jpegs = images.stored(raw, 227)
    return images.write_shards(folder, jpegs, crop=227, train=64, classes=1000, per_shard=32)


def cells(table: Table, column: str) -> list[str]:
    return [row[table.columns.index(column)] for row in table.rows]


def check(table: Table, columns: tuple[str, ...]) -> None:
    assert table.columns == columns
    assert all(len(row) == len(columns) and all(row) for row in table.rows)
    lines = table.markdown().splitlines()
    assert lines[2] == f"| {' | '.join(columns)} |"
    assert len(lines) == 4 + len(table.rows)


def python_of(peer: str) -> Path:
    try:
        return environments.python(peer)
    except environments.Absent as reason:
        pytest.skip(f"{peer}: {reason}")


def without_peers(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("ALEXNET_BENCH_PEERS", str(folder / "none"))


def test_without_photos_the_images_are_drawn_and_said_to_be(raw: images.Raw) -> None:
    assert len(raw.jpegs) == 6
    assert "DRAWN" in raw.origin


def test_resize_compares_three_paths(raw: images.Raw) -> None:
    table = resize.run(raw, rounds=2)
    check(table, resize.COLUMNS)
    assert cells(table, "path") == list(resize.PATHS)
    assert cells(table, "ratio")[0] == "1.00 [1.00..1.00]"


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


@pytest.mark.timeout(600)  # three starts of Ray
def test_builder_compares_the_public_command_with_its_parts(
    raw: images.Raw, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_peers(monkeypatch, tmp_path)
    found, absent = builder.contenders()
    assert "img2dataset" in absent and "make bench-peers" in absent["img2dataset"]
    fewer = {name: found[name] for name in (builder.LIMIT, builder.OURS)}
    monkeypatch.setattr(builder, "contenders", lambda: (fewer, absent))
    table = builder.run(raw, rounds=1, sizes=(3, 6), slowest=6)
    check(table, builder.COLUMNS)
    assert cells(table, "builder") == [builder.LIMIT, f"**`{builder.OURS}`**", builder.RAY]
    limit, ours, _ = cells(table, "PSNR, dB (worst)")
    assert limit == ours  # the very same JPEGs
    assert "Not here: img2dataset (not installed" in table.setting


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


def built(make: builder.Command, raw: images.Raw, folder: Path) -> builder.Quality:
    source = images.class_folders(folder / "raw", raw, 6)
    make(source, folder / "out")
    return builder.examined(source, folder / "out")


def test_ray_data_as_documented_makes_the_same_images(raw: images.Raw, tmp_path: Path) -> None:
    ours = built(builder._parts, raw, tmp_path / "parts")
    peer = built(builder._ray_data, raw, tmp_path / "ray")
    assert ours.images == peer.images == 6
    np.testing.assert_allclose(peer.psnr, ours.psnr, atol=0.3)
    assert peer.kilobytes == pytest.approx(ours.kilobytes, rel=0.02)


def test_img2dataset_makes_as_many_images_of_the_same_geometry(
    raw: images.Raw, tmp_path: Path
) -> None:
    python = python_of("img2dataset")
    peer = built(lambda *places: builder._img2dataset(python, *places), raw, tmp_path)
    assert peer.images == 6
    assert min(peer.psnr) > 25  # another filter, the same cut


def test_a_builder_that_loses_a_image_is_refused(raw: images.Raw, tmp_path: Path) -> None:
    built(builder._parts, raw, tmp_path)
    fewer = images.class_folders(tmp_path / "more", raw, 7)
    with pytest.raises(AssertionError, match="lost"):
        builder.examined(fewer, tmp_path / "out")


def test_loader_compares_ours_with_webdataset_and_the_limits(
    raw: images.Raw, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_peers(monkeypatch, tmp_path)
    table = loader.run(raw, rounds=1, samples=24, batch=8, threads=1)
    check(table, loader.COLUMNS)
    names = (loader.LIMIT, loader.OURS, loader.PLAIN)
    assert [name.strip("*`") for name in cells(table, "loader")] == list(names)
    assert all(f"Not here: {peer} (not installed" in table.setting for peer in PEERS)


@pytest.mark.parametrize("peer", PEERS)
def test_a_peers_loader_delivers_the_same_images(peer: str, shards: str, tmp_path: Path) -> None:
    python = python_of(peer)
    request = loader.request_for(shards, tmp_path / "work", batch=8, threads=2)
    ask = loader._ask_peer
    script = f"load_{peer}.py"
    ask(python, script, request | {"action": "prepare"})
    look = request | {"action": "check"}
    limit = loader._ask_ours("load_limit", look)
    loader.refuse_unequal({loader.LIMIT: limit, peer: ask(python, script, look)}, 64)
    timed = ask(python, script, request | {"action": "run"})
    assert timed["images"] + timed["first_images"] == 64


def test_a_loader_with_other_images_or_labels_is_refused() -> None:
    look: dict[str, Any] = {"images": 8, "labels": 28, "pixels": 100.0, "mixed": 450.0}
    look["shapes"] = [["uint8", 3, 227, 227]]
    loader.refuse_unequal({loader.LIMIT: look, "same": look}, 8)
    others = ({"images": 7}, {"labels": 29}, {"pixels": 90.0}, {"mixed": 470.0}, {"shapes": []})
    for other in others:
        with pytest.raises(AssertionError, match="other work"):
            loader.refuse_unequal({loader.LIMIT: look, "other": look | other}, 8)


@pytest.mark.timeout(600)  # Ray Train starts, on a machine that may be busy
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # MLflow's
def test_train_compares_ray_train_with_a_bare_loop_of_the_same_network(raw: images.Raw) -> None:
    table = train.run(raw, rounds=1, steps=2, batch=2, classes=3, width=0.1)
    check(table, train.COLUMNS)
    assert len(table.rows) == 4
    assert len(set(cells(table, "GFLOP per image"))) == 1


def test_training_steps_of_different_networks_are_refused() -> None:
    steps = {"one": [train.Steps(1, 0, "6.60", 0)], "two": [train.Steps(1, 0, "4.13", 0)]}
    with pytest.raises(AssertionError, match="networks differ"):
        train.refuse_unequal(steps)


def test_recipes_measures_the_real_loop(raw: images.Raw) -> None:
    table = recipes.run(raw, rounds=1, batch_size=2, classes=3, recipes=("smoke",), threads=1)
    check(table, recipes.COLUMNS)
    assert cells(table, "recipe")[0] == "smoke"
    assert cells(table, "batch")[0] == "2"


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # MLflow's
def test_growth_follows_a_set_from_its_plan_to_the_loader(raw: images.Raw) -> None:
    table = growth.run(
        raw,
        rounds=1,
        images=(50, 100),
        shards=(4, 20),
        classes=(2, 5),
        middle=100,
        versions=(1, 3),
        workers=None,
    )
    check(table, growth.COLUMNS)
    told = cells(table, "what")
    assert {"plan, 50 images", "verify, 20 shards", "order of an epoch, 5 classes"} <= set(told)
    assert told[-2:] == ["registry list, 1 versions", "registry list, 3 versions"]
    assert len(told) == 5 * (2 + 2 + 2) + 2
    power = cells(table, "power of time")
    assert all((cell == "–") == (number % 2 == 0) for number, cell in enumerate(power))


def test_power_is_that_of_the_size() -> None:
    series = growth.Series("plan", "images", {10: [(1.0, 5.0)], 1000: [(100.0, 50.0)]})
    assert series.power(10, 0) == "–"
    assert (series.power(1000, 0), series.power(1000, 1)) == ("1.00", "0.50")


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_steps_are_timed_on_any_number_of_ranks(shards: str, ranks: int) -> None:
    sizes = grown_workers.Sizes(batch=4, steps=1, classes=1000, width=0.1)
    request = asdict(sizes) | {"shards": shards}
    if ranks > len(processes.cpus()):
        pytest.skip(f"{len(processes.cpus())} CPUs here")
    assert grown_workers.stepped(request, ranks) > 0


def test_spread_is_median_lowest_and_highest() -> None:
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 [1.0..3.0]"


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


@pytest.mark.parametrize("words", [["nonsense"], ["--rounds", "0"]])
def test_a_wrong_call_of_the_benchmarks_is_refused(words: list[str]) -> None:
    assert command.main(words) == 2
