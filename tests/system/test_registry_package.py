"""What a training registers, and how a version is found, checked and read again."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from registered import AGAIN, GOOD, GOOD_CONFIG, MLFLOW_WARNINGS, POOR, Built
from safetensors.numpy import load_file, save_file

from pipelines.shards import load_manifest
from training.network import input_spec
from training.registry import package
from training.registry.package import register
from training.registry.versions import aliases, load, versions

# Endings of what Python or torch writes with pickle.
PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"}

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]


# What is registered


def test_newest_registration_is_the_candidate_with_what_vouches_for_it(
    registered_models, tmp_path, monkeypatch
):
    client = registered_models.enter_copy(tmp_path / "home", monkeypatch)
    assert aliases(client) == {"candidate": POOR}
    version = client.get_model_version("alexnet", GOOD)
    tags = version.tags
    assert (tags["recipe"], tags["variant"]) == ("baseline", "ungrouped")
    assert version.description.startswith("# ")
    run = client.get_run(version.run_id)
    (model,) = run.outputs.model_outputs
    assert version.source == f"models:/{model.model_id}"
    assert client.get_logged_model(model.model_id).status == "READY"


def test_folder_holds_the_weights_as_trained_and_no_pickle(good_copy, registered_models):
    assert not [path for path in good_copy.rglob("*") if path.suffix in PICKLES]
    trained = load_file(registered_models.checkpoint / "model.safetensors")
    kept = load_file(good_copy / "artifacts" / "model.safetensors")
    assert kept.keys() == trained.keys()
    assert all(np.array_equal(kept[name], trained[name]) for name in trained)
    required = (good_copy / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in required} >= {"mlflow", "numpy", "pillow", "torch"}
    assert all("==" in line and "+" not in line for line in required)
    code = {path.name for path in (good_copy / "code").iterdir()}
    assert code == {"alexnet"}, "and nothing of training or pipelines"


def test_hashes_are_what_sha256sum_finds_and_the_tag_is_theirs(registry, good_copy):
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=good_copy,
        capture_output=True,
        text=True,
        check=True,
    )
    listed = {line.removesuffix(": OK") for line in checked.stdout.splitlines()}
    there = {
        path.relative_to(good_copy).as_posix() for path in good_copy.rglob("*") if path.is_file()
    }
    assert there - listed <= {"SHA256SUMS", "registered_model_meta"}
    tags = registry.get_model_version("alexnet", GOOD).tags
    for tag, name in (
        ("artifacts_sha256", "SHA256SUMS"),
        ("weights_sha256", "artifacts/model.safetensors"),
    ):
        told = subprocess.check_output(["sha256sum", good_copy / name], text=True)
        assert told.split()[0] == tags[tag]


def test_description_has_classes_geometry_and_where_it_comes_from(registry, registered_models):
    loaded, manifest = load(f"models:/alexnet/{GOOD}"), load_manifest(registered_models.data)
    assert loaded.input_spec == input_spec(manifest, GOOD_CONFIG)
    assert (loaded.class_names, loaded.wnids) == (manifest.class_names, manifest.wnids)
    assert loaded.class_names[2] == "colour 2"
    assert loaded.description["manifest_sha256"] == manifest.digest
    assert loaded.description["recipe"] == "baseline"
    assert loaded.description["model"] == {
        "variant": "ungrouped",
        "num_classes": 4,
        "width": 1 / 16,
        "batch_norm": True,
        "norm_group": 64,
    }


def test_run_holds_figures_and_card(registry, tmp_path):
    run_id = registry.get_model_version("alexnet", GOOD).run_id
    for name in ("curves", "conv1_kernels", "top5"):
        path = registry.download_artifacts(run_id, f"figures/{name}.png", str(tmp_path))
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert [file.path for file in registry.list_artifacts(run_id, "card")] == ["card/card.md"]


# A registration that does not go well


def register_again(client: MlflowClient, built: Built, **changes: object) -> str | None:
    """The same checkpoint, from a run of its own: what a run has registered it registers once."""
    before = client.get_run(client.get_model_version("alexnet", AGAIN).run_id)
    run_id = client.create_run(before.info.experiment_id, tags=before.data.tags).info.run_id
    params = [Param(key, value) for key, value in before.data.params.items()]
    metrics = [Metric(key, value, 0, 1) for key, value in before.data.metrics.items()]
    client.log_batch(run_id, metrics, params)
    config = dataclasses.replace(GOOD_CONFIG, **changes)
    return register(client, run_id, built.checkpoint, load_manifest(built.data), config)


@pytest.mark.parametrize("step", ["log_model_artifacts", "log_outputs", "create_model_version"])
def test_fault_while_registering_leaves_no_version(registry, registered_models, monkeypatch, step):
    def fault(*_: object, **__: object) -> None:
        raise MlflowException("the server is gone")

    with monkeypatch.context() as patch:
        patch.setattr(registry, step, fault)
        with pytest.raises(MlflowException, match="the server is gone"):
            register_again(registry, registered_models)
    assert len(versions(registry)) == 4 and aliases(registry) == {"candidate": GOOD}


def test_a_run_that_is_registered_again_keeps_its_version(registry, registered_models):
    run_id = registry.get_model_version("alexnet", GOOD).run_id
    manifest = load_manifest(registered_models.data)
    again = register(registry, run_id, registered_models.checkpoint, manifest, GOOD_CONFIG)
    assert again == GOOD and len(versions(registry)) == 4
    assert aliases(registry) == {"candidate": GOOD}


def test_a_later_checkpoint_of_a_registered_run_is_another_version(
    registry, registered_models, tmp_path
):
    run_id = registry.get_model_version("alexnet", GOOD).run_id
    assert package._registered_before(registry, run_id, registered_models.checkpoint) == GOOD
    weights = load_file(registered_models.checkpoint / "model.safetensors")
    weights["classifier.fc8.bias"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    assert package._registered_before(registry, run_id, tmp_path) is None
    other = registry.get_model_version("alexnet", POOR).run_id
    assert package._registered_before(registry, other, registered_models.checkpoint) is None


def test_last_figures_that_never_reached_the_run_come_from_the_checkpoint(
    registry, registered_models
):
    """As when MLflow was away at the end and what waited for it was lost."""
    good = registry.get_run(registry.get_model_version("alexnet", GOOD).run_id).data
    run = registry.create_run("1", tags=good.tags)
    params = [Param(key, value) for key, value in good.params.items()]
    registry.log_batch(run.info.run_id, [Metric("val_top1", 0.5, 0, 1)], params)
    manifest = load_manifest(registered_models.data)
    register(registry, run.info.run_id, registered_models.checkpoint, manifest, GOOD_CONFIG)
    found = registry.get_run(run.info.run_id).data.metrics
    for key in ("val_top1", "val_loss", "epoch"):
        assert found[key] == good.metrics[key]


def test_what_mlflow_compiles_while_it_tries_the_model_is_not_registered(
    registry, registered_models, monkeypatch
):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    number = register_again(registry, registered_models)
    assert load(f"models:/alexnet/{number}")


def test_nothing_is_registered_where_the_config_says_so(registry, registered_models):
    assert register_again(registry, registered_models, register=False) is None
    assert len(versions(registry)) == 4
