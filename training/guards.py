"""What ends, questions or interrupts a run: losses and weights that are broken, a request to stop;
and when a checkpoint is due besides those of the steps and epochs."""

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from training.config import TrainConfig
from training.meter import Reading
from training.order import Ids
from training.steps import Place, summed

_FLAT_SHARE = 0.99  # of ln(num_classes), the loss of guessing: nothing was learned
_USEFUL_UTILIZATION = 0.9  # what MLPerf Storage asks for from the image models
# Seconds between two meetings of the ranks, which slow steps must not delay, and steps at most.
_LOOK_SECONDS, _MOST_STEPS = 1.0, 100
_NOTICE_SECONDS = 10.0  # between two looks for a notice that the machine will be taken away


class TrainingStopped(Exception):
    """The run cannot become a model; the text says at which step, why and what to try."""


def check_losses(
    reading: Reading,
    lowest: float,
    *,
    step: int,
    config: TrainConfig,
    num_classes: int,
    ids_of: Callable[[int], Ids],
) -> float:
    """The lowest mean loss of any reading so far; `lowest` is that of the readings before.

    step: how many the run has done, the last of the reading included. ids_of: the sample ids of the
    global batch of a step, counted from 1 here. Raises TrainingStopped for a loss or gradient that
    is not finite, with the first such step, and for a loss that never fell below that of guessing.
    """
    first = step - len(reading.losses) + 1
    rows = zip(reading.losses, reading.grad_norms, strict=True)
    for number, (loss, norm) in enumerate(rows, first):
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise TrainingStopped(
                    f"{what} is {value} at step {number} ({_named(ids_of(number))}); train again "
                    f"under another --name with a lower --optim.lr (now {config.optim.lr}) or "
                    "--precision fp32"
                )
    lowest = min(lowest, reading.metrics["loss"])
    guessing = math.log(num_classes)
    patience = 0 if config.synthetic else config.flat_loss_steps  # random labels teach nothing
    if patience and step >= patience and lowest > _FLAT_SHARE * guessing:
        raise TrainingStopped(
            f"loss never fell below {lowest:.3f} in {step} steps, guessing gives {guessing:.3f} "
            f"(last: {_named(ids_of(step))}); try --model.init he, another --optim.lr, or wait "
            f"longer with --flat-loss-steps {2 * patience}"
        )
    return lowest


def check_weights(model: nn.Module, step: int, config: TrainConfig) -> None:
    """Raises TrainingStopped for weights that are not finite: they must not be saved, since nothing
    that goes on from them can learn."""
    norm = torch.nn.utils.get_total_norm([weight.detach() for weight in model.parameters()])
    if not math.isfinite(float(norm)):
        raise TrainingStopped(
            f"weights are not finite after step {step}; train again under another --name with a "
            f"lower --optim.lr (now {config.optim.lr})"
        )


def starved(metrics: Mapping[str, float], loader: Mapping[str, float]) -> str | None:
    """Why the accelerator does not compute for 90 % of the time, and what may help; None where it
    does or has not been measured.

    loader: seconds in the same steps, "wait" of the loop for its batches, "read" and "decode" of
    all its threads.
    """
    utilization = metrics.get("utilization", 1.0)
    if utilization >= _USEFUL_UTILIZATION:
        return None
    wait, copy = metrics["data_wait"], metrics["data_copy"]
    between_kernels = wait + copy < 0.5 * (1 - utilization)
    if copy > wait and not between_kernels:
        cause = "copying images to the device, over a slow bus"
    elif between_kernels or loader["wait"] < 0.5 * wait * metrics["seconds"]:
        cause = "the loop itself, not its data; try a larger --optim.batch-size"
    elif loader["read"] > loader["decode"]:
        cause = "the store; try shards on a local disk or a larger --cache-gb"
    else:
        cause = "decoding; try --cache decoded, or a higher --cpus-per-worker"
    return (
        f"the accelerator computes for {utilization:.0%} of the time (90 % is usual) and waits "
        f"for {cause}"
    )


class Requests:
    """What is wanted from outside after a step: to end, or to save. About once a second the ranks
    meet for it, in one reduction.

    minutes: since the last checkpoint, by rank 0's clock; None for never. stopping, preempted:
    asked on every rank, of which one yes is enough: the first at each meeting, the second, which
    may be a meeting of its own, in about every tenth second.
    """

    def __init__(
        self,
        minutes: float | None,
        place: Place,
        *,
        stopping: Callable[[], bool] | None = None,
        preempted: Callable[[], bool] | None = None,
    ) -> None:
        self._patience = math.inf if minutes is None else 60 * minutes
        self._place, self._stopping, self._preempted = place, stopping, preempted
        self._last: tuple[int, float] | None = None  # step and time of the last meeting
        self._next = 0  # the step of the next one, in which `_asks` for notices
        self._asks, self._asked_at = False, time.monotonic()
        self.saved()

    def saved(self) -> None:
        self._saved_at = time.monotonic()

    def made(self, step: int) -> tuple[bool, bool]:
        """Whether to end after this step, and whether to save. The same answer on all ranks; they
        must all ask after the same steps."""
        if step < self._next:
            return False, False
        now, every = time.monotonic(), 1
        if self._last is not None:
            seconds = (now - self._last[1]) / (step - self._last[0])
            every = min(_MOST_STEPS, max(1, int(_LOOK_SECONDS / max(seconds, 1e-9))))
        self._last = step, now
        stop = self._stopping is not None and self._stopping()
        save = self._is_late()
        if self._asks:
            self._asked_at = now
            save |= self._preempted is not None and self._preempted()
        # When they meet again, and what for, is by rank 0's pace and clock.
        first = self._place.rank == 0
        asks = first and now - self._asked_at >= _NOTICE_SECONDS
        votes = self._summed([stop, save, every if first else 0, asks])
        self._next, self._asks = step + votes[2], votes[3] > 0
        return votes[0] > 0, votes[1] > 0

    def late(self) -> bool:
        """Whether a checkpoint is due by the clock. The same answer on all ranks, which must all
        ask."""
        return self._summed([self._is_late()])[0] > 0

    def _is_late(self) -> bool:
        return self._place.rank == 0 and time.monotonic() - self._saved_at >= self._patience

    def _summed(self, votes: list[int]) -> list[int]:
        return summed(votes, self._place.device, self._place.world_size)


def _named(ids: Ids) -> str:
    names = ", ".join(map(str, ids[:8].tolist()))
    rest = ", …" if len(ids) > 8 else ""
    return f"batch of {len(ids)} samples, ids {names}{rest}"
