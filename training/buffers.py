"""Memory for batches, used over and over instead of being asked of the system for each batch."""

import math
import weakref
from collections import deque

import numpy as np
import torch


class Buffers:
    """Lends uint8 (B, side, side, 3) tensors and takes them back by itself.

    A buffer comes back when the last tensor or array that looks into it is gone, whoever holds it
    and however it was sliced: so a batch that is kept is never overwritten, and `idle` says only
    how many free ones are kept for the next batches.

    Pinned ones are PyTorch's own to reuse. The host runs several steps ahead of a GPU, so a batch
    that nothing refers to may still be waiting to be copied; the allocator of pinned memory marks
    each copy on its stream and gives a block out again only after it, which no fixed number of
    buffers here could promise.
    """

    def __init__(self, side: int, idle: int) -> None:
        self._side = side
        # A deque's ends need no lock: buffers come back in whatever thread drops them.
        self._free: deque[np.ndarray] = deque(maxlen=idle)

    def take(self, count: int, *, pin: bool) -> torch.Tensor:
        """uint8 (count, side, side, 3) with arbitrary content; in pinned memory for `pin`."""
        shape = (count, self._side, self._side, 3)
        if pin:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        num_bytes = math.prod(shape)
        whole = self._idle_of(num_bytes)
        lent = whole[:num_bytes].reshape(shape)
        # from_numpy's storage holds `lent` for as long as any tensor shares it.
        weakref.finalize(lent, self._free.append, whole).atexit = False
        return torch.from_numpy(lent)

    def _idle_of(self, num_bytes: int) -> np.ndarray:
        """An idle buffer of at least so many bytes, or a new one in the place of one too small."""
        try:
            whole = self._free.popleft()
        except IndexError:
            return np.empty(num_bytes, np.uint8)
        return whole if len(whole) >= num_bytes else np.empty(num_bytes, np.uint8)
