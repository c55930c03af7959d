"""How far a training is: what a checkpoint says beside the tensors, as plain JSON."""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.order import Ids


@dataclass
class Position:
    """step: how many are done. lowest_loss: of all log lines. metrics: of the last evaluation,
    after `evaluated_step`; val_errors: 1 - top-1 of each epoch. samples: see `extended`."""

    step: int = 0
    lowest_loss: float = math.inf
    metrics: dict[str, float] = field(default_factory=dict)
    evaluated_step: int = 0
    val_errors: list[float] = field(default_factory=list)
    samples: str = ""

    def to_json(self) -> dict[str, Any]:
        return vars(self).copy()

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Position":
        return cls(**{name: document[name] for name in cls.__dataclass_fields__})


def extended(samples: str, step: int, ids: Ids) -> str:
    """The running digest of which samples were learned from, after step `step` (from 0) with the
    global batch `ids`: sha256 in hex of the digest before and the step and sorted ids as int64.

    The same for every number of workers, and with any kills and resumptions in between.
    """
    position = np.concatenate([[step], np.sort(ids)]).astype("<i8")
    return hashlib.sha256(bytes.fromhex(samples) + position.tobytes()).hexdigest()


def as_number(samples: str) -> float:
    """The first 48 bits of a digest, which a float holds exactly: for metrics."""
    return float(int(samples[:12], 16))
