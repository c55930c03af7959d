"""The dry run: what it says is so, what it refuses would fail later, and it starts nothing."""

import dataclasses
import pickle
import re
import shutil
import tempfile
import unicodedata
from pathlib import Path

import pytest
import ray
from mlflow.tracking import MlflowClient
from registered import MLFLOW_WARNINGS
from shard_sets import write_shard_set
from small_training import small_config

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import load_manifest
from training import lease, tracking
from training.config import TrainConfig
from training.network import build_model
from training.preflight import (
    LONGEST_NAME,
    check_node,
    checked_name,
    checked_place,
    dry_run,
    estimate,
    preflight,
    refuse_unwritable_path,
    resolve,
)
from training.worker import refuse_changed

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("dry") / "set", train=(11, 10), val=(4,))


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")


def config_of(data: str, **changes) -> TrainConfig:
    return small_config(data=data, device="cpu", **changes)


def test_table_has_data_steps_checkpoints_and_state_and_nothing_is_started(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    told = dry_run(config_of(data, checkpoint_steps=2))
    manifest = load_manifest(data)
    assert f"{data} ({manifest.digest[:12]}): 21 train and 4 val samples of 4 classes, 227" in told
    assert "3 in an epoch, 6 in 2 epochs; batches of 8 over 1 worker(s)" in told
    assert "at the end, after the best epochs, every 2 steps, every 10 minutes" in told
    assert f"to {tmp_path / 'home' / 'runs'}/small" in told
    assert "run small is new" in told
    client = tracking.connect(tracking.tracking_uri())
    assert client.search_runs([client.get_experiment_by_name("alexnet").experiment_id]) == []
    assert list((tmp_path / "home" / "runs").iterdir()) == []


def test_job_for_the_workers_is_resolved_and_shows_no_manifest(data, tmp_path):
    shutil.copytree(data, tmp_path / "set")
    job, _ = preflight(config_of(str(tmp_path / "set"), name=None, storage=None), alone=True)
    assert job.folder == str(tmp_path / "home" / "runs" / job.config.name) and job.run_id is None
    assert job.manifest.plan_id not in str(job), "Ray's dashboard shows it"
    handed = pickle.loads(pickle.dumps(job))
    assert handed == job
    refuse_changed(handed)
    (tmp_path / "set" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=f"changed under the run.* was {job.manifest.digest[:16]};"):
        refuse_changed(handed)


def test_run_that_exists_is_told_to_continue(data):
    config, manifest = resolve(config_of(data))
    client: MlflowClient = tracking.connect(tracking.tracking_uri())
    tracking.open_run(client, config, manifest, data)
    assert "run small exists (RUNNING): it continues" in dry_run(config)
    with pytest.raises(UserError, match=r"other settings \(optim\.lr"):
        dry_run(config_of(data, optim_lr=0.5))


def test_run_that_is_being_written_is_refused_and_one_that_may_be_is_told(
    data, tmp_path, monkeypatch
):
    with lease.held(str(tmp_path / "home" / "runs" / "small")):
        with pytest.raises(UserError, match="run small is being written by"):
            dry_run(config_of(data))
        monkeypatch.setattr(lease, "_system", lambda: "another machine")
        assert re.search(
            r"^writer +perhaps still .*: the run would wait$", dry_run(config_of(data)), re.M
        )


def test_activations_are_the_tensors_that_the_layers_keep(data):
    """Counted by hand: the input of each convolution and linear layer, what ReLU put out where that
    is not the same tensor, the places of each maximum (int64) and the masks of dropout."""
    floats = {
        "x": 3 * 227 * 227,
        "relu1": 96 * 55 * 55,
        "pool1": 96 * 27 * 27,
        "relu2": 256 * 27 * 27,
        "pool2": 256 * 13 * 13,
        "relu3": 384 * 13 * 13,
        "relu4": 384 * 13 * 13,
        "relu5": 256 * 13 * 13,
        "dropout6, mask": 2 * 256 * 6 * 6,
        "relu6, dropout7, mask, relu7": 4 * 4096,
    }
    places = 96 * 27 * 27 + 256 * 13 * 13 + 256 * 6 * 6
    config = config_of(data, model_width=1.0, model_variant="ungrouped")
    found = estimate(config, load_manifest(data))
    images = 3 * 227 * 227 * (4 + 2 * 4)  # four as uint8, two as float32
    kept = 4 * sum(floats.values()) + 8 * places + 4 * floats["relu1"]
    assert (found.image, found.batch) == (kept + images, 8)
    half = estimate(config_of(data, model_width=1.0, precision="bf16"), load_manifest(data))
    kept = 2 * sum(floats.values()) + 8 * places + 2 * floats["relu1"]
    assert half.image == kept + images


def test_weights_count_with_gradient_velocity_and_average(data):
    manifest = load_manifest(data)
    parameters = sum(p.numel() for p in build_model(config_of(data), 4).parameters())
    plain = estimate(config_of(data), manifest)
    assert (plain.parameters, plain.weights) == (parameters, 12 * parameters)
    assert plain.checkpoint == 8 * parameters
    averaged = estimate(config_of(data, optim_ema_decay=0.9), manifest)
    assert (averaged.weights, averaged.checkpoint) == (16 * parameters, 12 * parameters)


def test_memory_is_that_of_the_fewest_workers(data):
    manifest = load_manifest(data)
    alone = estimate(config_of(data), manifest)
    assert estimate(config_of(data, workers=4), manifest).batch == alone.batch / 4
    few = estimate(config_of(data, workers=4, min_workers=2), manifest)
    assert (
        few.batch == alone.batch / 2
        and few.total == few.weights + few.checkpoint + few.batch * few.image
    )


def test_batch_beyond_the_memory_is_refused_with_one_that_fits(data):
    with pytest.raises(UserError, match=r"needs about .* GB each, this machine has") as refused:
        dry_run(config_of(data, optim_batch_size=10**8))
    fits = int(re.search(r"pass --optim\.batch-size (\d+)", str(refused.value))[1])
    assert 1 <= fits < 10**8
    assert "memory" in dry_run(config_of(data, optim_batch_size=fits))


def test_disk_without_room_for_the_checkpoints_is_refused(data, small_disk):
    with pytest.raises(UserError, match=r"GB free and the checkpoints of this run take"):
        dry_run(config_of(data, storage=str(small_disk)))


def test_disk_without_room_for_the_decoded_images_is_refused_with_both_sizes_and_a_limit_fits(
    data, small_disk, tmp_path, monkeypatch
):
    """A row of 227 * 227 * 3 bytes takes 38 pages; each file has two more."""
    needed = (25 * 38 + 2 * 2) * 4096
    config = config_of(data, storage=str(tmp_path / "runs"), cache="decoded")
    shown = f"{needed / 1e9:.2f} GB of images on each node's disk in {tmp_path}/home/cache/decoded"
    assert shown in dry_run(config)
    job, _ = preflight(config, alone=True)
    monkeypatch.setenv("ALEXNET_HOME", str(small_disk))
    with pytest.raises(UserError) as told:
        dry_run(config)
    assert str(told.value) == (
        f"{small_disk}/cache has 0.00 GB free and the decoded images take {needed / 1e9:.2f} GB; "
        "make room on this node, set ALEXNET_HOME to another disk, or pass a lower --decoded-gb"
    )
    check_node(dataclasses.replace(job, config=dataclasses.replace(config, decoded_gb=1e-5)))


def test_storage_that_cannot_be_written_is_refused(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        dry_run(config_of(data, storage=str(tmp_path / "file")))


def test_storage_that_deletes_nothing_is_told_and_trained_on(data, monkeypatch, caplog):
    def refused(uri: str) -> None:
        raise UserError(f"{uri}: Access Denied")

    monkeypatch.setattr(storage, "delete", refused)
    dry_run(config_of(data))
    assert "old checkpoints will stay" in caplog.text and "Access Denied" in caplog.text


def test_tracking_server_that_is_away_is_refused(data, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be used"):
        dry_run(config_of(data))


def test_shards_that_are_gone_are_refused(data, tmp_path):
    shutil.copytree(data, tmp_path / "set")
    (tmp_path / "set" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json"):
        dry_run(config_of(str(tmp_path / "set")))


# Names and places


@pytest.mark.parametrize("name", ["a", "fast-2.1_b", "Größe", "训练一", "प्रशिक्षण", "ชื่อ", "0"])
def test_letters_and_digits_of_any_script_make_a_name(name):
    assert checked_name(name, "--name") == name


def test_same_letters_are_one_name_however_they_are_composed():
    apart = unicodedata.normalize("NFD", "Größe")
    assert apart != "Größe" and checked_name(apart, "--name") == "Größe"


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "...", "-x", ".x", "x.", "a/b", "../a", "a b", "a ", " ", "a'b", 'a"b'),
        *("a\nb", "a\0", "a\x1b[0m", "\udcff", "a:b", "a*", "$a", "a\\b", "😀"),
        *("a" * (LONGEST_NAME + 1), "ü" * (LONGEST_NAME // 2 + 1), "a" * 100_000),
    ],
)
def test_other_names_are_one_short_line(name):
    with pytest.raises(UserError) as told:
        checked_name(name, "--name")
    line = str(told.value)
    assert line.startswith("--name ") and line.isprintable() and len(line) < 250


def test_longest_name_fits_into_a_file_system_with_all_that_we_add(tmp_path, monkeypatch):
    """As a file beside others, written by a process of the host with the longest name."""
    monkeypatch.setattr(storage.socket, "gethostname", lambda: "h" * 64)
    monkeypatch.setattr(storage.os, "getpid", lambda: 4_194_304)  # Linux' highest
    made, mkstemp = [], tempfile.mkstemp
    monkeypatch.setattr(
        storage.tempfile, "mkstemp", lambda **how: made.append(mkstemp(**how)) or made[-1]
    )
    name = checked_name("训" * (LONGEST_NAME // 3), "--name")
    storage.write(str(tmp_path / f"{name}.jsonl"), b"")
    ((_, temporary),) = made
    assert len(Path(temporary).name.encode()) <= 255


@pytest.mark.parametrize("place", ["a\nb", "a\0b", "\udcff", "x://y"])
def test_place_that_cannot_be_told_or_written_is_refused(place):
    with pytest.raises(UserError) as told:
        checked_place(place, "--storage")
    assert str(told.value).isprintable()


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("s3://b/a//b", "a part that is empty"),
        ("s3://b/../b", "a part that is empty"),
        (f"s3://b/{'k' * 900}", "1,024 at most"),
        ("/a" * 2100, "4,096 at most"),
    ],
)
def test_storage_whose_checkpoints_would_have_impossible_names_is_refused(place, told):
    refuse_unwritable_path("s3://b", "n")
    with pytest.raises(UserError, match=told):
        refuse_unwritable_path(place, "n")
