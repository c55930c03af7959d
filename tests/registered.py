"""A registry with four versions of small models, trained once for all tests that ask."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import mlflow
import pytest
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient
from shard_sets import write_shard_set
from small_training import BY_HEART, Record, fit, small_config

from pipelines.shards import load_manifest
from training import tracking
from training.config import TrainConfig
from training.metrics import Tracker
from training.registry.package import register
from training.registry.versions import DESCRIPTION, NAME, SUMS, file_sums


@dataclasses.dataclass(frozen=True)
class Built:
    """GOOD and AGAIN are the same weights, POOR has seen one epoch, FOREIGN has other classes."""

    folder: Path
    data: str
    checkpoint: Path  # of GOOD

    def enter_copy(self, home: Path, patch: pytest.MonkeyPatch) -> MlflowClient:
        """Makes `home` the $ALEXNET_HOME, with a registry that the test may change."""
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / "home" / "mlflow.db", home)
        patch.setenv("ALEXNET_HOME", str(home))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
        return tracking.connect(tracking.tracking_uri())


GOOD, AGAIN, POOR, FOREIGN = "1", "2", "3", "4"
GOOD_CONFIG = small_config(**BY_HEART, name="good")


def build(folder: Path) -> Built:
    data = write_shard_set(folder / "set", train=(8, 8), val=(7, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALEXNET_HOME", str(folder / "home"))
        # MLflow sets this itself, for its child processes; here it must not outlive the block.
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'home' / 'mlflow.db'}")
        return _register_all(folder, data)


def _register_all(folder: Path, data: str) -> Built:
    client = tracking.connect(tracking.tracking_uri())
    manifest = load_manifest(data)
    good = fit(GOOD_CONFIG, data, folder / "good")
    poor_config = dataclasses.replace(
        GOOD_CONFIG, optim=dataclasses.replace(GOOD_CONFIG.optim, epochs=1)
    )
    poor = fit(poor_config, data, folder / "poor")
    run_id = _logged_run(client, "good", GOOD_CONFIG, data, good)
    register(client, run_id, good.last, manifest, GOOD_CONFIG)
    registered = client.get_model_version(NAME, GOOD)
    run_id = _logged_run(client, "again", GOOD_CONFIG, data, good)
    client.create_model_version(NAME, registered.source, run_id, tags=registered.tags)
    run_id = _logged_run(client, "poor", poor_config, data, poor)
    register(client, run_id, poor.last, manifest, poor_config)
    run_id = _logged_run(client, "foreign", GOOD_CONFIG, data, good)
    copied, tags = _with_other_classes(registered, folder)
    client.create_model_version(NAME, copied, run_id, tags=tags)
    return Built(folder, data, good.last)


def _logged_run(
    client: MlflowClient, name: str, config: TrainConfig, data: str, trained: Record
) -> str:
    named = dataclasses.replace(config, name=name)
    run = tracking.open_run(client, named, load_manifest(data), data)
    run_id = str(run.info.run_id)
    tracker = Tracker(tracking.tracking_uri(), run_id)
    for step, metrics in trained.logged[-4:]:
        tracker.log(metrics, step)
    tracker.wait()
    return run_id


def _with_other_classes(registered: ModelVersion, folder: Path) -> tuple[str, dict[str, str]]:
    """A copy that is whole by its own hashes, and its tags."""
    copied = mlflow.artifacts.download_artifacts(
        registered.source, dst_path=str(folder / "foreign")
    )
    path = Path(copied) / DESCRIPTION
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"wnids": ["n90", "n91", "n92", "n93"]}))
    sums = file_sums(Path(copied))
    (Path(copied) / SUMS).write_text(sums)
    digest = hashlib.sha256(sums.encode()).hexdigest()
    return copied, registered.tags | {"artifacts_sha256": digest}


def from_folder(client: MlflowClient, folder: Path) -> str:
    """Number of a new version with the tags of GOOD and the files of `folder`."""
    tags = client.get_model_version("alexnet", GOOD).tags
    return str(client.create_model_version("alexnet", str(folder), tags=tags).version)


def resealed(folder: Path) -> str:
    """The folder, with hashes that match what it holds now."""
    (folder / SUMS).write_text(file_sums(folder))
    return str(folder)
