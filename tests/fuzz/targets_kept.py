"""What the program keeps and reads again: shard sets, checkpoints, registered models.

A target, as in targets_raw.py, gets one file; the others are good ones.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from targets_raw import Refused

from pipelines import finish, plan_files, shards, sidecars
from pipelines.inspect import status, status_text
from training import checkpoint
from training.loader import Samples
from training.network import load_model
from training.registry import versions
from training.shard_files import ShardFiles

GOOD = Path(os.environ.get("FUZZ_GOOD", ""))


def manifest(data: bytes, folder: Path) -> None:
    """What is accepted has the types and limits that everybody relies on."""
    out = _set_with(folder, "manifest.json", data)
    found = shards.load_manifest(out)
    for shard in found.shards:
        _check_shard(shard)
        assert re.fullmatch("[0-9a-f]{64}", shard.sha256, re.ASCII), shard
        assert type(shard.num_bytes) is int and shard.num_bytes >= 0, shard
    assert len(found.wnids) == len(set(found.wnids))
    _check_names(found)
    assert all(type(n) is int for n in (found.resize, found.crop, found.quality, found.seed))
    assert 227 <= found.crop <= found.resize
    for split in ("train", "val"):
        assert Samples(out, found, split).count == found.num_samples(split)
    status_text(status(out))


def sample_index(data: bytes, folder: Path) -> None:
    """Every sample must have the label and the bytes that the good index gives it."""
    out = _set_with(folder, "index/train.parquet", data)
    found = shards.load_manifest(out)
    samples = Samples(out, found, "train")
    right = shards.read_parquet((GOOD / "set/index/train.parquet").read_bytes())
    assert samples.labels.tolist() == right["label"].to_pylist()
    files = ShardFiles(out, found.split_shards("train"), 0)
    try:
        ids = np.arange(samples.count)
        jpegs = samples.read(ids, files.open(samples.shards_of(ids)))
    finally:
        files.close()
    assert [hashlib.sha256(jpeg).hexdigest() for jpeg in jpegs] == right["sha256"].to_pylist()


def sidecar(data: bytes, folder: Path) -> None:
    """A shard is done with the very rows and facts that its maker wrote, or is made again."""
    name = "_meta/train-000000.parquet"
    out = _set_with(folder, name, data)
    done, missing = finish.finished_shards(out, plan_files.load(out))
    status_text(status(out))
    if 0 in missing:
        raise Refused(missing[0])
    rows, facts = sidecars.unpack((GOOD / "set" / name).read_bytes())
    assert [found for shard, found in done if shard.name == "train-000000"] == [facts]
    try:
        here, _ = sidecars.unpack(data)  # as the end of a build does
    except ValueError as error:
        raise Refused(error) from error
    assert here.equals(rows), "other rows than those written"


def plan_json(data: bytes, folder: Path) -> None:
    out = _set_with(folder, "_meta/plan.json", data)
    Path(out, "manifest.json").unlink()
    found = plan_files.load(out)
    assert found.recipe.resize >= found.recipe.crop >= 227
    for shard in found.shards:
        _check_shard(shard)
    finish.finished_shards(out, found)
    status_text(status(out))


def plan_rows(data: bytes, folder: Path) -> None:
    """The very rows that were planned, or none."""
    out = _set_with(folder, "_meta/plan.parquet", data)
    made = plan_files.load(out)
    for number in range(len(made.shards)):
        found = plan_files.read_rows(out, made.plan_id, number)
        assert found == plan_files.read_rows(str(GOOD / "set"), made.plan_id, number)


def checkpoint_hashes(data: bytes, folder: Path) -> None:
    place = _copied("checkpoint", folder)
    (place / "hashes.json").write_bytes(data)
    with checkpoint.newest_good(str(folder)) as found:
        assert found == place
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert json.loads(data)[name] == hashlib.sha256((place / name).read_bytes()).hexdigest()


def checkpoint_state(data: bytes, folder: Path) -> None:
    """With a hash that fits: by somebody who knows the format, or by another release."""
    _check_model(load_model(str(_vouched(folder, "state.json", data))))


def checkpoint_tensors(data: bytes, folder: Path) -> None:
    place = _vouched(folder, "model.safetensors", data)
    network = load_model(str(place)).network
    with safe_open(place / "model.safetensors", "pt") as tensors:
        for name, value in network.state_dict().items():
            if value.dim():
                found = tensors.get_tensor(name).view(torch.uint8)
                assert torch.equal(value.view(torch.uint8), found), name


def registered_json(data: bytes, folder: Path) -> None:
    place = _copied("model", folder)
    (place / versions.DESCRIPTION).write_bytes(data)
    (place / versions.SUMS).write_text(versions.file_sums(place))
    _check_model(versions.load(str(place)))


def _set_with(folder: Path, name: str, data: bytes) -> str:
    out = folder / "out"
    shutil.copytree(GOOD / "set", out, copy_function=os.link)
    (out / name).unlink()
    (out / name).write_bytes(data)
    return str(out)


def _copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(GOOD / name, folder / "it"))


def _vouched(folder: Path, name: str, data: bytes) -> Path:
    """A checkpoint with that file, and hashes that fit."""
    place = _copied("checkpoint", folder)
    (place / name).write_bytes(data)
    hashes = json.loads((place / "hashes.json").read_text())
    fitting = {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in hashes}
    (place / "hashes.json").write_text(json.dumps(fitting))
    return place


def _check_shard(shard: Any) -> None:
    assert re.fullmatch("(train|val|test)-[0-9]{6}", shard.name, re.ASCII), shard
    assert shard.name.startswith(f"{shard.split}-"), shard
    assert type(shard.samples) is int and shard.samples >= 0, shard


def _check_names(found: Any) -> None:
    assert len(found.wnids) == len(found.class_names)
    assert all(isinstance(name, str) for name in (*found.wnids, *found.class_names))


def _check_model(found: Any) -> None:
    """One logit for each class that has a name."""
    _check_names(found)
    (*_, last) = found.network.parameters()
    assert last.shape == (len(found.wnids),), f"{tuple(last.shape)} logits"


KEPT: dict[str, Callable[[bytes, Path], None]] = {
    function.__name__: function
    for function in (
        *(manifest, sample_index, sidecar, plan_json, plan_rows),
        *(checkpoint_hashes, checkpoint_state, checkpoint_tensors, registered_json),
    )
}
