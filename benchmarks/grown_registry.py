"""A registry with as many versions as asked for, and how long `list` takes with them."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import processes
from training import tracking
from training.registry.versions import NAME


def listed(sizes: Sequence[int], rounds: int) -> dict[int, list[tuple[float, float]]]:
    """(seconds, peak MB) of each round by number of versions, of one registry that grows."""
    found: dict[int, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        made = 0
        for size in sorted(sizes):
            _add(uri, folder, range(made, size))
            made = size
            found[size] = [_list(uri, size) for _ in range(rounds)]
    return found


def _add(uri: str, folder: str, numbers: range) -> None:
    """Versions with the run, metric and tags that `list` shows, without files."""
    client = tracking.connect(uri)
    if not numbers.start:
        client.create_registered_model(NAME)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
    for number in numbers:
        run = client.create_run(experiment, run_name=f"baseline-{number}")
        client.log_metric(run.info.run_id, "val/top1", number / 10_000)
        tags = {"recipe": "baseline", "gate": "passed", "previous_champion": str(number)}
        place = (Path(folder) / str(number)).as_uri()
        version = client.create_model_version(NAME, place, run.info.run_id, tags=tags)
    client.set_registered_model_alias(NAME, "champion", version.version)


def _list(uri: str, size: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "training.registry", "list"]
    done = processes.run(command, on=processes.cpus(), settings={"MLFLOW_TRACKING_URI": uri})
    lines = done.stdout.splitlines()
    assert len(lines) == size + 1, f"{len(lines) - 1} of {size} versions were listed"
    return done.wall_seconds, done.peak_mb
