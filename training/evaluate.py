"""Accuracy that counts every picture exactly once, over any number of ranks.

python -m training.evaluate MODEL --data OUT        (see evaluate_command.py)
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

if __name__ == "__main__":
    from pipelines import command

    command.begin()

import numpy as np
import torch

from alexnet.errors import UserError
from alexnet.preprocess import InputSpec, average_probabilities, centre_view, ten_crop
from training.loader import Loader
from training.order import Ids, rank_part
from training.steps import summed

# centre: the middle 227×227. ten_crop: four corners, the centre and their mirror images, with their
# probabilities averaged, as in section 4.1 of the paper.
Protocol = Literal["centre", "ten_crop"]
VIEWS: dict[Protocol, int] = {"centre": 1, "ten_crop": 10}

Network = Callable[[torch.Tensor], torch.Tensor]
Interval = tuple[float, float]


class Stopped(Exception):
    """The evaluation was given up because somebody asked for it."""


@dataclass(frozen=True)
class Metrics:
    """Over `images` pictures: shares in 0..1, the mean cross-entropy in nats, and how many were
    right in first place and among the first five."""

    images: int
    top1: float
    top5: float
    loss: float
    correct1: int
    correct5: int

    @property
    def top1_interval(self) -> Interval:
        return wilson(self.correct1, self.images)

    @property
    def top5_interval(self) -> Interval:
        return wilson(self.correct5, self.images)


def evaluate(
    network: Network,
    loader: Loader,
    spec: InputSpec,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 256,
    protocol: Protocol = "centre",
    stopping: Callable[[], bool] | None = None,
) -> Metrics:
    """Accuracy on all of the loader's split of `network`, which maps float32 (B,3,227,227) to
    logits (B, classes) and is in evaluation mode already. batch_size: views at a time.

    Each rank takes every W-th sample; counts are summed as integers, so the result does not depend
    on W. With fewer than five classes top5 counts all of them. Asserts that all ranks together saw
    each of the manifest's pictures exactly once. Raises as `scores`, and Stopped on all ranks when
    `stopping()`, asked before each batch, said yes on any of them.
    """
    count = Count(loader.num_samples, device)
    for batch in scores(
        network,
        loader,
        spec,
        device=device,
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        protocol=protocol,
    ):
        if stopping is not None and stopping():
            break
        count.add(batch)
    if stopping is not None and summed([stopping()], device, world_size)[0]:
        raise Stopped
    return count.metrics(world_size)


@dataclass(frozen=True)
class Scores:
    """What the network says of one batch: log_probabilities float32 (B, classes) and labels int64
    (B,) on the device, sample_ids int64 (B,) on the CPU."""

    log_probabilities: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor


def scores(
    network: Network,
    loader: Loader,
    spec: InputSpec,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 256,
    protocol: Protocol = "centre",
    sample_ids: Ids | None = None,
) -> Iterator[Scores]:
    """This rank's part of the split, or of `sample_ids`, int64 (N,), each sample once.

    Raises UserError for an empty split, for pictures without a label (a test split has −1), and for
    ten-crop on pictures stored at 227×227.
    """
    if loader.num_samples == 0:
        raise UserError("the split has no pictures to evaluate; choose another --split")
    whole = np.arange(loader.num_samples) if sample_ids is None else sample_ids
    ids = rank_part(whole, rank, world_size)
    pictures = max(1, batch_size // VIEWS[protocol])
    parts = [ids[i : i + pictures] for i in range(0, len(ids), pictures)]
    pin = device.type == "cuda"
    with contextlib.closing(loader.batches(parts, pin=pin)) as batches:
        for batch in batches:
            images = batch.images.to(device, non_blocking=True)
            log_probabilities = _log_probabilities(network, images, spec, protocol)
            _check_labels(batch.labels, log_probabilities.shape[1])
            labels = batch.labels.to(device, non_blocking=True)
            yield Scores(log_probabilities, labels, batch.sample_ids.cpu())


@torch.inference_mode()
def _log_probabilities(
    network: Network, images: torch.Tensor, spec: InputSpec, protocol: Protocol
) -> torch.Tensor:
    if protocol == "centre":
        return network(centre_view(images, spec)).float().log_softmax(1)
    views = ten_crop(images, spec)
    logits = network(views.flatten(0, 1)).reshape(*views.shape[:2], -1)
    # All ten can be 0 in float32; the logarithm of its smallest number, -87, stands for that.
    return average_probabilities(logits).clamp_min(torch.finfo(torch.float32).tiny).log()


def _check_labels(labels: torch.Tensor, classes: int) -> None:
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise UserError(
            f"the split has pictures without a label (label {lowest}), whose accuracy nobody can "
            "count; choose a labelled --split such as val"
        )
    if highest >= classes:
        raise UserError(
            f"label {highest} is beyond the network's {classes} classes; evaluate it on the data "
            "set that it was trained on"
        )


class Count:
    """What has been right so far on this rank; kept on the device, so that nothing waits for it."""

    def __init__(self, num_samples: int, device: torch.device) -> None:
        self._seen = torch.zeros(num_samples, dtype=torch.int32, device=device)
        self._correct = torch.zeros(2, dtype=torch.int64, device=device)
        self._loss = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, batch: Scores) -> None:
        ids = batch.sample_ids.to(self._seen.device)
        self._seen.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        place = places(batch)
        self._correct += torch.stack([(place < 1).sum(), (place < 5).sum()])
        self._loss -= batch.log_probabilities.gather(1, batch.labels[:, None]).double().sum()

    def metrics(self, world_size: int) -> Metrics:
        """Of all ranks together; each of them must call it."""
        if world_size > 1:
            for tensor in (self._seen, self._correct, self._loss):
                torch.distributed.all_reduce(tensor)
        images, correct = int((self._seen == 1).sum()), self._correct.tolist()
        assert images == len(self._seen), f"evaluated {images} of {len(self._seen)} pictures once"
        loss = float(self._loss) / images
        return Metrics(images, correct[0] / images, correct[1] / images, loss, *correct)


def places(batch: Scores) -> torch.Tensor:
    """int64 (B,): how many classes stand before the true one. Of equals the lower label is first,
    as in argmax, so that ties fall alike on every device; NaN is behind all."""
    own = batch.log_probabilities.gather(1, batch.labels[:, None])
    classes = torch.arange(batch.log_probabilities.shape[1], device=own.device)
    ties = (batch.log_probabilities == own) & (classes < batch.labels[:, None])
    place = ((batch.log_probabilities > own) | ties).sum(1)
    return place.masked_fill(own[:, 0].isnan(), torch.iinfo(torch.int64).max)


def wilson(correct: int, images: int, confidence: float = 0.95) -> Interval:
    """The shares in 0..1 that `correct` of `images` does not contradict (Wilson 1927): honest also
    near 0 and 1, where the usual p ± 1.96·σ leaves 0..1. (0, 1) when there are no images."""
    if images == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, shrink = correct / images, 1 + z**2 / images
    centre = (share + z**2 / (2 * images)) / shrink
    half = z / shrink * (share * (1 - share) / images + z**2 / (4 * images**2)) ** 0.5
    low = 0.0 if correct == 0 else centre - half  # exactly, where rounding leaves 1e-18
    high = 1.0 if correct == images else centre + half
    return low, high


if __name__ == "__main__":
    # Imported by name: the module that runs as __main__ is not the training.evaluate of the others.
    from training.evaluate_command import main

    command.leave(main)
