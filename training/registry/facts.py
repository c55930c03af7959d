"""What a model card states: each a fact that was recorded, or None where nobody measured it."""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

from pipelines.shards import Manifest
from training.accuracy import Interval, Metrics, wilson
from training.registry.verdict import Check

_WNID = re.compile(r"n\d{8}")
_IMAGENET_TERMS = (
    "ImageNet gives access to its pictures for non-commercial research and education only, and "
    "owns none of them: their rights stay with the photographers (https://image-net.org/download)"
)


@dataclass(frozen=True)
class Accuracy:
    """Of the centre view of every picture of the val split, each once; loss in nats."""

    images: int
    correct1: int
    correct5: int
    loss: float

    @classmethod
    def of(cls, metrics: Metrics) -> "Accuracy":
        return cls(metrics.images, metrics.correct1, metrics.correct5, metrics.loss)

    @property
    def top1_interval(self) -> Interval:
        return wilson(self.correct1, self.images)

    @property
    def top5_interval(self) -> Interval:
        return wilson(self.correct5, self.images)


@dataclass(frozen=True)
class Example:
    """A picture of the val split and the likeliest classes with their probabilities (0..1)."""

    key: str
    true: str
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Facts:
    """Names of classes are those of the manifest; throughput: median images/s over the logged
    steps, all workers together; hours: from the run's start to its last metric, with its pauses."""

    run: str
    run_id: str
    recipe: str
    variant: str
    parameters: int
    width: float
    batch_norm: bool
    class_names: tuple[str, ...]
    geometry: str
    manifest_sha256: str
    plan_id: str
    data: str
    train: int
    val: int
    licence: str
    training: tuple[tuple[str, str], ...]
    differences: tuple[str, ...]
    commit: str | None
    code_sha256: str | None
    hardware: str | None
    throughput: float | None
    hours: float | None
    accuracy: Accuracy | None = None
    recomputed: bool = False  # the accuracy is the gate's, not the training's
    examples: tuple[Example, ...] | None = None
    pairs: tuple[tuple[str, str, int], ...] | None = None  # true, predicted, pictures
    verdict: str | None = None
    checks: tuple[Check, ...] = ()
    registry: str | None = None  # where it lies: MLflow's URI

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Facts":
        document: dict[str, Any] = json.loads(text)
        examples, pairs = document["examples"], document["pairs"]
        accuracy = document["accuracy"]
        document |= {
            "class_names": tuple(document["class_names"]),
            "training": tuple((name, value) for name, value in document["training"]),
            "differences": tuple(document["differences"]),
            "accuracy": None if accuracy is None else Accuracy(**accuracy),
            "examples": None if examples is None else tuple(map(_example, examples)),
            "pairs": None if pairs is None else tuple((a, b, n) for a, b, n in pairs),
            "checks": tuple(Check(**check) for check in document["checks"]),
        }
        return cls(**document)


def licence(manifest: Manifest) -> str:
    """What is known of the terms: the official archives are recognised when shards are built;
    of any other set the manifest does not record where its pictures come from."""
    if manifest.document.get("official"):
        return f"The official ILSVRC archives. {_IMAGENET_TERMS}."
    unknown = "The terms of this set's pictures are not recorded"
    if all(_WNID.fullmatch(wnid) for wnid in manifest.wnids):
        named = "The ids of its classes look like ImageNet's; if it is from there"
        return f"{unknown}. {named}: {_IMAGENET_TERMS}."
    return f"{unknown}; ask who made it."


def _example(document: dict[str, Any]) -> Example:
    likeliest = tuple((name, probability) for name, probability in document["likeliest"])
    return Example(document["key"], document["true"], likeliest)
