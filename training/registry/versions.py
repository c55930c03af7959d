"""Versions of the registered model and their aliases, as MLflow keeps them.

Without torch until one is loaded: a list of them is to come at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Run, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from alexnet.errors import UserError, reason
from training.config import TrainConfig
from training.metrics import metrics_of

if TYPE_CHECKING:
    import torch

    from alexnet.preprocess import InputSpec

NAME = TrainConfig.model_name  # of the registered model, by default
# In a version's folder. MLflow puts what a model loads below artifacts/ and its code below code/.
WEIGHTS = "artifacts/model.safetensors"
DESCRIPTION = "artifacts/alexnet.json"
# One line "sha256  path" for each other file; the version's tag `artifacts_sha256` is its sha256.
SUMS = "SHA256SUMS"
_OF_MLFLOW = "registered_model_meta"  # which it writes into a copy of a version: number and name

_VERSION_URI = re.compile(r"models:/([^/@]+)(?:/(.+)|@(.+))")
_NUMBER = "[0-9]{1,9}"  # more than nine digits are too many for MLflow's databases
MISSING = "RESOURCE_DOES_NOT_EXIST"


_RUNS_AT_ONCE = 500

_COLUMNS = {
    "version": "version",
    "aliases": "alias",
    "recipe": "recipe",
    "val_top1": "val top-1",
    "gate": "gate",
    "validation_status": "status",
    "run": "run",
    "previous_champion": "champion before",
}


class Refused(Exception):
    """The gate's no; the text is the reason, in one line."""


@dataclass(frozen=True)
class Registered:
    """A version as it comes out of the registry: the network and what travels with it.

    description: the whole of its alexnet.json, such as `recipe`, `model` and `manifest_sha256`.
    """

    network: torch.nn.Module  # float32 (N,3,227,227) -> logits (N, classes), on the CPU
    input_spec: InputSpec
    class_names: tuple[str, ...]
    wnids: tuple[str, ...]
    description: dict[str, Any]


def load(uri: str) -> Registered:
    """A registered model, e.g. models:/alexnet@champion, or the folder of one.

    The network is this program's own, with the weights of a safetensors file: neither code nor
    pickle of the registry is run. Raises UserError for a URI that names nothing, for a model that
    was not registered by a training, and for files that are not those that were registered.
    """
    from alexnet.classifier import read_model

    with verified(uri) as folder:
        return Registered(*read_model(folder / WEIGHTS))


# `name` is that of the registered model.


def versions(client: MlflowClient, name: str = NAME) -> list[ModelVersion]:
    """All of them, newest first."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda version: -int(version.version))


def run_of(client: MlflowClient, version: ModelVersion) -> Run | None:
    """The training behind a version; None where it was registered without one, or deleted."""
    try:
        return client.get_run(version.run_id) if version.run_id else None
    except MlflowException as error:
        if error.error_code == MISSING:
            return None
        raise


def aliases(client: MlflowClient, name: str = NAME) -> dict[str, str]:
    """Alias → the version's number."""
    try:
        found = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == MISSING:
            return {}
        raise
    return {alias: str(version) for alias, version in found.items()}


def resolve(client: MlflowClient, version: str | None, name: str = NAME) -> ModelVersion:
    """version: a number or an alias; None takes the candidate.

    Raises UserError, naming what there is, for one that there is not.
    """
    held = aliases(client, name)
    if version is None and "candidate" not in held:
        raise UserError(f"{name} has no candidate; train one with `python training/run.py`")
    asked = "candidate" if version is None else version
    number = held.get(asked) or (asked if re.fullmatch(_NUMBER, asked) else None)
    if number is not None:
        try:
            return client.get_model_version(name, str(int(number)))
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
    there = _what_there_is(client, name, held)
    raise UserError(f"{name} has no version {asked[:100]}; there are {there}")


def _what_there_is(client: MlflowClient, name: str, held: Mapping[str, str]) -> str:
    numbers = [str(version.version) for version in versions(client, name)]
    listed = ", ".join(numbers[:10]) + (f", … ({len(numbers)} in all)" if numbers[10:] else "")
    return (listed or "none") + (f"; aliases {', '.join(sorted(held))}" if held else "")


def rows(client: MlflowClient, name: str = NAME) -> list[dict[str, Any]]:
    """One per version, newest first, with the keys of `_COLUMNS`; what is not known is None."""
    found, held_by = versions(client, name), aliases(client, name)
    runs = runs_of(client, found)
    listed = []
    for version in found:
        number, run = str(version.version), runs.get(version.run_id)
        listed.append(
            {
                "version": number,
                "aliases": sorted(alias for alias, held in held_by.items() if held == number),
                "recipe": version.tags.get("recipe"),
                "val_top1": metrics_of(run).get("val_top1") if run else None,
                "gate": version.tags.get("gate"),
                "validation_status": version.tags.get("validation_status"),
                "run": run.info.run_name if run else None,
                "previous_champion": version.tags.get("previous_champion"),
            }
        )
    return listed


def runs_of(client: MlflowClient, found: Sequence[ModelVersion]) -> dict[str, Run]:
    """The trainings behind versions, by id, of whatever experiment; in batches."""
    ids = sorted({str(version.run_id) for version in found if version.run_id})
    experiments = client.search_experiments(view_type=ViewType.ALL) if ids else []
    runs: dict[str, Run] = {}
    for first in range(0, len(ids), _RUNS_AT_ONCE):
        listed = ", ".join(f"'{run_id}'" for run_id in ids[first : first + _RUNS_AT_ONCE])
        batch = client.search_runs(
            [experiment.experiment_id for experiment in experiments],
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
    """`rows` for a terminal."""
    return aligned(
        [[*_COLUMNS.values()], *([_cell(row[key]) for key in _COLUMNS] for row in listed)]
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return ", ".join(value) if isinstance(value, list) else str(value or "")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as columns; nothing is cut."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        (cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in padded)


def file_sums(folder: Path) -> str:
    """What belongs in SUMS: "sha256  path" of each other file, sorted by path, a line each."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    names = [name for name in names if (folder / name).is_file() and name not in (SUMS, _OF_MLFLOW)]
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in names)


@contextlib.contextmanager
def verified(uri: str) -> Iterator[Path]:
    """A private copy of a version's files, all of them as registered. Raises UserError."""
    with _downloaded(uri) as (folder, version):
        _refuse_changed(uri, folder, version)
        yield folder


@contextlib.contextmanager
def _downloaded(uri: str) -> Iterator[tuple[Path, ModelVersion | None]]:
    """A private copy, so that nobody changes what was checked before it is read; and the version,
    where the URI is one's. An alias is looked up once: it may move meanwhile."""
    version = None
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with tempfile.TemporaryDirectory(prefix="registered-") as copy:
        try:
            if match := _VERSION_URI.fullmatch(uri):
                version = _version(MlflowClient(), *match.groups())
                uri = f"models:/{version.name}/{version.version}"
            found = mlflow.artifacts.download_artifacts(uri, dst_path=copy)
        except (MlflowException, OSError, ValueError) as error:  # ValueError: of a letter in it
            raise UserError(
                f"{uri[:100]} cannot be loaded ({reason(error)}); "
                "`python -m training.registry list` shows what there is"
            ) from error
        yield Path(found), version


def _version(
    client: MlflowClient, name: str, number: str | None, alias: str | None
) -> ModelVersion:
    if alias is not None:
        return client.get_model_version_by_alias(name, alias)
    if not re.fullmatch(_NUMBER, number or ""):
        raise MlflowException("a version is a number of up to nine digits")
    return client.get_model_version(name, number)


def _refuse_changed(uri: str, folder: Path, version: ModelVersion | None) -> None:
    """A folder of no version has nobody to vouch for its sums; they are compared all the same."""
    sums = folder / SUMS
    registered = sha256(sums) if sums.is_file() else ""
    if version is not None and (registered := version.tags.get("artifacts_sha256")) is None:
        raise UserError(
            f"{uri} was not registered by a training run: it has no artifacts_sha256 to check its "
            "files against; register it with `python training/run.py`"
        )
    if not any(folder.iterdir()):
        raise UserError(
            f"{uri}: its files are gone from where MLflow keeps artifacts; put them back there "
            "(a moved store's folder as well), or train and register again"
        )
    if changed := _differences(folder, registered):
        listed = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if changed[3:] else "")
        raise UserError(
            f"{uri}: its files are not those that were registered ({listed}); "
            f"{_remedy(uri, version, changed)}"
        )


def _remedy(uri: str, version: ModelVersion | None, changed: Sequence[str]) -> str:
    if not all(_is_compiled(difference.rsplit(" ", 1)[0]) for difference in changed):
        return "register it again"
    place = uri
    if version is not None:
        place = MlflowClient().get_model_version_download_uri(version.name, version.version)
    return (
        "mlflow, or the gate of an earlier release, compiled it in place: remove every __pycache__ "
        f"below {place.removeprefix('file://')}, and set PYTHONPYCACHEPREFIX to a folder of your "
        "own wherever mlflow loads or serves it"
    )


def _differences(folder: Path, registered: str) -> list[str]:
    """registered: sha256 of the folder's SUMS when it was registered."""
    sums = folder / SUMS
    if not sums.is_file():
        return [f"{SUMS} missing"]
    if sha256(sums) != registered:
        return [f"{SUMS} changed"]
    try:
        then = _parsed(sums.read_text())
    except ValueError:
        return [f"{SUMS} unreadable"]
    now = _parsed(file_sums(folder))
    words = dict.fromkeys(then.keys() - now.keys(), "missing")
    words |= dict.fromkeys(now.keys() - then.keys(), "added")
    words |= {name: "changed" for name in then.keys() & now.keys() if then[name] != now[name]}
    words |= {name: "added" for name in now if _is_compiled(name)}  # never registered by us
    return [f"{name} {words[name]}" for name in sorted(words)]


def _parsed(sums: str) -> dict[str, str]:
    lines = (line.split("  ", 1) for line in sums.splitlines())
    return {name: digest for digest, name in lines}


def _is_compiled(name: str) -> bool:
    """Python may run such a file instead of the source beside it, and asks nobody."""
    return "__pycache__" in name.split("/") or name.endswith(".pyc")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
