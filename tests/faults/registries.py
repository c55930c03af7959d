"""What anybody may find in a registry at any time, and a training about to be registered."""

import dataclasses
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient
from mortal import Life, Mortals
from registered import GOOD_CONFIG, Built

from pipelines.shards import load_manifest
from training import tracking
from training.registry.versions import NAME, aliases, load, versions


def check_visible(client: MlflowClient) -> None:
    """What anybody would find now."""
    for version in versions(client):
        assert load(f"models:/{NAME}/{version.version}")
    for name, number in aliases(client).items():
        tags = client.get_model_version(NAME, number).tags
        if name == "champion":
            assert tags["gate"] == "passed" and "promoted_at" in tags
            load(f"models:/{NAME}@champion")


def new_run(client: MlflowClient, data: str) -> str:
    """The id of a run with all that a registration asks for."""
    config = dataclasses.replace(GOOD_CONFIG, name="killed")
    run_id = str(tracking.open_run(client, config, load_manifest(data), data).info.run_id)
    tracker = tracking.Tracker(tracking.tracking_uri(), run_id)
    tracker.log({"loss": 1.0, "top1": 0.5, "val_loss": 1.0, "val_top1": 0.5}, 1)
    return run_id


def register(mortals: Mortals, built: Built, home: Path, run_id: str, **how: Any) -> Life:
    checkpoint, data = str(built.checkpoint), built.data
    told = {"run_id": run_id, "checkpoint": checkpoint, "data": data}
    return mortals.live("register", watch="", home=home, **told, **how)
