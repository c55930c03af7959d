"""Which samples make global batch k of epoch e: a pure function of (seed, epoch, k).

World size does not appear: W ranks share each global batch, so every epoch sees every sample
exactly once, all ranks take the same number of steps, and a run stopped at any step goes on at the
next sample with another W too. A sample's id is its row in the split's index.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from training.config import WINDOW_SHARDS

Ids = NDArray[np.int64]


def epoch_order(
    shard_sizes: Sequence[int], *, seed: int, epoch: int, window: int = WINDOW_SHARDS
) -> Ids:
    """All sample ids of the split in the order of `epoch`: int64 (sum of sizes,)."""
    order, end = np.empty(sum(shard_sizes), np.int64), 0
    for part in windows(shard_sizes, seed=seed, epoch=epoch, window=window):
        order[end : (end := end + len(part))] = part
    return order


def windows(
    shard_sizes: Sequence[int], *, seed: int, epoch: int, window: int = WINDOW_SHARDS
) -> Iterator[Ids]:
    """The order of `epoch` in the parts that are shuffled whole: int64 (samples of the part,).

    Shards are permuted, then samples inside each `window` of them. The bits come from Philox's raw
    stream, which NumPy keeps stable over versions (NEP 19).
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    bits = np.random.Philox(key=[seed % 2**64, epoch])
    shards = _permutation(bits, len(sizes))
    for first in range(0, len(shards), window):
        chosen = shards[first : first + window]
        ids = np.concatenate([np.arange(starts[s], starts[s] + sizes[s]) for s in chosen])
        yield ids[_permutation(bits, len(ids))]


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Steps that cover every sample once with batches of at most `batch_size`."""
    return -(-num_samples // batch_size)


def global_batch(order: Ids, step: int, num_steps: int) -> Ids:
    """The ids of one step. Batch sizes of an epoch differ by at most one, so there is no tiny last
    batch whose gradient would be noise."""
    return order[step * len(order) // num_steps : (step + 1) * len(order) // num_steps]


def rank_part(batch: Ids, rank: int, world_size: int) -> Ids:
    """Rank's share of a global batch; shares differ by at most one sample."""
    return batch[rank::world_size]


def padded(part: Ids, size: int) -> Ids:
    """Rank's share with its first sample again and again, up to `size`."""
    return np.concatenate([part, np.repeat(part[:1], size - len(part))])


def _permutation(bits: np.random.Philox, length: int) -> Ids:
    return np.argsort(bits.random_raw(length), kind="stable")
