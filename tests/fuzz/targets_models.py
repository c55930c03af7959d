"""What a training leaves, and what is read of it: checkpoints, configs, registered models."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from alexnet.classifier import load_network, read_description
from training import checkpoint
from training.command_line import read_config
from training.config import to_dict
from training.network import load_model
from training.registry import versions


def checkpoint_file(data: bytes, folder: Path) -> None:
    """Without its hash corrected: only the bytes that were saved are taken."""
    place = _copied("checkpoint", folder)
    right = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(data)
    load_model(str(place))
    assert data == right


def checkpoint_hashes(data: bytes, folder: Path) -> None:
    place = _copied("checkpoint", folder)
    (place / "hashes.json").write_bytes(data)
    with checkpoint.newest_good(str(folder)) as found:
        assert found == place
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert json.loads(data)[name] == hashlib.sha256((place / name).read_bytes()).hexdigest()


def checkpoint_state(data: bytes, folder: Path) -> None:
    """With a hash that fits: by somebody who knows the format, or by another release."""
    place = _copied("checkpoint", folder)
    (place / "state.json").write_bytes(data)
    _vouch(place)
    found = load_model(str(place))
    assert len(found.wnids) == len(found.class_names)
    assert all(isinstance(name, str) for name in (*found.wnids, *found.class_names))
    _check_answers(found.network, len(found.wnids))


def checkpoint_tensors(data: bytes, folder: Path) -> None:
    place = _copied("checkpoint", folder)
    (place / "model.safetensors").write_bytes(data)
    _vouch(place)
    found = load_model(str(place))
    _check_weights(found.network, place / "model.safetensors")


def saved_config(data: bytes, folder: Path) -> None:
    """Field by field what the JSON says, whole numbers counting as floats."""
    place = folder / "config.json"
    place.write_bytes(data)
    config = read_config(str(place))
    assert _same(json.loads(data), to_dict(config))


def registered_json(data: bytes, folder: Path) -> None:
    place = _copied("model", folder)
    (place / versions.DESCRIPTION).write_bytes(data)
    (place / versions.SUMS).write_text(versions.file_sums(place))
    found = versions.load(str(place))
    assert len(found.wnids) == len(found.class_names)
    assert all(isinstance(name, str) for name in (*found.wnids, *found.class_names))
    _check_answers(found.network, len(found.wnids))


def registered_weights(data: bytes, folder: Path) -> None:
    place = _copied("model", folder)
    (place / versions.WEIGHTS).write_bytes(data)
    description = read_description(place / versions.DESCRIPTION)
    network = load_network(place / versions.WEIGHTS, description["model"])
    _check_weights(network, place / versions.WEIGHTS)


def registered_sums(data: bytes, folder: Path) -> None:
    """A folder's own sums: taken only where they name every file with its hash."""
    place = _copied("model", folder)
    (place / versions.SUMS).write_bytes(data)
    versions.load(str(place))
    for line in data.decode().splitlines():
        digest, name = line.split("  ", 1)
        assert hashlib.sha256((place / name).read_bytes()).hexdigest() == digest


def _copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(Path(os.environ["FUZZ_GOOD"]) / name, folder / "it"))


def _vouch(place: Path) -> None:
    names = [path.name for path in place.iterdir() if path.name != "hashes.json"]
    hashes = {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in names}
    (place / "hashes.json").write_text(json.dumps(hashes))


def _check_answers(network: torch.nn.Module, classes: int) -> None:
    """One logit for each class that has a name."""
    (*_, last) = network.parameters()
    assert last.shape == (classes,), f"{tuple(last.shape)} logits for {classes} classes"


def _check_weights(network: torch.nn.Module, file: Path) -> None:
    with safe_open(file, "pt") as tensors:
        for name, value in network.state_dict().items():
            same = torch.equal(value.view(torch.uint8), tensors.get_tensor(name).view(torch.uint8))
            assert value.dim() == 0 or same, name


def _same(said: Any, kept: Any) -> bool:
    if isinstance(said, dict):
        return said.keys() == kept.keys() and all(_same(said[k], kept[k]) for k in said)
    if isinstance(said, list):
        return len(said) == len(kept) and all(map(_same, said, kept))
    if isinstance(kept, float) and isinstance(said, int | float) and not isinstance(said, bool):
        return math.isclose(said, kept, rel_tol=1e-15)
    return type(said) is type(kept) and said == kept


MODELS: dict[str, Callable[[bytes, Path], None]] = {
    function.__name__: function
    for function in (
        *(checkpoint_file, checkpoint_hashes, checkpoint_state, checkpoint_tensors),
        *(saved_config, registered_json, registered_weights, registered_sums),
    )
}
