"""How well batches mix the classes: against batches that are drawn, counted and compared."""

import dataclasses
import itertools
import json
import re
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from shard_sets import write_shard_set
from small_training import small_config

from alexnet.errors import UserError
from pipelines import shards
from pipelines.shards import Manifest, load_manifest
from training import checkpoint
from training.command_line import read_config
from training.config import to_dict
from training.mix import check_mix, label_mix
from training.order import epoch_order, global_batch, steps_per_epoch


def config_of(batch_size: int, **changes):
    return small_config(optim_batch_size=batch_size, optim_epochs=1, **changes)


def chi2(labels: np.ndarray, classes: int, shares: np.ndarray) -> float:
    expected = len(labels) * shares
    return float(((np.bincount(labels, minlength=classes) - expected) ** 2 / expected).sum())


def counted(labels: np.ndarray, sizes: list[int], batch_size: int, window: int) -> float:
    """chi² over degrees of freedom of drawn batches, as a multiple of what batches of permutations
    of all have: both by simulation, over many seeds."""
    total, classes = len(labels), int(labels.max()) + 1
    shares, steps = np.bincount(labels) / total, steps_per_epoch(total, batch_size)
    ours, fair = 0.0, 0.0
    for seed in range(400):
        order = epoch_order(sizes, seed=seed, epoch=0, window=window)
        whole = np.random.default_rng(seed).permutation(total)
        for step in range(steps):
            ours += chi2(labels[global_batch(order, step, steps)], classes, shares)
            fair += chi2(labels[global_batch(whole, step, steps)], classes, shares)
    return ours / fair


def sorted_labels(classes: int, each: int) -> np.ndarray:
    return np.repeat(np.arange(classes), each)


@pytest.mark.parametrize(
    ("sizes", "batch_size", "window"),
    [
        ([30] * 12, 20, 2),  # batches inside of a window
        ([30] * 12, 50, 1),  # and beyond one
        ([10] * 36, 90, 2),  # over several
        ([7, 50, 3, 40, 80, 60, 1, 119], 33, 3),  # uneven
    ],
)
@pytest.mark.parametrize("order", ["sorted", "even", "drawn"])
def test_mix_is_that_of_batches_that_are_drawn(order, sizes, batch_size, window):
    labels = np.concatenate([sorted_labels(6, 40), sorted_labels(3, 40)])  # not equally frequent
    labels = np.sort(labels) if order == "sorted" else labels.reshape(-1, 40).T.ravel()
    if order == "drawn":
        labels = np.random.default_rng(1).permutation(labels)
    expected = counted(labels, sizes, batch_size, window)
    configs = [config_of(batch_size, seed=s, shuffle_window=window) for s in range(400)]
    found = np.mean([label_mix(labels, sizes, config) for config in configs])
    assert found == pytest.approx(expected, rel=0.03, abs=0.02)
    assert (expected > 2) == (order == "sorted")


def test_mix_of_a_window_is_the_sum_over_all_possible_batches():
    """Two shards of one class and a mixed one, batches of two, window 1: by exact fractions."""
    labels, sizes = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1]), [4, 4, 4]

    def mean(images: list[int]) -> Fraction:
        batches = list(itertools.combinations(images, 2))
        off = [(sum(batch) - 1) ** 2 * Fraction(2) for batch in batches]  # both classes: half
        return sum(off, Fraction(0)) / comb(len(images), 2)

    shards = [labels[i : i + 4].tolist() for i in (0, 4, 8)]
    expected = sum(mean(shard) for shard in shards) / 3 / mean(labels.tolist())
    found = label_mix(labels, sizes, config_of(2, shuffle_window=1))
    assert found == pytest.approx(float(expected))


def test_a_window_of_all_shards_is_a_full_shuffle_and_one_batch_or_class_is_always_mixed():
    labels, sizes = sorted_labels(9, 40), [90] * 4
    assert label_mix(labels, sizes, config_of(16, shuffle_window=4)) == pytest.approx(1)
    assert label_mix(labels, sizes, config_of(16, shuffle_window=2)) > 2
    assert label_mix(labels, sizes, config_of(360, shuffle_window=1)) == 1
    assert label_mix(np.zeros(360, dtype=int), sizes, config_of(16, shuffle_window=1)) == 1
    assert label_mix(labels, sizes, config_of(1, shuffle_window=1)) == pytest.approx(1)


def test_mix_is_of_the_orders_that_the_run_will_have():
    """Of four shards with two classes either two of one class meet in a window, or not."""
    labels, sizes = sorted_labels(2, 40), [20] * 4
    config = config_of(10, shuffle_window=2)
    found = set()
    for seed in range(8):
        order = epoch_order(sizes, seed=seed, epoch=0, window=2)
        mixed = len(set(labels[order[:40]].tolist())) == 2
        value = label_mix(labels, sizes, dataclasses.replace(config, seed=seed))
        assert (value < 1.01) == mixed
        found.add(mixed)
    assert found == {False, True}
    epochs = dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=9))
    alone = []
    for epoch in range(3):
        order = epoch_order(sizes, seed=0, epoch=epoch, window=2)
        seeds = (s for s in range(99) if _same_windows(order, sizes, s))
        alone.append(label_mix(labels, sizes, dataclasses.replace(config, seed=next(seeds))))
    assert label_mix(labels, sizes, epochs) == pytest.approx(np.mean(alone))


def _same_windows(order: np.ndarray, sizes: list[int], seed: int) -> bool:
    other = epoch_order(sizes, seed=seed, epoch=0, window=2)
    return set((order[:40] // 20).tolist()) == set((other[:40] // 20).tolist())


# What is told of it


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """16 shards of 8 images, sorted: two shards for each of 8 classes."""
    uri = write_shard_set(tmp_path_factory.mktemp("mix") / "set", train=(8,) * 16, classes=8)
    index = shards.load_index(uri, "train")
    column = index.column_names.index("label")
    index = index.set_column(column, "label", pa.array(sorted_labels(8, 16)))
    path = Path(uri, "index", "train.parquet")
    path.write_bytes(shards.parquet_bytes(index.cast(shards.INDEX)))
    return uri


def checked(uri: str, *, begun: bool = False, manifest: Manifest | None = None, **changes):
    config = config_of(16, data=uri, **changes)
    return check_mix(config, manifest or load_manifest(uri), begun=begun)


def test_sorted_shards_are_told_with_their_figure_and_a_window_that_mixes(uri, caplog):
    found = checked(uri)
    assert 1.5 < found < 5 and f"{found:.1f} times that of a full shuffle" in caplog.text
    assert "build --raw RAW --shuffle global`" in caplog.text and caplog.text.count("\n") == 1
    [wide] = re.findall(r"or pass --shuffle-window (\d+) \(0\.0 GB", caplog.text)
    caplog.clear()
    assert checked(uri, shuffle_window=int(wide)) <= 1.5 and caplog.text == ""


def test_shards_that_mix_next_to_nothing_are_refused_unless_allowed_or_begun(uri, caplog):
    with pytest.raises(UserError, match=r"is 1\d\.\d times .*; --allow-sorted True trains") as told:
        checked(uri, shuffle_window=1)
    assert "\n" not in str(told.value) and caplog.text == ""
    for allowed in ({"allow_sorted": True}, {"begun": True}):
        caplog.clear()
        assert checked(uri, shuffle_window=1, **allowed) > 5
        assert "mix the classes badly" in caplog.text


def test_random_images_have_no_order(uri):
    assert checked(uri, shuffle_window=1, synthetic=True) is None


def test_an_index_of_other_images_is_refused(uri):
    fewer = load_manifest(uri)
    fewer = dataclasses.replace(fewer, shards=fewer.shards[1:])
    with pytest.raises(UserError, match="has 128 rows, its manifest promises 120"):
        checked(uri, manifest=fewer)


def test_a_window_beyond_a_node_s_cache_is_refused_with_one_that_fits(uri, monkeypatch):
    manifest = load_manifest(uri)
    large = [dataclasses.replace(shard, num_bytes=10**9) for shard in manifest.shards]
    manifest = dataclasses.replace(manifest, shards=tuple(large))
    load_index = shards.load_index

    def load(there: str, *which: Any) -> Any:
        return load_index(there.replace("s3://b", uri), *which)

    monkeypatch.setattr(shards, "load_index", load)
    given = {"manifest": manifest, "cache_gb": 11.5}
    with pytest.raises(UserError) as told:
        checked("s3://b", shuffle_window=12, **given)
    assert "holds 12.0 GB of shards on each node, --cache-gb 11.5" in str(told.value)
    assert "pass --shuffle-window 11, or --cache-gb 12.0 or more" in str(told.value)
    assert checked("s3://b", shuffle_window=11, **given) == checked(uri, shuffle_window=11)
    assert checked("s3://b", shuffle_window=8, manifest=manifest, cache_gb=1) > 1.5


def test_runs_of_earlier_releases_go_on_with_their_window_and_no_other(tmp_path):
    config = small_config()
    former = to_dict(config)
    del former["shuffle_window"], former["allow_sorted"]
    (tmp_path / "state.json").write_text(json.dumps({"config": former, "manifest": "a" * 64}))
    state = checkpoint.load_state(tmp_path)
    checkpoint.refuse_other(state, "here", small_config(allow_sorted=True), "a" * 64)
    with pytest.raises(UserError, match=r"shuffle_window: 8 -> 16"):
        checkpoint.refuse_other(state, "here", small_config(shuffle_window=16), "a" * 64)
    (tmp_path / "config.json").write_text(json.dumps(former))
    assert read_config(str(tmp_path / "config.json")) == config
