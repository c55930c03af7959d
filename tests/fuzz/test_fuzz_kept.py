"""Garbage for what the program keeps: shard sets, checkpoints, configs, registered models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from drawn import imagefolder, jpeg
from made import made_shards
from mutations import mutated, mutated_json
from small_training import small_config

from alexnet.classifier import LAYOUT
from pipelines import shards
from pipelines.plan import Recipe
from training import checkpoint
from training.config import to_dict
from training.network import build_model, input_spec
from training.registry import versions

WNIDS = ["n00000010", "n00000020", "n00000030"]


@pytest.fixture(scope="session")
def good_set(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three train shards and one of val; the same bytes in every run."""
    files = {
        f"{split}/{wnid}/{wnid}_{n}.JPEG": jpeg(n)
        for split, numbers in (("train", (1, 2, 3)), ("val", (4,)))
        for wnid in WNIDS
        for n in numbers
    }
    raw = imagefolder(tmp_path_factory.mktemp("fuzz-raw"), files)
    folder = good / "set"
    made_shards(str(raw), str(folder), Recipe(samples_per_shard=3))
    return folder


@pytest.fixture(scope="session")
def spec(good_set: Path) -> dict:
    return input_spec(shards.load_manifest(str(good_set)), small_config()).to_json()


@pytest.fixture(scope="session")
def good_checkpoint(good: Path, spec: dict) -> Path:
    folder = good / "checkpoint"
    config = small_config()
    state = {
        "step": 7,
        "total_steps": 9,
        "config": to_dict(config),
        "manifest": "a" * 64,
        "num_classes": 3,
        "wnids": WNIDS,
        "class_names": ["tench", "jacamar", "yurt"],
        "input_spec": spec,
        "lowest_loss": 0.5,
        "metrics": {"val_top1": 0.25},
    }
    torch.manual_seed(0)
    model = build_model(config, 3)
    checkpoint.save(folder, {"model": model.state_dict(), "optimizer": {}}, state)
    return folder


@pytest.fixture(scope="session")
def good_model(good: Path, good_checkpoint: Path, spec: dict) -> Path:
    """As `versions.load` takes it; without the code, which it does not run."""
    folder = good / "model"
    (folder / "artifacts").mkdir(parents=True)
    shutil.copy(good_checkpoint / "model.safetensors", folder / versions.WEIGHTS)
    model = small_config().model
    description = {
        "layout": LAYOUT,
        "model": {
            "variant": model.variant,
            "num_classes": 3,
            "width": model.width,
            "batch_norm": model.batch_norm,
            "norm_group": model.norm_group,
        },
        "input_spec": spec,
        "wnids": WNIDS,
        "class_names": ["tench", "jacamar", "yurt"],
        "recipe": "baseline",
    }
    (folder / versions.DESCRIPTION).write_text(json.dumps(description))
    (folder / versions.SUMS).write_text(versions.file_sums(folder))
    return folder


SET_FILES = {
    "sample_index": "index/train.parquet",
    "sidecar": "_meta/train-000000.parquet",
    "plan_rows": "_meta/plan.parquet",
}
SET_DOCUMENTS = {"manifest": "manifest.json", "plan_json": "_meta/plan.json"}


@pytest.mark.parametrize("target", SET_FILES)
def test_tables_of_a_set_are_those_written_or_refused(attack, good_set, target) -> None:
    attack(target, mutated([(good_set / SET_FILES[target]).read_bytes()]))


@pytest.mark.parametrize("target", SET_DOCUMENTS)
def test_documents_of_a_set_are_well_formed_or_refused(attack, good_set, target) -> None:
    attack(target, mutated_json([json.loads((good_set / SET_DOCUMENTS[target]).read_bytes())]))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("checkpoint_file", "model.safetensors"),
        ("checkpoint_tensors", "model.safetensors"),
    ],
)
def test_weights_of_a_checkpoint_are_those_saved_or_refused(
    attack, good_checkpoint, target, name
) -> None:
    attack(target, mutated([(good_checkpoint / name).read_bytes()]))


@pytest.mark.parametrize(
    ("target", "name"),
    [("checkpoint_hashes", "hashes.json"), ("checkpoint_state", "state.json")],
)
def test_documents_of_a_checkpoint_are_well_formed_or_refused(
    attack, good_checkpoint, target, name
) -> None:
    attack(target, mutated_json([json.loads((good_checkpoint / name).read_bytes())]))


def test_saved_config_is_taken_field_by_field_or_refused(attack) -> None:
    attack("saved_config", mutated_json([to_dict(small_config()), to_dict(small_config(seed=7))]))


def test_description_of_a_registered_model_fits_its_network_or_is_refused(
    attack, good_model
) -> None:
    document = json.loads((good_model / versions.DESCRIPTION).read_bytes())
    attack("registered_json", mutated_json([document]))


@pytest.mark.parametrize(
    ("target", "name"),
    [("registered_weights", versions.WEIGHTS), ("registered_sums", versions.SUMS)],
)
def test_files_of_a_registered_model_are_taken_bit_for_bit_or_refused(
    attack, good_model, target, name
) -> None:
    attack(target, mutated([(good_model / name).read_bytes()]))
