"""Whether the two memories of a run tell the same: MLflow's run and the checkpoints in storage."""

from typing import Any

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import Manifest
from training import checkpoint, tracking
from training.config import TrainConfig


def agreed(client: Any, config: TrainConfig, manifest: Manifest) -> Any | None:
    """The run of this name, with which the training goes on or has ended; None for a new one.

    Raises UserError where one of the two lacks what the other remembers, or is of another training:
    to go on would train unseen steps, or register a version that nothing is known about.
    """
    place = storage.join(str(config.storage), str(config.name))
    state = checkpoint.newest_state(place)
    owner = "" if state is None else _owner(state)
    run = tracking.find_run(client, config, manifest, owner)
    if run is not None and run.info.status == "FINISHED":
        return run
    if state is None:
        if run is not None:
            _refuse_lost(run, place, config)
        return run
    if run is None or run.info.run_id != owner:
        raise UserError(_of_another_run(client, place, state, config, run))
    checkpoint.refuse_other(state, place, config, manifest.digest)
    return run


def _refuse_lost(run: Any, place: str, config: TrainConfig) -> None:
    """A run that was killed before its first checkpoint begins again."""
    step, before = run.data.tags.get(tracking.STORED), run.data.params.get("storage")
    if step is None:
        return
    there = "" if before == config.storage else f", pass --storage {before} as before"
    raise UserError(
        f"run {config.name} has stored a checkpoint of step {step}, and {place} holds none; put "
        f"its checkpoints back{there}, or train anew under another --name"
    )


def _of_another_run(
    client: Any, place: str, state: dict[str, Any], config: TrainConfig, run: Any | None
) -> str:
    owner = _owner(state)
    holds = f"{place} holds checkpoints, up to step {state['step']}, of MLflow's run {owner}"
    known = tracking.run_or_none(client, owner)
    if known is not None and known.info.lifecycle_stage != "active":
        return f"{holds}, which {tracking.deleted(client, owner)}"
    if known is not None:
        return (
            f"{holds}, which is named {known.info.run_name} there; name it {config.name} again in "
            "MLflow, or choose another --name"
        )
    lacks = "does not have" if run is None else f"does not have: its run {config.name} is another"
    return (
        f"{holds}, which MLflow at {client.tracking_uri} {lacks}; set MLFLOW_TRACKING_URI to the "
        "store that has it, move the folder away, or choose another --name"
    )


def _owner(state: dict[str, Any]) -> str:
    return str(state.get("run_id") or "unknown")
