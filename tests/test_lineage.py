"""From a registered version back to the bytes of a picture, in the shard and in the raw data."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from registered import MLFLOW_WARNINGS
from small_training import small_config

from alexnet.errors import UserError
from pipelines import shards
from training import tracking
from training.config import to_dict
from training.registry.lineage import lineage, text
from training.registry.versions import NAME

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]
CONFIG = small_config(name="traced")


@pytest.fixture
def client(drawn_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """Of a registry whose version 1 learned from a copy of the drawn shards, and 2 has no run."""
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "home"))
    # MLflow sets this itself, for its child processes; here it must not outlive the test.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}")
    data = shutil.copytree(drawn_shards, tmp_path / "shards")
    client = tracking.connect(tracking.tracking_uri())
    run = tracking.open_run(client, CONFIG, shards.load_manifest(str(data)), str(data))
    client.create_registered_model(NAME)
    client.create_model_version(NAME, "file:///nowhere", run.info.run_id)
    client.create_model_version(NAME, "file:///nowhere")
    client.set_registered_model_alias(NAME, "champion", "1")
    return client


def test_a_version_leads_to_its_run_config_code_and_shards(client, tmp_path):
    data = str(tmp_path / "shards")
    found = lineage(client, "champion")
    json.dumps(found)
    run = client.get_run(client.get_model_version(NAME, "1").run_id)
    assert found["version"] == "1"
    assert found["run"] == {"id": run.info.run_id, "name": "traced", "status": "RUNNING"}
    assert found["config"] == to_dict(CONFIG)
    assert found["commit"] == tracking._commit() and found["code_sha256"] == tracking._code_sha256()
    digest = hashlib.sha256((tmp_path / "shards" / "manifest.json").read_bytes()).hexdigest()
    assert found["data"]["uri"] == data and found["data"]["manifest_sha256"] == digest
    assert found["data"]["gone"] is None
    for shard in found["shards"]:
        content = (tmp_path / "shards" / f"{shard['name']}.tar").read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    assert sum(shard["samples"] for shard in found["shards"]) == 31 + 12


def test_data_set_is_an_input_of_the_run(client, tmp_path):
    run = client.get_run(client.get_model_version(NAME, "1").run_id)
    (given,) = run.inputs.dataset_inputs
    digest = shards.load_manifest(str(tmp_path / "shards")).digest
    assert json.loads(given.dataset.source)["manifest_sha256"] == digest
    assert digest.startswith(given.dataset.digest)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_sample_leads_to_its_bytes_in_the_shard_and_in_the_raw_archive(
    client, tmp_path, drawn_raw, split
):
    key = shards.load_index(str(tmp_path / "shards"), split)["key"][3].as_py()
    sample = lineage(client, "1", sample=key)["sample"]
    assert (sample["key"], sample["split"]) == (key, split)
    for path, kind in (
        (tmp_path / "shards" / f"{sample['shard']}.tar", ""),
        (Path(drawn_raw) / sample["source"], "source_"),
    ):
        start, size = sample[f"{kind}offset"], sample[f"{kind}size"]
        content = path.read_bytes()[start : start + size]
        assert hashlib.sha256(content).hexdigest() == sample[f"{kind}sha256"]
        assert kind or content.startswith(b"\xff\xd8")


def test_text_tells_each_step(client, tmp_path):
    key = shards.load_index(str(tmp_path / "shards"), "train")["key"][0].as_py()
    found = lineage(client, "1", sample=key)
    told = text(found)
    for fact in (found["run"]["id"], found["code_sha256"], found["data"]["manifest_sha256"]):
        assert fact in told
    sample = found["sample"]
    assert f"{sample['shard']}.tar from byte {sample['offset']:,}" in told
    assert f"{sample['source']} from byte {sample['source_offset']:,}" in told
    assert sample["sha256"] in told and sample["source_sha256"] in told


@pytest.mark.parametrize("loss", ["gone", "another set"])
def test_lost_data_are_told_and_the_rest_stays(client, tmp_path, loss):
    manifest = tmp_path / "shards" / "manifest.json"
    if loss == "gone":
        manifest.unlink()
    else:
        manifest.write_bytes(manifest.read_bytes() + b"\n")
    found = lineage(client, "1")
    assert found["shards"] is None and found["config"] == to_dict(CONFIG)
    assert {"gone": "no finished", "another set": "is another data set now"}[loss] in found["data"][
        "gone"
    ]
    assert found["data"]["gone"] in text(found)
    with pytest.raises(UserError, match="pass --data") as told:
        lineage(client, "1", sample="x")
    assert "\n" not in str(told.value)


def test_moved_data_are_found_where_they_are_now(client, tmp_path):
    moved = (tmp_path / "shards").rename(tmp_path / "moved")
    assert lineage(client, "1")["shards"] is None
    assert len(lineage(client, "1", data=str(moved))["shards"]) == 6


def test_version_without_a_run_says_so(client):
    found = lineage(client, "2")
    assert found["run"] is None and found["config"] is None and found["commit"] is None
    assert text(found).count("not recorded") >= 5


def test_unknown_sample_and_version_are_refused_in_one_line(client):
    for version, sample, expected in [
        ("1", "nothing", "no sample nothing"),
        ("9", None, "no version 9"),
    ]:
        with pytest.raises(UserError, match=expected) as told:
            lineage(client, version, sample=sample)
        assert "\n" not in str(told.value)
