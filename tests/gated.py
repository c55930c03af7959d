"""Registries of small models of which a test may change anything, and what is in them."""

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

from training.registry import checks
from training.registry.checks import Check
from training.registry.gate import Asked
from training.registry.versions import NAME, aliases

FORCED = Asked(force="the demonstration is at noon")


def enter_whole_copy(built: Built, home: Path, patch: pytest.MonkeyPatch) -> MlflowClient:
    """As `Built.enter_copy`, with copies of the artifacts too, where the store then finds them."""
    # By run, and of the whole process: the files of another copy, or of the original.
    patch.setattr(utils, "_artifact_repos_cache", OrderedDict())
    shutil.copytree(built.folder / "home" / "mlartifacts", home / "mlartifacts")
    return built.enter_copy(home, patch)


def enter_candidate_copy(built: Built, home: Path, patch: pytest.MonkeyPatch) -> MlflowClient:
    """As `enter_whole_copy` and `pass_as_used`, without champion, GOOD as candidate."""
    pass_as_used(patch)
    client = enter_whole_copy(built, home, patch)
    client.set_registered_model_alias(NAME, "candidate", GOOD)
    return client


def pass_as_used(patch: pytest.MonkeyPatch) -> None:
    """The check in a fresh process takes seconds and is taken for passed; tests of its own make it.
    An image takes 1 ms, however busy the machine is."""
    clock = SimpleNamespace(perf_counter=itertools.count(step=0.001).__next__)
    patch.setattr(checks, "time", clock)
    alike = Check("as used", "8 of 8 images alike", "the same classes", True)
    patch.setattr(checks, "as_used", lambda *args: alike)


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
