"""All versions at a glance, with a few queries for thousands of them."""

from collections.abc import Sequence
from typing import Any

from mlflow.entities import Run, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient

from training import tracking
from training.registry.versions import aliases, run_of, versions

_RUNS_AT_ONCE = 500

_COLUMNS = {
    "version": "version",
    "aliases": "alias",
    "recipe": "recipe",
    "val_top1": "val top-1",
    "gate": "gate",
    "run": "run",
    "previous_champion": "champion before",
}


def rows(client: MlflowClient) -> list[dict[str, Any]]:
    """One per version, newest first, with the keys of `_COLUMNS`; what is not known is None."""
    found, held_by = versions(client), aliases(client)
    runs = _runs(client, found)
    listed = []
    for version in found:
        number, run = str(version.version), runs.get(version.run_id)
        listed.append(
            {
                "version": number,
                "aliases": sorted(alias for alias, held in held_by.items() if held == number),
                "recipe": version.tags.get("recipe"),
                "val_top1": run.data.metrics.get("val_top1") if run else None,
                "gate": version.tags.get("gate"),
                "run": run.info.run_name if run else None,
                "previous_champion": version.tags.get("previous_champion"),
            }
        )
    return listed


def _runs(client: MlflowClient, found: Sequence[ModelVersion]) -> dict[str, Run]:
    """By id; those of this project's experiment in batches, the few of others one by one."""
    ids = sorted({str(version.run_id) for version in found if version.run_id})
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
    runs: dict[str, Run] = {}
    for first in range(0, len(ids), _RUNS_AT_ONCE):
        listed = ", ".join(f"'{run_id}'" for run_id in ids[first : first + _RUNS_AT_ONCE])
        batch = client.search_runs(
            [experiment],
            f"attributes.run_id IN ({listed})",
            run_view_type=ViewType.ALL,
            max_results=_RUNS_AT_ONCE,
        )
        runs |= {run.info.run_id: run for run in batch}
    for version in found:
        if version.run_id and version.run_id not in runs and (run := run_of(client, version)):
            runs[version.run_id] = run
    return runs


def table(listed: Sequence[dict[str, Any]]) -> str:
    lines = [list(_COLUMNS.values())] + [[_cell(row[key]) for key in _COLUMNS] for row in listed]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return ", ".join(value) if isinstance(value, list) else str(value or "")
