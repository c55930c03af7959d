"""The model card says what the run recorded, and nothing else."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from drawn import jpeg
from gated import enter_whole_copy, files_of
from mlflow.tracking import MlflowClient
from mlflow.tracking._tracking_service import utils
from registered import GOOD, GOOD_CONFIG, MLFLOW_WARNINGS, Built

from alexnet.model import AlexNet
from pipelines.shards import Manifest, load_manifest
from training import tracking
from training.registry import card
from training.registry.versions import NAME, load

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]
NASTY = '<img src=x onerror=alert(1)> | *a* `b` "c" [d](e) \u202e'


@pytest.fixture
def client(registered_models: Built, home: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    return enter_whole_copy(registered_models, home, monkeypatch)


@pytest.fixture
def manifest(registered_models: Built) -> Manifest:
    return load_manifest(registered_models.data)


def of_good(client: MlflowClient, tmp_path: Path) -> str:
    run_id = client.get_model_version(NAME, GOOD).run_id
    return Path(client.download_artifacts(run_id, "card/card.md", str(tmp_path))).read_text()


def rendered(client: MlflowClient, manifest: Manifest, **tags: str) -> str:
    """The card of a new run, which has measured nothing."""
    network = load(f"models:/{NAME}/{GOOD}").network
    assert isinstance(network, AlexNet)
    config = dataclasses.replace(GOOD_CONFIG, name="silent")
    run_id = tracking.open_run(client, config, manifest, tags.get("data", "/x")).info.run_id
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    return card.render(client, run_id, network, manifest, config)


def test_card_says_what_was_trained_on_what_and_how_well(client, manifest, tmp_path):
    told = of_good(client, tmp_path)
    weights = load(f"models:/{NAME}/{GOOD}").network.parameters()
    assert f"| Parameters | {sum(tensor.numel() for tensor in weights):,} |" in told
    # Wilson by hand: 13 of 13, z² = 3.8415: 13 / (13 + z²) to 1.
    assert "| top-1 | 100.00 % | 77.19 % to 100.00 % |" in told and "Of 13 val images" in told
    for fact in (manifest.digest, manifest.plan_id, tracking._code_sha256()):
        assert fact in told
    assert "| Train images | 16 |" in told and "| Classes | 4: colour 0, colour 1" in told
    assert "](../figures/top5.png)" in told
    rows = [line.count("|") for line in told.splitlines() if line.startswith("|")]
    assert set(rows) == {3, 4}, "tables of two and of three columns"


def test_head_is_yaml_with_what_the_hub_reads(client, manifest, tmp_path):
    _, head, _ = of_good(client, tmp_path).split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["license"] == "unknown" and found["metrics"] == ["accuracy"]
    assert found["tags"] == ["image-classification", "alexnet", "baseline"]
    [result] = found["model-index"][0]["results"]
    assert result["task"]["type"] == found["pipeline_tag"] == "image-classification"
    assert {metric["name"]: metric["value"] for metric in result["metrics"]} == {
        "top-1": 1.0,
        "top-5": 1.0,
    }
    assert result["dataset"]["revision"] == manifest.digest
    official = dataclasses.replace(manifest, document=manifest.document | {"official": True})
    _, head, _ = rendered(client, official).split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["license"] == "other" and "model-index" not in found


def test_what_nobody_measured_is_said_and_names_cannot_write_markup(client, manifest):
    hostile = dataclasses.replace(manifest, class_names=(NASTY,) * 4)
    told = rendered(client, hostile, hardware=NASTY, data=NASTY)
    assert "Not measured." in told and "| Throughput | not measured |" in told
    assert "| Hardware | not recorded |" in told and manifest.digest in told
    _, head, text = told.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "unknown"
    assert "\u202e" not in text and r"\<img src=x onerror=alert(1)\> \| \*a\* \`b\`" in text
    assert NASTY[:8] not in text.replace("\\<", "")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # short, as people write it
def test_code_of_the_card_answers_where_nothing_else_is_set(
    client, manifest, tmp_path, monkeypatch, capsys
):
    client.set_registered_model_alias(NAME, "champion", GOOD)
    [code] = re.findall(r"```python\n(.+?)```", rendered(client, manifest), re.DOTALL)
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
    assert not list(files_of(client, GOOD).rglob("*.pyc"))
