"""What a training registers: a version that can be checked, and a card that tells what is known."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from drawn import jpeg
from gated import files_of
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking._tracking_service import utils
from registered import AGAIN, GOOD, GOOD_CONFIG, POOR, Built
from safetensors.numpy import load_file, save_file

from alexnet.model import AlexNet
from pipelines.shards import Manifest, load_manifest
from training import tracking
from training.network import input_spec
from training.registry import card, package
from training.registry.package import register
from training.registry.versions import NAME, aliases, load, versions

# Endings of what Python or torch writes with pickle.
PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"}


# What is registered


def test_newest_registration_is_the_candidate_with_what_vouches_for_it(
    registered_models, home, tmp_path, monkeypatch
):
    client = registered_models.enter_copy(home, monkeypatch)
    assert aliases(client) == {"candidate": POOR}
    version = client.get_model_version("alexnet", GOOD)
    assert (version.tags["recipe"], version.tags["variant"]) == ("baseline", "ungrouped")
    assert version.tags["validation_status"] == "pending"
    assert version.description.startswith("# ")
    run = client.get_run(version.run_id)
    (model,) = run.outputs.model_outputs
    assert version.source == f"models:/{model.model_id}"
    assert client.get_logged_model(model.model_id).status == "READY"
    for name in ("curves", "conv1_kernels", "top5", "confusion", "mistakes"):
        path = client.download_artifacts(version.run_id, f"figures/{name}.png", str(tmp_path))
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert [file.path for file in client.list_artifacts(version.run_id, "card")] == ["card/card.md"]
    table = client.load_table(run.info.experiment_id, "evaluation/classes.json", [version.run_id])
    assert table["wnid"].tolist() == [*load_manifest(registered_models.data).wnids]
    assert table["images"].sum() == run.data.metrics["val/images"]
    assert table["correct"].sum() == run.data.metrics["val/correct1"]


def test_models_of_a_data_set_are_found_by_the_accuracy_that_their_runs_logged_once(
    registered_models, home, monkeypatch
):
    client = registered_models.enter_copy(home, monkeypatch)
    data = load_manifest(registered_models.data)
    version = client.get_model_version("alexnet", GOOD)
    run = client.get_run(version.run_id)
    given = {"dataset_name": f"shards-{data.plan_id[:12]}-val", "dataset_digest": data.digest[:36]}
    found = client.search_logged_models(
        [run.info.experiment_id], "metrics.`val/top1` = 1", datasets=[given]
    )
    [model] = [each for each in found if version.source == f"models:/{each.model_id}"]
    poor = client.get_model_version("alexnet", POOR).source
    assert poor not in [f"models:/{each.model_id}" for each in found]
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "alexnet", "version": 1}]
    values = {metric.key: metric.value for metric in model.metrics}
    assert values == {k: v for k, v in run.data.metrics.items() if k.startswith("val/")}
    assert len(values) > 3
    for key in values:
        points = client.get_metric_history(version.run_id, key)
        assert len(points) == len({point.step for point in points})


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
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    told = subprocess.check_output(check, cwd=good_copy, text=True)
    listed = {line.removesuffix(": OK") for line in told.splitlines()}
    there = {str(path.relative_to(good_copy)) for path in good_copy.rglob("*") if path.is_file()}
    assert there - listed <= {"SHA256SUMS", "registered_model_meta"}
    tags = registry.get_model_version("alexnet", GOOD).tags
    names = ["SHA256SUMS", "artifacts/model.safetensors"]
    told = subprocess.check_output(["sha256sum", *names], cwd=good_copy, text=True)
    assert told.split()[::2] == [tags["artifacts_sha256"], tags["weights_sha256"]]


def test_description_has_classes_geometry_and_where_it_comes_from(registry, registered_models):
    loaded, manifest = load(f"models:/alexnet/{GOOD}"), load_manifest(registered_models.data)
    assert loaded.input_spec == input_spec(manifest, GOOD_CONFIG)
    assert (loaded.class_names, loaded.wnids) == (manifest.class_names, manifest.wnids)
    assert loaded.description["manifest_sha256"] == manifest.digest
    assert loaded.description["recipe"] == "baseline"
    assert loaded.description["model"] == {
        "variant": "ungrouped",
        "num_classes": 4,
        "width": 1 / 16,
        "batch_norm": True,
        "norm_group": 64,
    }


def test_registry_of_another_store_takes_the_version_and_the_runs_store_its_files(
    registry, registered_models, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path / 'registry.db'}")
    client = tracking.connect(tracking.tracking_uri(), write=True)
    assert versions(client) == []
    number = register_good(client, new_run(registry), registered_models)
    assert aliases(client) == {"candidate": number} and load(f"models:/alexnet/{number}")
    assert len(versions(registry)) == 4, "those of the store of runs"


# Its card

NASTY = '<img src=x onerror=alert(1)> | *a* `b` "c" [d](e) \u202e'


@pytest.fixture
def manifest(registered_models: Built) -> Manifest:
    return load_manifest(registered_models.data)


def rendered(client: MlflowClient, manifest: Manifest, **tags: str) -> str:
    """The card of a new run, which has measured nothing."""
    network = load(f"models:/alexnet/{GOOD}").network
    assert isinstance(network, AlexNet)
    config = dataclasses.replace(GOOD_CONFIG, name="silent")
    run_id = tracking.open_run(client, config, manifest, tags.get("data", "/x")).info.run_id
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    return card.render(client, run_id, network, manifest, config)


def test_card_says_what_was_trained_on_what_and_how_well(registry, manifest, tmp_path):
    run_id = registry.get_model_version("alexnet", GOOD).run_id
    told = Path(registry.download_artifacts(run_id, "card/card.md", str(tmp_path))).read_text()
    weights = load(f"models:/alexnet/{GOOD}").network.parameters()
    assert f"| Parameters | {sum(tensor.numel() for tensor in weights):,} |" in told
    # Wilson by hand: 13 of 13, z² = 3.8415: 13 / (13 + z²) to 1.
    assert "| top-1 | 100.00 % | 77.19 % to 100.00 % |" in told and "Of 13 val images" in told
    for fact in (manifest.digest, manifest.plan_id, tracking._code_sha256()):
        assert fact in told
    assert "| Train images | 16 |" in told and "| Classes | 4: colour 0, colour 1" in told
    _, head, _ = told.split("---\n", 2)  # for the Hub
    found = yaml.safe_load(head)
    assert found["license"] == "unknown"
    [result] = found["model-index"][0]["results"]
    assert result["task"]["type"] == found["pipeline_tag"] == "image-classification"
    metrics = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert metrics == {"top-1": 1.0, "top-5": 1.0}
    assert result["dataset"]["revision"] == manifest.digest


def test_what_nobody_measured_is_said_and_names_cannot_write_markup(registry, manifest):
    official = manifest.document | {"official": True}
    hostile = dataclasses.replace(manifest, class_names=(NASTY,) * 4, document=official)
    told = rendered(registry, hostile, hardware=NASTY, data=NASTY)
    assert "Not measured." in told and "| Throughput | not measured |" in told
    assert "| Hardware | not recorded |" in told and manifest.digest in told
    _, head, text = told.split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["license"] == "other" and "model-index" not in found
    assert "\u202e" not in text and r"\<img src=x onerror=alert(1)\> \| \*a\* \`b\`" in text
    assert NASTY[:8] not in text.replace("\\<", "")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # short, as people write it
def test_code_of_the_card_answers_where_nothing_else_is_set(
    registry, manifest, tmp_path, monkeypatch, capsys
):
    registry.set_registered_model_alias("alexnet", "champion", GOOD)
    [code] = re.findall(r"```python\n(.+?)```", rendered(registry, manifest), re.DOTALL)
    (tmp_path / "image.jpg").write_bytes(jpeg())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "ALEXNET_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # which the code sets, and this takes back
    monkeypatch.setattr(utils, "_tracking_uri", None)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow adds the model's code to it
    exec(code, {})
    assert "colour " in capsys.readouterr().out
    assert not list(files_of(registry, GOOD).rglob("*.pyc"))


# A registration that does not go well


def new_run(client: MlflowClient, metrics: dict[str, float] | None = None) -> str:
    """With what AGAIN's has: what a run has registered it registers once."""
    before = client.get_run(client.get_model_version("alexnet", AGAIN).run_id)
    run_id = client.create_run(before.info.experiment_id, tags=before.data.tags).info.run_id
    params = [Param(key, value) for key, value in before.data.params.items()]
    logged = before.data.metrics if metrics is None else metrics
    client.log_batch(run_id, [Metric(key, value, 0, 1) for key, value in logged.items()], params)
    return str(run_id)


def register_good(client: MlflowClient, run_id: str, built: Built, **changes: object) -> str | None:
    config = dataclasses.replace(GOOD_CONFIG, **changes)
    return register(client, run_id, built.checkpoint, load_manifest(built.data), config)


@pytest.mark.parametrize("step", ["log_model_artifacts", "log_outputs", "create_model_version"])
def test_fault_while_registering_leaves_no_version(registry, registered_models, monkeypatch, step):
    def fault(*_: object, **__: object) -> None:
        raise MlflowException("the server is gone")

    run_id = new_run(registry)
    for name in ("_log_figures", "_log_evaluation"):  # they take seconds
        monkeypatch.setattr(package, name, lambda *_: None)
    monkeypatch.setattr(registry, step, fault)
    with pytest.raises(MlflowException, match="the server is gone"):
        register_good(registry, run_id, registered_models)
    assert len(versions(registry)) == 4 and aliases(registry) == {"candidate": GOOD}


def test_a_run_that_is_registered_again_keeps_its_version(registry, registered_models):
    run_id = registry.get_model_version("alexnet", GOOD).run_id
    assert register_good(registry, run_id, registered_models) == GOOD
    assert len(versions(registry)) == 4 and aliases(registry) == {"candidate": GOOD}


def test_a_later_checkpoint_of_a_registered_run_is_another_version(
    registry, registered_models, tmp_path
):
    run_id = registry.get_model_version("alexnet", GOOD).run_id
    assert package._registered_before(registry, NAME, run_id, registered_models.checkpoint) == GOOD
    weights = load_file(registered_models.checkpoint / "model.safetensors")
    weights["classifier.fc8.bias"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    assert package._registered_before(registry, NAME, run_id, tmp_path) is None
    other = registry.get_model_version("alexnet", POOR).run_id
    assert package._registered_before(registry, NAME, other, registered_models.checkpoint) is None


def test_last_figures_that_never_reached_the_run_come_from_the_checkpoint_and_no_pyc_is_registered(
    registry, registered_models, monkeypatch
):
    """As when MLflow was away at the end and what waited for it was lost. MLflow tries the model,
    and Python compiles what it imports."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    good = registry.get_run(registry.get_model_version("alexnet", GOOD).run_id).data
    run_id = new_run(registry, {"val/top1": 0.5})
    number = register_good(registry, run_id, registered_models)
    found = registry.get_run(run_id).data.metrics
    for key in ("val/top1", "val/loss", "run/epoch"):
        assert found[key] == good.metrics[key]
    assert load(f"models:/alexnet/{number}")


def test_nothing_is_registered_where_the_config_says_so(registry, registered_models):
    assert register_good(registry, new_run(registry), registered_models, register=False) is None
    assert len(versions(registry)) == 4
