"""What the answers of a network on a split amount to: shares with intervals, by class, by pair."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.shards import Manifest

Interval = tuple[float, float]

Z95 = NormalDist().inv_cdf(0.975)  # half the length of a 95 % interval, in standard deviations

_ERRORS = 24  # of the most confident
_PAIRS = 20
_NAME_LENGTH = 20


@dataclass(frozen=True)
class Metrics:
    """Over `images` images: shares in 0..1, the mean cross-entropy in nats, and how many were right
    in first place and among the first five."""

    images: int
    top1: float
    top5: float
    loss: float
    correct1: int
    correct5: int

    @staticmethod
    def of(images: int, correct: list[int], loss: float) -> Metrics:
        """correct: in first place, among the first five; loss: the sum over all images."""
        return Metrics(images, correct[0] / images, correct[1] / images, loss / images, *correct)

    @property
    def top1_interval(self) -> Interval:
        return wilson(self.correct1, self.images)

    @property
    def top5_interval(self) -> Interval:
        return wilson(self.correct5, self.images)


@dataclass(frozen=True)
class Scored:
    """What a network says of every image of a split, in the order of sample ids.

    labels, place: int32 (N,), where place says how many classes stand before the true one; loss:
    float64 (N,), nats; top: int32 (N, 5), the likeliest classes, all where there are fewer, of
    equals the lower label first; probabilities: float32 (N, 5), theirs.
    """

    keys: tuple[str, ...]
    num_classes: int
    labels: NDArray[np.int32]
    place: NDArray[np.int32]
    loss: NDArray[np.float64]
    top: NDArray[np.int32]
    probabilities: NDArray[np.float32]

    @property
    def predicted(self) -> NDArray[np.int32]:
        likeliest: NDArray[np.int32] = self.top[:, 0]
        return likeliest

    @property
    def correct(self) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.place == 0
        return right

    @property
    def metrics(self) -> Metrics:
        counts = [int((self.place < most).sum()) for most in (1, 5)]
        return Metrics.of(len(self.labels), counts, float(self.loss.sum()))

    @property
    def confusion(self) -> NDArray[np.int64]:
        """(classes, classes): row label, column predicted."""
        cells = self.labels.astype(np.int64) * self.num_classes + self.predicted
        counted = np.bincount(cells, minlength=self.num_classes**2).astype(np.int64)
        return counted.reshape(self.num_classes, self.num_classes)

    def most_confident_errors(self, keep: int) -> NDArray[np.int64]:
        """Sample ids (≤ keep,): by probability at six decimals, then by id, so that rounding does
        not decide which of equals are kept."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        sure = self.probabilities[wrong, 0].astype(np.float64).round(6)
        chosen: NDArray[np.int64] = wrong[np.lexsort((wrong, -sure))][:keep]
        return chosen

    def table(self, model: str, manifest: Manifest) -> pa.Table:
        """A row for each image; label, predicted and top5 are ranks in the manifest's classes. The
        table's metadata say what it is of."""
        columns: dict[str, Any] = {
            "key": pa.array(self.keys),
            "label": self.labels,
            "wnid": np.array(manifest.wnids)[self.labels],
            "predicted": self.predicted,
            "top5": pa.array(list(self.top)),
            "probabilities": pa.array(list(self.probabilities)),  # of these, 0..1
            "correct": self.correct,
            "place": self.place,
            "loss": self.loss,
        }
        about = {"model": model, "manifest_sha256": manifest.digest}
        return pa.table(columns).replace_schema_metadata(about)


def document(scored: Scored, manifest: Manifest) -> dict[str, Any]:
    """Of evaluation.json: metrics, classes, pairs and mistakes by name, and the confusion matrix as
    [label, predicted, images] of every cell off the diagonal that is not 0."""
    names, metrics, confusion = manifest.class_names, scored.metrics, scored.confusion
    wrong = confusion - np.diag(confusion.diagonal())
    pairs = [[*cell, int(wrong[tuple(cell)])] for cell in np.argwhere(wrong).tolist()]
    pairs.sort(key=lambda pair: (-pair[2], pair[0], pair[1]))  # of equals the lower label first
    top1 = (metrics.correct1, metrics.top1, list(metrics.top1_interval))
    top5 = (metrics.correct5, metrics.top5, list(metrics.top5_interval))
    share = ("correct", "share", "wilson95")
    return {
        "images": metrics.images,
        "top1": dict(zip(share, top1, strict=True)),
        "top5": dict(zip(share, top5, strict=True)),
        "loss": metrics.loss,
        "classes": [_class_row(label, confusion, manifest) for label in range(len(names))],
        "confused_pairs": [
            {"true": names[a], "predicted": names[b], "images": n} for a, b, n in pairs[:_PAIRS]
        ],
        "mistakes": [
            {
                "key": scored.keys[i],
                "sample_id": i,
                "true": names[scored.labels[i]],
                "predicted": names[scored.predicted[i]],
                "probability": round(float(scored.probabilities[i, 0]), 6),
            }
            for i in scored.most_confident_errors(_ERRORS).tolist()
        ],
        "confusion": pairs,
    }


def _class_row(label: int, confusion: NDArray[np.int64], manifest: Manifest) -> dict[str, Any]:
    images, correct = int(confusion[label].sum()), int(confusion[label, label])
    wrong = np.where(np.arange(len(confusion)) == label, 0, confusion[label])
    low, high = wilson(correct, images)
    return {
        "label": label,
        "wnid": manifest.wnids[label],
        "name": manifest.class_names[label],
        "images": images,
        "correct": correct,
        "top1": correct / images if images else None,
        "low": low,
        "high": high,
        "taken_for": manifest.class_names[wrong.argmax()] if wrong.any() else None,
    }


def short(name: str) -> str:
    """The first of a class's synonyms, cut to what fits: "tench" of "tench, Tinca tinca"."""
    first = name.split(",")[0]
    return first if len(first) <= _NAME_LENGTH else f"{first[: _NAME_LENGTH - 1]}…"


def wilson(correct: int, images: int) -> Interval:
    """The shares in 0..1 that `correct` of `images` does not contradict at 95 % (Wilson 1927):
    honest also near 0 and 1, where the usual p ± 1.96·σ leaves 0..1. (0, 1) without images."""
    if images == 0:
        return 0.0, 1.0
    share, shrink = correct / images, 1 + Z95**2 / images
    centre = (share + Z95**2 / (2 * images)) / shrink
    half = Z95 / shrink * (share * (1 - share) / images + Z95**2 / (4 * images**2)) ** 0.5
    low = 0.0 if correct == 0 else centre - half  # exactly, where rounding leaves 1e-18
    high = 1.0 if correct == images else centre + half
    return low, high
