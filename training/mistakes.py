"""What a network gets wrong: by class, by pair of classes, and with the most confidence."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet.preprocess import InputSpec
from training.evaluate import Count, Interval, Metrics, Network, Protocol, Scores, scores, wilson
from training.loader import Loader

_MILLION = 1_000_000


@dataclass(frozen=True)
class Mistake:
    """A picture whose likeliest class, with `probability` (six decimals), is not its label."""

    sample_id: int
    label: int
    predicted: int
    probability: float


@dataclass(frozen=True)
class Examination:
    """metrics as `evaluate` gives them; confusion: int64 (classes, classes), row label, column
    predicted; mistakes: the most confident ones first."""

    metrics: Metrics
    confusion: NDArray[np.int64]
    mistakes: tuple[Mistake, ...]


def examine(
    network: Network,
    loader: Loader,
    spec: InputSpec,
    *,
    num_classes: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 256,
    protocol: Protocol = "centre",
    keep: int = 24,
) -> Examination:
    """`evaluate` with the particulars, in one pass; every rank returns those of all ranks.

    Mistakes are ordered by probability at six decimals, then sample id: neither W nor the order of
    reading decides which `keep` of them are kept. Raises as `evaluate`."""
    count = Count(loader.num_samples, device)
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
    worst = torch.empty((0, 4), dtype=torch.int64)
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
        count.add(batch)
        cells = batch.labels * num_classes + batch.log_probabilities.argmax(1)
        confusion.index_add_(0, cells, torch.ones_like(cells))
        worst = _most_confident(torch.cat([worst, _mistakes(batch)]), keep)
    if world_size > 1:
        torch.distributed.all_reduce(confusion)
        worst = _most_confident(_of_all_ranks(worst, keep, world_size, device), keep)
    mistakes = tuple(Mistake(i, label, said, p / _MILLION) for p, i, label, said in worst.tolist())
    matrix = confusion.reshape(num_classes, num_classes)
    return Examination(count.metrics(world_size), matrix.cpu().numpy(), mistakes)


def _mistakes(batch: Scores) -> torch.Tensor:
    """int64 (M, 4) on the CPU: probability in millionths, sample id, label, predicted class."""
    best, predicted = batch.log_probabilities.amax(1), batch.log_probabilities.argmax(1)
    # A network that says NaN is confident of nothing.
    millionths = (best.double().exp() * _MILLION).round().nan_to_num(0).long()
    rows = torch.stack([millionths, batch.labels, predicted], dim=1).cpu()
    rows = torch.cat([rows[:, :1], batch.sample_ids[:, None], rows[:, 1:]], dim=1)
    return rows[rows[:, 2] != rows[:, 3]]


def _most_confident(rows: torch.Tensor, keep: int) -> torch.Tensor:
    by_id = rows[rows[:, 1].argsort()]
    return by_id[by_id[:, 0].argsort(descending=True, stable=True)][:keep]


def _of_all_ranks(
    rows: torch.Tensor, keep: int, world_size: int, device: torch.device
) -> torch.Tensor:
    padded = torch.full((keep, 4), -1, dtype=torch.int64)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded, device=device) for _ in range(world_size)]
    torch.distributed.all_gather(parts, padded.to(device))
    together = torch.cat(parts).cpu()
    return together[together[:, 0] >= 0]


@dataclass(frozen=True)
class ClassAccuracy:
    """Of one class: pictures with that label, how many are right, the 95 % Wilson interval of their
    share, and the class they are taken for most often (None where all are right)."""

    label: int
    images: int
    correct: int
    interval: Interval
    taken_for: int | None

    @property
    def top1(self) -> float | None:
        """None where the split has no picture of the class."""
        return self.correct / self.images if self.images else None


def by_class(confusion: NDArray[np.int64]) -> list[ClassAccuracy]:
    """One for each class, in label order."""
    found = []
    for label, row in enumerate(confusion.tolist()):
        images, correct = sum(row), row[label]
        row[label] = 0
        taken_for = row.index(max(row)) if images > correct else None
        found.append(ClassAccuracy(label, images, correct, wilson(correct, images), taken_for))
    return found


def confused_pairs(confusion: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(label, predicted, pictures) of every pair that was confused; the most frequent first, of
    equals the lower label."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    pairs = [(int(a), int(b), int(wrong[a, b])) for a, b in np.argwhere(wrong)]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))
