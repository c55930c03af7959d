"""Runs, and what they left on disk.

    python -m training runs list
    python -m training runs rm NAME [--mlflow]

`rm` deletes the checkpoints of a run and what waits on this machine to be sent to MLflow; with
--mlflow the run there too, whose trash keeps it. Registered versions have files of their own.
"""

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from alexnet.errors import UserError
from pipelines import command, storage
from training import lease, store, tracking
from training.config import checked_name
from training.metrics import metrics_of, spool_of
from training.registry.versions import aligned

_COLUMNS = ("run", "state", "epoch", "val_top1", "checkpoints", "begun")


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("python -m training runs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listed = commands.add_parser("list", help="all runs, newest first")
    listed.add_argument("--json", action="store_true", help="print JSON")
    listed.set_defaults(run=_list)
    removed = commands.add_parser("rm", help="delete what a run left on disk")
    removed.add_argument("name", metavar="NAME")
    removed.add_argument("--mlflow", action="store_true", help="and the run in MLflow")
    removed.set_defaults(run=_remove)
    for each in (listed, removed):
        each.add_argument("--storage", metavar="PLACE", help="default: $ALEXNET_HOME/runs")
        each.add_argument("--experiment", metavar="NAME", help="default: alexnet")
    return command.answered(lambda: _asked(parser.parse_args(argv)))


def _asked(arguments: argparse.Namespace) -> int:
    place = storage.absolute(arguments.storage or str(storage.home() / "runs"))
    uri = tracking.tracking_uri()
    try:
        client = tracking.connect(uri, arguments.experiment)
        runs = _runs(client, arguments.experiment)
        arguments.run(client, runs, place, arguments)
    except tracking.FAILURES as error:
        raise UserError(f"MLflow at {uri} failed ({store.remedy(uri, error)}") from error
    return 0


def _runs(client: MlflowClient, experiment: str | None) -> list[Run]:
    """Newest first."""
    found = client.get_experiment_by_name(tracking.experiment_name(experiment))
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs([found.experiment_id], page_token=token)
        runs += page
        if not (token := page.token):
            return runs


def _list(_: MlflowClient, runs: list[Run], place: str, arguments: argparse.Namespace) -> None:
    rows = [*_rows(runs, place)]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    shown = [[_cell(name, row[name]) for name in _COLUMNS] for row in rows]
    print(aligned([[name.replace("_", " ") for name in _COLUMNS], *shown]))


def _rows(runs: list[Run], place: str) -> Iterator[dict[str, Any]]:
    """One per run of MLflow, and one per folder of checkpoints that MLflow does not know."""
    sizes: Counter[str] = Counter()
    for name, size in storage.list_files(place):
        sizes[name.partition("/")[0]] += size
    for run in runs:
        metrics, name = metrics_of(run), run.info.run_name
        begun = datetime.fromtimestamp(run.info.start_time / 1000, UTC)
        yield {
            "run": name,
            "state": run.info.status,
            "epoch": metrics.get("epoch"),
            "val_top1": metrics.get("val_top1"),
            "checkpoints": sizes.pop(name, None),
            "begun": begun.isoformat(" ", "minutes"),
        }
    for name, size in sizes.items():
        unknown = dict.fromkeys(_COLUMNS)
        yield unknown | {"run": name, "state": "not in MLflow", "checkpoints": size}


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "checkpoints":
        return f"{value / 1e6:,.1f} MB"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _remove(
    client: MlflowClient, runs: list[Run], place: str, arguments: argparse.Namespace
) -> None:
    """Raises UserError for a run that is not there, or is being written."""
    name = checked_name(arguments.name, "NAME")
    folder = storage.join(place, name)
    files = storage.list_files(folder)
    own = [run for run in runs if run.info.run_name == name]
    if not files and not own:
        raise UserError(f"no run {name} in {place} and in MLflow; `runs list` shows all")
    if (writer := lease.holder(folder)) is not None:
        raise UserError(f"run {name} is perhaps still written by {writer}; stop it first")
    # Hashes first: a checkpoint without them is none, wherever this is interrupted.
    for file, _ in sorted(files, key=lambda file: not file[0].endswith("hashes.json")):
        storage.delete(storage.join(folder, file))
    if not storage.is_s3(folder) and storage.exists(folder):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be removed: {error.strerror}") from error
    for run in own:
        spool_of(run.info.run_id).unlink(missing_ok=True)
        if arguments.mlflow:
            client.delete_run(run.info.run_id)
    kept = "" if arguments.mlflow or not own else "; its run in MLflow stays, see --mlflow"
    size = sum(size for _, size in files)
    command.say(f"removed {folder}: {len(files):,} files, {size / 1e6:,.1f} MB{kept}")
