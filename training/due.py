"""When a checkpoint is due besides those of the steps and epochs: by the clock, or by a notice."""

import time
from collections.abc import Callable

import torch

from training.steps import Place

# Steps between two looks: every rank meets the others for the answer.
ASK_STEPS = 20


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
        if self._place.world_size == 1:
            return late or notice
        votes = torch.tensor([float(late or notice)], device=self._place.device)
        torch.distributed.all_reduce(votes)
        return bool(votes.item() > 0)
