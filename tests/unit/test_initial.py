"""training/initial.py: what a run begins with where its weights are not drawn."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shard_sets import write_shard_set
from small_training import Record, fit, small_config

from alexnet.errors import UserError
from pipelines.shards import load_manifest
from training import initial
from training.config import TrainConfig

HEAD = {"classifier.fc8.weight", "classifier.fc8.bias"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("four") / "set")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three classes, where `uri` has four."""
    return write_shard_set(tmp_path_factory.mktemp("three") / "set", classes=3, seed=5)


@pytest.fixture(scope="module")
def trained(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint."""
    return fit(small_config(model_batch_norm=True), uri, tmp_path_factory.mktemp("run")).last


def begun(config: TrainConfig, uri: str, source: Path, keep: Path, **rest: Any) -> Record:
    config = dataclasses.replace(config, init_from=str(source))
    weights = initial.load_initial(config, load_manifest(uri)).weights
    return fit(config, uri, keep, initial=weights, **rest)


def test_a_run_of_the_same_classes_begins_with_every_weight(uri, trained, tmp_path):
    still = small_config(model_batch_norm=True, optim_epochs=1, optim_lr=1e-30, freeze="none")
    saved, given = (
        load_file(folder / "model.safetensors")
        for folder in (begun(still, uri, trained, tmp_path).last, trained)
    )
    for name, tensor in given.items():
        if "running" not in name and "batches" not in name:
            assert torch.equal(saved[name], tensor), name


@pytest.mark.parametrize("averaged", [0.0, 0.9])
def test_frozen_features_keep_every_bit_while_a_new_head_learns(
    others, trained, tmp_path, averaged
):
    config = small_config(
        model_batch_norm=True, freeze="features", init_from="x", optim_ema_decay=averaged
    )
    run = begun(config, others, trained, tmp_path)
    saved, given = (load_file(f / "model.safetensors") for f in (run.last, trained))
    assert saved["classifier.fc8.weight"].shape[0] == 3
    for name, tensor in given.items():
        if name.startswith("features"):
            assert torch.equal(saved[name], tensor), name
        elif name not in HEAD:
            assert not torch.equal(saved[name], tensor), name


def test_a_fine_tuning_resumes_bit_for_bit(others, trained, tmp_path):
    config = small_config(
        model_batch_norm=True, freeze="features", init_from=str(trained), checkpoint_steps=3
    )
    whole = begun(config, others, trained, tmp_path / "whole")
    rest = fit(config, others, tmp_path / "rest", resume=whole.folders[3])
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (rest.last / name).read_bytes() == (whole.last / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"model_width": 1 / 16}, r"its features\.conv1\.weight is \(4, 3, 11, 11\)"),
        ({"model_variant": "paper", "model_batch_norm": False}, "it has a features"),
        ({"model_batch_norm": False}, "it has a features"),
    ],
)
def test_weights_of_another_network_are_refused(uri, trained, change, differs):
    config = small_config(**{"model_batch_norm": True, "init_from": str(trained)} | change)
    with pytest.raises(UserError, match=rf"is of another network \({differs}.*--model\.variant"):
        initial.load_initial(config, load_manifest(uri))


def test_a_file_of_weights_needs_no_description(uri, others, trained, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file(load_file(trained / "model.safetensors"), path)
    config = small_config(model_batch_norm=True, init_from=str(path))
    assert {*initial.load_initial(config, load_manifest(uri)).weights} >= HEAD
    found = initial.load_initial(config, load_manifest(others))
    assert not HEAD & {*found.weights} and "whose 4 classes are others" in found.said
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is no safetensors file"):
        initial.load_initial(config, load_manifest(uri))
    with pytest.raises(UserError, match="gone"):
        initial.load_initial(
            dataclasses.replace(config, init_from=str(tmp_path / "gone.safetensors")),
            load_manifest(uri),
        )


def test_what_is_kept_beside_the_checkpoints_is_read_by_its_hash(trained, tmp_path):
    weights = load_file(trained / "model.safetensors")
    initial.keep(initial.Initial("", weights), str(tmp_path))
    other = {name: tensor + 1 for name, tensor in weights.items()}
    initial.keep(initial.Initial("", other), str(tmp_path))  # begun again before a checkpoint
    kept = initial.read_kept(str(tmp_path))
    assert all(torch.equal(kept[name], tensor) for name, tensor in other.items())
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"gone from .*, or damaged"):
        initial.read_kept(str(tmp_path))


def test_features_that_nobody_gave_cannot_be_frozen():
    with pytest.raises(UserError, match="--freeze needs --init-from"):
        small_config(freeze="features")
