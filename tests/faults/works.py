"""What is attacked, as functions for `mortal.Life`: commands of pipelines/ and of the registry, a
registration, a training."""

import contextlib
import functools
import importlib
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import mlflow.pyfunc
import ray.data
import torch
import torch._dynamo  # the first step of an optimizer would import it, in every life
import webdataset
from mlflow.tracking import MlflowClient
from registered import GOOD_CONFIG
from small_training import CPU, small_config

from alexnet.errors import UserError
from pipelines import build, cluster
from pipelines.shards import load_manifest
from training import checkpoint, loop, tracking
from training.registry import __main__ as registry_commands
from training.registry import checks, package
from training.registry.checks import Check
from training.uploads import Uploader

IMPORTED = [boto3, mlflow.pyfunc, webdataset]  # what each life would import
for name in ("cli", "report", "transform", "verify", "write_shard"):
    IMPORTED.append(importlib.import_module(f"pipelines.{name}"))


def pipelines(argv: list[str]) -> None:
    """With one change: where a build gives its tasks to Ray, it does them itself, one after the
    other."""

    def from_items(rows: list[Any], **_: Any) -> Any:
        def map(work: Callable[[Any], Any], **_: Any) -> Any:
            return SimpleNamespace(iter_rows=lambda: (work(row) for row in rows))

        return SimpleNamespace(map=map)

    ray.data.from_items = from_items
    cluster.connected = lambda *_, **__: contextlib.nullcontext()
    cluster.refuse_local_paths = lambda *_, **__: None
    build.export = lambda *_: None
    sys.argv = ["pipelines", *argv]
    runpy.run_module("pipelines", run_name="__main__")


def registry(argv: list[str]) -> int:
    """On the store in $ALEXNET_HOME. The check in a fresh process takes seconds and is taken for
    passed."""
    checks.as_used = lambda *_: Check("as used", "8 of 8 images alike", "the same classes", True)
    _connected()
    return registry_commands.main(argv)


def register(run_id: str, checkpoint: str, data: str) -> int:
    """1 or 2, and one line, for what `training/run.py` answers with these."""
    manifest = load_manifest(data)
    try:
        package.register(_connected(), run_id, Path(checkpoint), manifest, GOOD_CONFIG)
    except (UserError, *tracking.FAILURES) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def _connected() -> MlflowClient:
    """With an instant to die at before and after each call."""

    def audited(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            sys.audit("mortal.call", f"mlflow {name}")
            answer = method(*args, **kwargs)
            sys.audit("mortal.call", f"mlflow {name}")
            return answer

        return call

    torch.set_num_threads(1)
    for name, method in list(vars(MlflowClient).items()):
        if callable(method) and not name.startswith("_"):
            setattr(MlflowClient, name, audited(name, method))
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{os.environ['ALEXNET_HOME']}/mlflow.db"
    return tracking.connect(tracking.tracking_uri())


def train(uri: str, run: str, log: str, changes: dict[str, Any], patience: float = 1.0) -> int:
    """As a worker of Ray does it, from the newest checkpoint in `run`. `log` gets a line for each
    log line, before them one with the step that this life began at. 2, and one line, where the
    user must mend. patience: seconds for which a checkpoint waits for its store."""
    torch.set_num_threads(1)
    config = small_config(**changes)

    def tell(metrics: dict[str, float], step: int) -> None:
        with Path(log).open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def report(metrics: dict[str, float], write: Callable[[], Path] | None) -> None:
        assert write is not None
        uploads.send(write)

    kept = {"keep_last": config.keep_last, "keep_best": config.keep_best}
    place, how = loop.Place(CPU, threads=2), {"log": tell, "report": report, "run_id": "a-run"}
    try:
        with (
            checkpoint.newest_good(run) as resume,
            Uploader(run, **kept, patience=patience) as uploads,
        ):
            tell({}, 0 if resume is None else checkpoint.load_state(resume)["step"])
            if resume is not None:
                uploads.tidy(resume.name)
            loop.fit(config, uri, load_manifest(uri), place, resume=resume, **how)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
