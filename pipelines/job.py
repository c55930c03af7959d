"""What the driver of a build and its tasks tell each other.

Without torch, which only the tasks need, and which takes longer to import than all the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from PIL import features

from pipelines import storage
from pipelines.plan import Orientation


@dataclass(frozen=True)
class Job:
    """What every task of a build needs besides the shard that it makes."""

    raw: str
    out: str
    plan_id: str
    resize: int  # of the picture as it lies in RAW
    crop: int
    quality: int
    exif_orientation: Orientation
    keep: bool  # a stored picture that needs no change
    versions: dict[str, str]  # codec_versions() of the driver
    archives: dict[str, str]  # storage.version of each, before its members were looked for


@dataclass(frozen=True)
class Made:
    """How the making of a shard went; what it holds is in its sidecar."""

    samples: int
    rejected: list[dict[str, Any]]
    read_bytes: int
    stored_bytes: int
    wait_seconds: float  # for the raw pictures
    work_seconds: float  # in all, waiting included


def quarantine_uri(out: str, split: str, key: str) -> str:
    return storage.join(out, "quarantine", split, f"{key}.bin")


def codec_versions() -> dict[str, str]:
    """Of everything that has a say in the bytes of a stored picture."""
    return {
        "libjpeg_turbo": str(features.version_feature("libjpeg_turbo")),
        "pillow": version("pillow"),
        "simplejpeg": version("simplejpeg"),
        "torch": version("torch").partition("+")[0],
    }
