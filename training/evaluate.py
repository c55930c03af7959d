"""Accuracy that counts every picture exactly once, over any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from alexnet.preprocess import InputSpec, centre_view
from training.loader import Loader
from training.order import rank_part


@dataclass(frozen=True)
class Metrics:
    """Over `images` pictures, centre view: shares in 0..1 and the mean cross-entropy in nats."""

    images: int
    top1: float
    top5: float
    loss: float


def evaluate(
    network: Callable[[torch.Tensor], torch.Tensor],
    loader: Loader,
    spec: InputSpec,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 256,
) -> Metrics:
    """Centre-view accuracy on all of the loader's split of `network`, which maps float32
    (B,3,227,227) to logits (B, classes) and is in evaluation mode already.

    Each rank takes every W-th sample; counts are summed as integers, so the result does not depend
    on W. With fewer than five classes top5 counts all of them. Asserts that the counts add up to
    the manifest's number.
    """
    ids = rank_part(np.arange(loader.num_samples), rank, world_size)
    batches = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    loss_sum = torch.zeros(1, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for batch in loader.batches(batches):
            labels = batch.labels.to(device)
            logits = network(centre_view(batch.images.to(device), spec)).float()
            loss_sum += nn.functional.cross_entropy(logits, labels, reduction="none").double().sum()
            counts += _count(logits, labels)
    if world_size > 1:
        torch.distributed.all_reduce(counts)
        torch.distributed.all_reduce(loss_sum)
    images, correct1, correct5 = counts.tolist()
    assert images == loader.num_samples, f"evaluated {images} of {loader.num_samples} pictures"
    return Metrics(images, correct1 / images, correct5 / images, float(loss_sum) / images)


def _count(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(images, correct in first place, correct in first five) of a batch: int64 (3,)."""
    first = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    images = torch.tensor(len(labels), device=logits.device)
    return torch.stack([images, first[:, 0].sum(), first.sum()])
