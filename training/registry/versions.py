"""Versions of the registered model and their aliases, as MLflow keeps them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import mlflow
import torch
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from alexnet.errors import UserError
from alexnet.preprocess import InputSpec

NAME = "alexnet"
DESCRIPTION = "alexnet.json"


@dataclass(frozen=True)
class Registered:
    """A version as it comes out of the registry: the network and what travels with it."""

    network: torch.nn.Module  # float32 (N,3,227,227) -> logits (N, classes)
    input_spec: InputSpec
    class_names: tuple[str, ...]
    wnids: tuple[str, ...]


def load(uri: str) -> Registered:
    """A registered model, e.g. models:/alexnet@champion, on the CPU, with pickle refused.

    Raises UserError for a URI that names nothing, or nothing that can be loaded so.
    """
    # MLflow would otherwise unpickle whatever somebody put into the registry, even inside of an
    # exported program, where torch.export itself falls back to an unsafe reader.
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    try:
        folder = Path(mlflow.artifacts.download_artifacts(uri))
        network = mlflow.pytorch.load_model(str(folder))
        description = json.loads((folder / "extra_files" / DESCRIPTION).read_text())
    except (MlflowException, OSError) as error:
        raise UserError(
            f"{uri} cannot be loaded ({str(error).splitlines()[0][:200]}); "
            "`python -m training.registry list` shows what there is"
        ) from error
    network.training = False  # it was exported in evaluation mode, yet its flag says otherwise
    return Registered(
        network=network,
        input_spec=InputSpec.from_json(description["input_spec"]),
        class_names=tuple(description["class_names"]),
        wnids=tuple(description["wnids"]),
    )


def versions(client: MlflowClient) -> list[ModelVersion]:
    return list(client.search_model_versions(f"name = '{NAME}'"))


def run_of(client: MlflowClient, version: ModelVersion) -> Run | None:
    """The training behind a version; None where it was registered without one, or deleted."""
    try:
        return client.get_run(version.run_id) if version.run_id else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def aliases(client: MlflowClient) -> dict[str, str]:
    try:
        found = client.get_registered_model(NAME).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
    return {name: str(version) for name, version in found.items()}


def resolve(client: MlflowClient, version: str | None) -> ModelVersion:
    version = version or aliases(client).get("candidate")
    if version is None:
        raise UserError("there is no candidate; train one with `python training/run.py`")
    known = {str(v.version): v for v in versions(client)}
    if version not in known:
        raise UserError(f"there is no version {version}; there are {', '.join(known) or 'none'}")
    return known[version]
