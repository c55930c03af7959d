"""Shards are opened before they are needed and closed when the last batch has been begun."""

import numpy as np

from training.order import WINDOW_SHARDS, epoch_order, global_batch, rank_part, steps_per_epoch
from training.shard_files import ShardUses

SIZES = [100] * 20
NAMES = [f"train-{number:06d}" for number in range(20)]


def batches_of_shards(batch_size: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
    order = epoch_order(SIZES, seed=1, epoch=0)
    steps = steps_per_epoch(len(order), batch_size)
    return [
        rank_part(global_batch(order, step, steps), rank, world_size) // 100
        for step in range(steps)
    ]


def test_every_batch_finds_its_shards_kept_and_later_ones_ahead():
    for world_size in (1, 3):
        batches = batches_of_shards(32, 0, world_size)
        numbers = np.repeat(np.arange(len(batches)), [len(shards) for shards in batches])
        first = {NAMES[s]: n for n in reversed(range(len(batches))) for s in batches[n]}
        plan = ShardUses(np.concatenate(batches), numbers, NAMES)
        for number, shards in enumerate(batches):
            keep, ahead = plan.advance(number)
            rest = {NAMES[shard] for shard in np.concatenate(batches[number:])}
            assert {NAMES[shard] for shard in shards} <= set(keep)
            assert set(keep) <= rest and set(ahead) <= rest, "what nobody needs is neither"
            assert not set(keep) & set(ahead)
            assert len(keep) <= 2 * WINDOW_SHARDS and len(ahead) <= WINDOW_SHARDS
            later = sorted(first[name] for name in rest - set(keep))
            assert [first[name] for name in ahead] == later[:WINDOW_SHARDS]


def test_plan_of_nothing_plans_nothing():
    empty = np.zeros(0, np.int64)
    assert ShardUses(empty, empty, []).advance(0) == ([], [])
