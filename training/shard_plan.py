"""Which shards the batches ahead need, from when to when."""

import itertools
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.order import WINDOW_SHARDS


@dataclass(frozen=True)
class Use:
    name: str
    first: int  # number of the first batch that needs it
    last: int


def uses(shards: NDArray[np.int64], batches: NDArray[np.int64], names: list[str]) -> deque[Use]:
    """By first use. Both int64 (N,): each sample's shard, as a place in `names`, and its batch, in
    ascending order."""
    used, first = np.unique(shards, return_index=True)
    last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
    rows = sorted(zip(batches[first].tolist(), batches[last].tolist(), used.tolist(), strict=True))
    return deque(Use(names[shard], begin, end) for begin, end, shard in rows)


class ShardPlan:
    """Goes through the uses with the batches."""

    def __init__(self, uses_in_order: deque[Use]) -> None:
        self._upcoming = uses_in_order
        self._active: list[Use] = []

    def advance(self, batch: int) -> tuple[list[str], list[str]]:
        """The shards that `batch` or an earlier one needs and that are not done with yet, and the
        next window of them. Batches are asked for in ascending order."""
        while self._upcoming and self._upcoming[0].first <= batch:
            self._active.append(self._upcoming.popleft())
        self._active = [use for use in self._active if use.last >= batch]
        ahead = [use.name for use in itertools.islice(self._upcoming, WINDOW_SHARDS)]
        return [use.name for use in self._active], ahead
