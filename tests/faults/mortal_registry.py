"""Commands of the registry, and a registration, on a store in $ALEXNET_HOME."""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import torch
from mlflow.tracking import MlflowClient
from registered import GOOD_CONFIG

from alexnet.errors import UserError
from pipelines.shards import load_manifest
from training import tracking
from training.registry import __main__ as commands
from training.registry import checks, package
from training.registry.checks import Check

IMPORTED = (mlflow.pyfunc,)  # what the lives would import one by one


def command(*, argv: list[str]) -> int:
    """Its exit code. The check in a fresh process takes seconds and is taken for passed."""
    _prepare()
    checks.as_used = lambda *_: Check("as used", "8 of 8 images alike", "the same classes", True)
    return commands.main(argv)


def register(*, run_id: str, checkpoint: str, data: str) -> int:
    """1 or 2, and one line, for what `training/run.py` answers with these."""
    manifest = load_manifest(data)
    try:
        package.register(_prepare(), run_id, Path(checkpoint), manifest, GOOD_CONFIG)
    except UserError as error:
        print(f"error: {error}")
        return 2
    except tracking.FAILURES as error:
        print(f"error: {str(error).splitlines()[0]}")
        return 1
    return 0


def _prepare() -> MlflowClient:
    torch.set_num_threads(1)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{os.environ['ALEXNET_HOME']}/mlflow.db"
    for name, method in vars(MlflowClient).items():
        if callable(method) and not name.startswith("_"):
            setattr(MlflowClient, name, _told(name, method))
    return tracking.connect(tracking.tracking_uri())


def _told(name: str, method: Any) -> Any:
    """The method, with an instant to die at before and after each call."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        sys.audit("mortal.call", f"mlflow {name}")
        answer = method(*args, **kwargs)
        sys.audit("mortal.call", f"mlflow {name}")
        return answer

    return call
