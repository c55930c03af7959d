"""What ILSVRC2012_devkit_t12.tar.gz says: classes, their names and sizes, labels of val."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from alexnet.errors import UserError
from pipelines import storage

NAME = "ILSVRC2012_devkit_t12.tar.gz"
_META = "meta.mat"
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_MAX_MEMBER = 64 << 20  # bytes; the real meta.mat has under 2 MB


@dataclass(frozen=True)
class Devkit:
    wnids: tuple[str, ...]  # of the leaves, sorted: the position is the label
    words: dict[str, str]
    train_images: dict[str, int]  # announced, per WNID
    val_wnids: tuple[str, ...]  # entry k belongs to ILSVRC2012_val_{k + 1:08d}


def load(uri: str) -> Devkit:
    """Members are read in memory, by base name: no path of the archive touches the disk.

    Raises UserError when it is damaged, lacks a file, or its files contradict each other.
    """
    files = _read_members(uri)
    synsets = _synsets(uri, files[_META])
    wnid_of_id = {row["ILSVRC2012_ID"]: row["WNID"] for row in synsets}
    if sorted(wnid_of_id) != list(range(1, len(synsets) + 1)):
        raise UserError(f"{uri}: leaf ILSVRC2012_IDs are not 1 to {len(synsets)}, each once")
    if len(set(wnid_of_id.values())) != len(synsets):
        raise UserError(f"{uri}: a WNID appears twice in {_META}")
    return Devkit(
        wnids=tuple(sorted(wnid_of_id.values())),
        words={row["WNID"]: row["words"] for row in synsets},
        train_images={row["WNID"]: row["num_train_images"] for row in synsets},
        val_wnids=_val_wnids(uri, files[_GROUND_TRUTH], wnid_of_id),
    )


def _read_members(uri: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(storage.read(uri)), mode="r:gz") as tar:
            for info in tar:
                name = info.name.rsplit("/", 1)[-1]
                if info.isreg() and name in (_META, _GROUND_TRUTH) and info.size <= _MAX_MEMBER:
                    file = tar.extractfile(info)
                    assert file is not None  # a regular member always has data
                    files[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{uri} is damaged ({error}); fetch it again") from error
    for name in (_META, _GROUND_TRUTH):
        if name not in files:
            raise UserError(f"{uri} holds no {name}; fetch it again")
    return files


def _synsets(uri: str, meta: bytes) -> list[dict[str, Any]]:
    """The leaves: rows without children, whose IDs are 1 to their number."""
    from scipy.io import loadmat  # half a second to import, for this one file

    try:
        table = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        rows = [
            {
                "ILSVRC2012_ID": int(row["ILSVRC2012_ID"]),
                "WNID": str(row["WNID"]),
                "words": str(row["words"]),
                "num_train_images": int(row["num_train_images"]),
            }
            for row in np.atleast_1d(table)
            if int(row["num_children"]) == 0
        ]
    except Exception as error:  # scipy raises nearly anything for a damaged file
        raise UserError(f"{uri}: {_META} is damaged ({error}); fetch it again") from error
    if not rows:
        raise UserError(f"{uri}: {_META} lists no class")
    return rows


def _val_wnids(uri: str, text: bytes, wnid_of_id: dict[int, str]) -> tuple[str, ...]:
    wnids = []
    for number, line in enumerate(text.decode("ascii", "replace").split(), start=1):
        wnid = wnid_of_id.get(int(line)) if line.isdecimal() else None
        if wnid is None:
            raise UserError(
                f"{uri}: line {number} of {_GROUND_TRUTH} is {line!r}, not an ILSVRC2012_ID "
                f"from 1 to {len(wnid_of_id)}"
            )
        wnids.append(wnid)
    return tuple(wnids)
