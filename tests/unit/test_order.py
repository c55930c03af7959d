"""Which sample comes when: the promises that exactly-once epochs and resuming rest on."""

import hashlib

import numpy as np
import pytest

from training.order import epoch_order, global_batch, rank_part, steps_per_epoch

SIZES = (13, 7, 1, 29, 20, 3, 17, 11, 5, 2, 40)  # more shards than one window, uneven
TOTAL = sum(SIZES)


def test_an_epoch_has_every_sample_exactly_once():
    for epoch in range(3):
        assert sorted(epoch_order(SIZES, seed=5, epoch=epoch)) == list(range(TOTAL))


@pytest.mark.parametrize("num_shards", [1, 2, 8, 9, 16, 17])
def test_any_number_of_shards_is_covered(num_shards: int):
    order = epoch_order([3] * num_shards, seed=0, epoch=0)
    assert sorted(order) == list(range(3 * num_shards))


@pytest.mark.parametrize("batch_size", [1, 8, 32, TOTAL, 1000])
def test_global_batches_cut_the_order_without_loss_into_even_sizes(batch_size: int):
    order = epoch_order(SIZES, seed=0, epoch=0)
    steps = steps_per_epoch(TOTAL, batch_size)
    batches = [global_batch(order, step, steps) for step in range(steps)]
    sizes = {len(batch) for batch in batches}
    np.testing.assert_array_equal(np.concatenate(batches), order)
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert (steps - 1) * batch_size < TOTAL, "more steps than the batch size asks for"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_each_global_batch_whatever_their_number(world_size: int):
    order = epoch_order(SIZES, seed=3, epoch=1)
    steps = steps_per_epoch(TOTAL, 16)
    for step in range(steps):
        batch = global_batch(order, step, steps)
        parts = [rank_part(batch, rank, world_size) for rank in range(world_size)]
        assert sorted(np.concatenate(parts)) == sorted(batch), "not disjoint, or not all of it"
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1 and min(lengths) > 0


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(epoch_order(SIZES, seed=seed, epoch=epoch)) for seed in (0, 1, 2) for epoch in (0, 1)
    }
    assert len(orders) == 6


@pytest.mark.parametrize(("asked", "window"), [({}, 8), ({"window": 4}, 4), ({"window": 16}, 16)])
def test_shards_are_permuted_and_mixed_only_within_a_window(asked: dict[str, int], window: int):
    order = epoch_order([10] * 32, seed=0, epoch=0, **asked)
    size = 10 * window
    windows = [set((order[i : i + size] // 10).tolist()) for i in range(0, 320, size)]
    assert [len(shards) for shards in windows] == [window] * (32 // window)
    assert windows[0] != set(range(window)), "shards were not permuted"
    changes = np.count_nonzero(np.diff(order[:size] // 10))
    assert changes > 0.6 * size, "samples of one shard come in a row"


def test_a_window_of_all_shards_or_more_mixes_all():
    whole = epoch_order(SIZES, seed=2, epoch=0, window=len(SIZES))
    np.testing.assert_array_equal(whole, epoch_order(SIZES, seed=2, epoch=0, window=1000))
    assert sorted(whole) == list(range(TOTAL))


def test_every_place_of_the_order_is_equally_likely_for_a_sample():
    places = [np.flatnonzero(epoch_order([6, 6], seed=0, epoch=e) == 0)[0] for e in range(1200)]
    counts = np.bincount(places, minlength=12)
    # 11 degrees of freedom: the statistic is above 31.3 once in a thousand fair orders.
    assert ((counts - 100.0) ** 2 / 100).sum() < 31.3


def test_the_order_of_a_seed_and_epoch_never_changes():
    """Golden: runs in progress continue in this order. If this fails, resuming has broken; the
    digest is of `epoch_order` as little-endian int64."""
    digests = [
        hashlib.sha256(epoch_order(SIZES, seed=s, epoch=e).astype("<i8").tobytes()).hexdigest()[:16]
        for s, e in ((0, 0), (0, 1), (7, 90))
    ]
    assert digests == ["c0526de009686971", "7d2198ea089ddacd", "0dc84769c9ebbb3a"]
    assert epoch_order([3, 2], seed=0, epoch=0).tolist() == [0, 3, 2, 1, 4]
