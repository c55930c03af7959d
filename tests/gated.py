"""Registries of which a test may change anything: with small models, and with versions alone."""

import contextlib
import itertools
import shutil
import sqlite3
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient
from mlflow.tracking._tracking_service import utils
from registered import GOOD, Built

from training import tracking
from training.registry import checks
from training.registry.checks import Check
from training.registry.gate import Asked
from training.registry.versions import NAME, aliases

FORCED = Asked(force="the demonstration is at noon")
_PLACES = {
    "runs": "artifact_uri",
    "experiments": "artifact_location",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}


def enter_whole_copy(built: Built, home: Path, patch: pytest.MonkeyPatch) -> MlflowClient:
    """As `Built.enter_copy`, with copies of the artifacts too."""
    # By run, and of the whole process: the files of another copy, or of the original.
    patch.setattr(utils, "_artifact_repos_cache", OrderedDict())
    client = built.enter_copy(home, patch)
    shutil.copytree(built.folder / "home" / "mlartifacts", home / "mlartifacts")
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as store, store:
        old, new = str(built.folder / "home"), str(home)
        for table, column in _PLACES.items():
            store.execute(f"update {table} set {column} = replace({column}, ?, ?)", (old, new))
    return client


def enter_candidate_copy(built: Built, home: Path, patch: pytest.MonkeyPatch) -> MlflowClient:
    """As `enter_whole_copy`, without champion, GOOD as candidate. The check in a fresh process
    takes seconds and is taken for passed; tests of its own make it. An image takes 1 ms, however
    busy the machine is."""
    clock = SimpleNamespace(perf_counter=itertools.count(step=0.001).__next__)
    patch.setattr(checks, "time", clock)
    alike = Check("as used", "8 of 8 images alike", "the same classes", True)
    patch.setattr(checks, "as_used", lambda *args: alike)
    client = enter_whole_copy(built, home, patch)
    client.set_registered_model_alias(NAME, "candidate", GOOD)
    return client


def files_of(client: MlflowClient, version: str) -> Path:
    """The folder of a version."""
    return Path(client.get_model_version_download_uri(NAME, version).removeprefix("file://"))


def content(home: Path) -> tuple[list[str], list[str]]:
    """All that the store knows, and the names of all artifacts."""
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as store:
        rows = list(store.iterdump())
    return rows, sorted(str(path) for path in (home / "mlartifacts").rglob("*"))


def champion(client: MlflowClient) -> str | None:
    return aliases(client).get("champion")


def tags(client: MlflowClient, version: str) -> dict[str, str]:
    return dict(client.get_model_version(NAME, version).tags)


def make_bare_store(folder: Path) -> Path:
    """Four versions without content; 1 is the champion, 2 was refused once."""
    store = folder / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
        client = tracking.connect(tracking.tracking_uri())
    client.create_registered_model(NAME)
    for _ in range(4):
        client.create_model_version(NAME, str(folder))
    client.set_registered_model_alias(NAME, "champion", "1")
    client.set_model_version_tag(NAME, "2", "gate", "refused")
    client.set_model_version_tag(NAME, "2", "gate_reason", "worse")
    return store


def enter_bare_copy(store: Path, folder: Path, patch: pytest.MonkeyPatch) -> MlflowClient:
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(store, folder)}")
    return tracking.connect(tracking.tracking_uri())


# What a move of the champion from 1 to 2 with TAGS begins and ends with, as `state` tells it.
TAGS = {"gate": "passed", "previous_champion": "1", "gate_reason": None}
BEFORE = ("1", {"gate": "refused", "gate_reason": "worse"})
AFTER = ("2", {"gate": "passed", "previous_champion": "1"})


def state(client: MlflowClient) -> tuple[str | None, dict[str, str]]:
    """The champion and the tags of version 2."""
    return champion(client), dict(client.get_model_version(NAME, "2").tags)
