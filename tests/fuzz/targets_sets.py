"""The files of a shard set as they are read again: by builders, by `status` and by the training.

Each target gets one file; the others are those of a small good set, beside this process's cases.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from refused import Refused

from pipelines import finish, plan_files, shards, storage
from pipelines.inspect import status, status_text
from training.loader import Samples
from training.shard_files import ShardFiles

_NAME = re.compile(r"(train|val|test)-[0-9]{6}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


def manifest(data: bytes, folder: Path) -> None:
    """What is accepted has the types and limits that everybody relies on."""
    out = _set_with(folder, "manifest.json", data)
    found = shards.load_manifest(out)
    for shard in found.shards:
        assert _NAME.fullmatch(shard.name) and shard.name.startswith(f"{shard.split}-"), shard
        assert _DIGEST.fullmatch(shard.sha256), shard
        assert type(shard.samples) is type(shard.num_bytes) is int, shard
        assert shard.samples >= 0 and shard.num_bytes >= 0, shard
    assert len(found.wnids) == len(found.class_names) == len(set(found.wnids))
    assert all(isinstance(name, str) for name in (*found.wnids, *found.class_names))
    assert all(type(n) is int for n in (found.resize, found.crop, found.quality, found.seed))
    assert 227 <= found.crop <= found.resize
    for split in ("train", "val"):
        samples = Samples(out, found, split)
        assert samples.count == found.num_samples(split)
    status_text(status(out))


def sample_index(data: bytes, folder: Path) -> None:
    """Every sample must have the label and the bytes that the good index gives it."""
    out = _set_with(folder, "index/train.parquet", data)
    found = shards.load_manifest(out)
    samples = Samples(out, found, "train")
    right = _good("index/train.parquet")
    assert samples.labels.tolist() == right["label"]
    files = ShardFiles(out, found.split_shards("train"), 0)
    try:
        ids = np.arange(samples.count)
        opening = files.open(samples.shards_of(ids))
        jpegs = samples.read(ids, opening)
    finally:
        files.close()
    assert [_sha256(jpeg) for jpeg in jpegs] == right["sha256"]


def sidecar(data: bytes, folder: Path) -> None:
    """A shard is done with the very rows and facts that its maker wrote, or is made again."""
    name = "_meta/train-000000.parquet"
    out = _set_with(folder, name, data)
    done, missing = finish.finished_shards(out, plan_files.load(out))
    status_text(status(out))
    if 0 in missing:
        raise Refused(missing[0])
    right = shards.unpack_sidecar((_good_set() / name).read_bytes())
    (facts,) = [facts for shard, facts in done if shard.name == "train-000000"]
    rows, _ = shards.unpack_sidecar(data)
    assert facts == right[1], "other facts than those written"
    assert rows.equals(right[0]), "other rows than those written"


def plan_json(data: bytes, folder: Path) -> None:
    out = _set_with(folder, "_meta/plan.json", data, finished=False)
    found = plan_files.load(out)
    assert found.recipe.resize >= found.recipe.crop >= 227
    for shard in found.shards:
        assert _NAME.fullmatch(shard.name) and shard.name.startswith(f"{shard.split}-"), shard
        assert type(shard.samples) is int and shard.samples >= 0
    finish.finished_shards(out, found)
    status_text(status(out))


def plan_rows(data: bytes, folder: Path) -> None:
    """The very rows that were planned, or none."""
    out = _set_with(folder, "_meta/plan.parquet", data, finished=False)
    made = plan_files.load(out)
    for number in range(len(made.shards)):
        found = plan_files.read_rows(out, made.plan_id, number)
        assert found == plan_files.read_rows(str(_good_set()), made.plan_id, number)


def _set_with(folder: Path, name: str, data: bytes, finished: bool = True) -> str:
    out = folder / "out"
    shutil.copytree(_good_set(), out, copy_function=os.link)
    if not finished:
        (out / "manifest.json").unlink()
    place = out / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.write_bytes(data)
    return str(out)


def _good_set() -> Path:
    return Path(os.environ["FUZZ_GOOD"]) / "set"


@cache
def _good(name: str) -> dict[str, list[Any]]:
    table = shards.read_parquet(storage.read(str(_good_set() / name)))
    return {column: table[column].to_pylist() for column in ("label", "sha256")}


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


SETS: dict[str, Callable[[bytes, Path], None]] = {
    function.__name__: function
    for function in (manifest, sample_index, sidecar, plan_json, plan_rows)
}
