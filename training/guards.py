"""What ends or questions a run early: a loss that is broken or flat, weights that are, no data."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from training.config import TrainConfig
from training.meter import Reading
from training.order import Ids

# Share of ln(num_classes), the loss of guessing, that counts as having learned nothing.
_FLAT_SHARE = 0.99
# MLPerf Storage asks for 90 % from the image models.
_USEFUL_UTILIZATION = 0.9
_NAMED_IDS = 8


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
    for number, (loss, norm) in enumerate(
        zip(reading.losses, reading.grad_norms, strict=True), first
    ):
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
    if metrics["data_copy"] > metrics["data_wait"]:
        cause = "copying images to the device, over a slow bus"
    elif loader["wait"] < 0.5 * metrics["data_wait"] * metrics["seconds"]:
        cause = "the loop itself, not its data; try a larger --optim.batch-size"
    elif loader["read"] > loader["decode"]:
        cause = "the store; try shards on a local disk or a larger --cache-gb"
    else:
        cause = "decoding; try a higher --cpus-per-worker"
    return (
        f"the accelerator computes for {utilization:.0%} of the time (90 % is usual) and waits "
        f"for {cause}"
    )


def _named(ids: Ids) -> str:
    names = ", ".join(map(str, ids[:_NAMED_IDS].tolist()))
    rest = ", …" if len(ids) > _NAMED_IDS else ""
    return f"batch of {len(ids)} samples, ids {names}{rest}"
