"""When a checkpoint is due besides those of the steps and epochs: by the clock, by a notice, or
because somebody wants the run to stop."""

import time
from collections.abc import Callable

import torch

from training.steps import Place

# Steps between two looks: every rank meets the others for the answer.
ASK_STEPS = 20
# Seconds between two looks for a stop, which slow steps must not delay, and steps at most.
_LOOK_SECONDS, _MOST_STEPS = 1.0, 100


class Due:
    """minutes: since the last checkpoint, by rank 0's clock; None for never. preempted: whether the
    machine is about to be taken away, asked on every rank since the question may be a meeting."""

    def __init__(
        self, minutes: float | None, preempted: Callable[[], bool] | None, place: Place
    ) -> None:
        self._minutes, self._preempted, self._place = minutes, preempted, place
        self.saved()

    def saved(self) -> None:
        self._saved_at = time.monotonic()

    def now(self, step: int) -> bool:
        """The same answer on all ranks; they must all ask after the same steps."""
        if step % ASK_STEPS:
            return False
        late = (
            self._place.rank == 0
            and self._minutes is not None
            and time.monotonic() - self._saved_at >= 60 * self._minutes
        )
        notice = self._preempted is not None and self._preempted()
        return summed([late or notice], self._place.device, self._place.world_size)[0] > 0


class Stop:
    """Whether the run is to end after this step. stopping: asked on every rank, one yes is enough;
    None never stops. State: the step and the time of the last look, the step of the next one.
    """

    def __init__(self, stopping: Callable[[], bool] | None, place: Place) -> None:
        self._stopping, self._place = stopping, place
        self._last: tuple[int, float] | None = None
        self._next = 0

    def now(self, step: int) -> bool:
        """The same answer on all ranks; they must all ask after the same steps."""
        if self._stopping is None or step < self._next:
            return False
        now, every = time.monotonic(), 1
        if self._last is not None:
            seconds = (now - self._last[1]) / (step - self._last[0])
            every = min(_MOST_STEPS, max(1, int(_LOOK_SECONDS / max(seconds, 1e-9))))
        self._last = step, now
        mine = [self._stopping(), every if self._place.rank == 0 else 0]
        stop, every = summed(mine, self._place.device, self._place.world_size)
        self._next = step + every  # by rank 0's pace
        return stop > 0


def summed(values: list[int], device: torch.device, world_size: int) -> list[int]:
    """Each of `values` summed over all ranks, which must all ask for as many."""
    if world_size == 1:
        return values
    sums = torch.tensor(values, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(sums)
    return [int(value) for value in sums.tolist()]
