"""The registered model `alexnet`: candidate, champion, and the gate between them.

    python -m training.registry list
    python -m training.registry promote [--version V] [--data OUT]
    python -m training.registry rollback

Exit codes: 0 done, 1 the gate refused, 2 wrong usage or input.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

from alexnet.errors import UserError
from alexnet.preprocess import NETWORK_SIDE, InputSpec
from pipelines import shards
from training import checkpoint, figures, tracking
from training.config import TrainConfig
from training.evaluate import Metrics, evaluate
from training.loader import Loader
from training.loop import build_model

NAME = "alexnet"
# The exported float32 program on another machine may round differently: a picture or two at the
# border may flip, no more.
_TOP1_TOLERANCE = 0.005
_LOSS_TOLERANCE = 0.01  # relative
_DESCRIPTION = "alexnet.json"


@dataclass(frozen=True)
class Registered:
    """A version as it comes out of the registry: the network and what travels with it."""

    network: torch.nn.Module  # float32 (N,3,227,227) -> logits (N, classes)
    input_spec: InputSpec
    class_names: tuple[str, ...]
    wnids: tuple[str, ...]


def register(
    client: MlflowClient, run_id: str, folder: Path, manifest: shards.Manifest, config: TrainConfig
) -> str | None:
    """Logs a finished training's pictures and model to its run; returns the new version's number.

    folder: the last checkpoint. The model is a `torch.export` program without pickle, float32 in,
    logits out, any batch size, loadable on a CPU; class names, geometry and statistics lie beside
    it. Alias `candidate` moves to the new version; None when config.register is off.
    """
    state = checkpoint.load_state(folder)
    model = build_model(config, manifest.num_classes)
    checkpoint.load_model(folder, model)
    keys = ("loss", "top1", "val_loss", "val_top1")
    history = {key: tracking.metric_history(client, run_id, key) for key in keys}
    curves = figures.curves(history, str(config.name))
    client.log_figure(run_id, curves, "figures/curves.png")
    kernels = figures.conv1_kernels(model.conv1.weight)
    client.log_figure(run_id, kernels, "figures/conv1_kernels.png")
    if not config.register:
        return None
    description = {
        "variant": config.model.variant,
        "recipe": config.recipe,
        "input_spec": state["input_spec"],
        "class_names": manifest.class_names,
        "wnids": manifest.wnids,
        "manifest_sha256": manifest.digest,
    }
    with tempfile.TemporaryDirectory() as beside:
        extra = Path(beside) / _DESCRIPTION
        extra.write_text(json.dumps(description, indent=1))
        info = _log_model(run_id, model.eval(), extra)
    version = mlflow.register_model(info.model_uri, NAME).version
    for key, value in (("recipe", config.recipe), ("variant", config.model.variant)):
        client.set_model_version_tag(NAME, version, key, value)
    client.set_registered_model_alias(NAME, "candidate", version)
    return str(version)


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
        description = json.loads((folder / "extra_files" / _DESCRIPTION).read_text())
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


def list_versions(client: MlflowClient) -> str:
    """A table of all versions, newest first."""
    lines = [f"{'version':<8}{'alias':<20}{'recipe':<8}{'val top-1':<11}{'run':<30}champion before"]
    aliases = _aliases(client)
    for version in sorted(_versions(client), key=lambda v: -int(v.version)):
        run = _run_of(client, version)
        number = str(version.version)
        held = ", ".join(sorted(alias for alias, v in aliases.items() if v == number))
        name = run.info.run_name if run else ""
        top1 = run.data.metrics.get("val_top1") if run else None
        lines.append(
            f"{number:<8}{held:<20}{version.tags.get('recipe', ''):<8}"
            f"{'' if top1 is None else format(top1, '.4f'):<11}{name:<30}"
            f"{version.tags.get('previous_champion', '')}"
        )
    return "\n".join(lines)


def promote(client: MlflowClient, version: str | None, data: str | None) -> list[str]:
    """Makes a version the champion if it is as good as it says and no worse than the present one.

    Returns the lines that tell it. Raises Refused with the reason, and moves nothing then.
    """
    candidate = _resolve(client, version)
    number = str(candidate.version)
    champion = _aliases(client).get("champion")
    if champion == number:
        return [f"version {champion} is the champion already"]
    run = _run_of(client, candidate)
    if run is None or "manifest_sha256" not in run.data.tags:
        raise Refused(f"version {number} was not registered by training/run.py: no run to check")
    data = data or run.data.tags["data"]
    manifest = shards.load_manifest(data)
    if manifest.digest != run.data.tags["manifest_sha256"]:
        raise Refused(
            f"{data} is not the data set of version {number} (manifest "
            f"{manifest.digest[:12]}, trained on {run.data.tags['manifest_sha256'][:12]}); "
            "pass the right one with --data"
        )
    found = _measure(number, data, manifest)
    _compare_with_logged(number, found, run.data.metrics)
    lines = [_told(number, found, "recomputed, equals the logged metrics")]
    if champion is not None:
        before = _measure(champion, data, manifest)
        lines.append(_told(champion, before, "champion so far"))
        if found.top1 < before.top1:
            raise Refused(
                f"version {number} has val top-1 {found.top1:.4f}, champion {champion} "
                f"has {before.top1:.4f} on the same {found.images} pictures"
            )
        client.set_model_version_tag(NAME, number, "previous_champion", champion)
    client.set_model_version_tag(NAME, number, "promoted_val_top1", str(found.top1))
    client.set_registered_model_alias(NAME, "champion", number)
    return [*lines, f"version {number} is the champion: models:/{NAME}@champion"]


def rollback(client: MlflowClient) -> list[str]:
    """Gives the alias back to the champion before; returns the lines that tell it."""
    champion = _aliases(client).get("champion")
    if champion is None:
        raise Refused("there is no champion to roll back; promote one first")
    previous = client.get_model_version(NAME, champion).tags.get("previous_champion")
    if previous is None:
        raise Refused(f"champion {champion} had none before it; promote another version instead")
    client.set_registered_model_alias(NAME, "champion", previous)
    return [f"version {previous} is the champion again, {champion} is not"]


class Refused(Exception):
    """The gate's no; the text is the reason."""


def _log_model(run_id: str, model: torch.nn.Module, extra: Path) -> Any:
    shape = (-1, 3, NETWORK_SIDE, NETWORK_SIDE)
    classes = model(torch.zeros(1, 3, NETWORK_SIDE, NETWORK_SIDE)).shape[1]
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("float32"), shape)]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, classes))]),
    )
    with mlflow.start_run(run_id=run_id):
        return mlflow.pytorch.log_model(
            model,
            name=NAME,
            signature=signature,
            # Two pictures: with one, the exported batch dimension would be fixed at one.
            input_example=np.zeros((2, 3, NETWORK_SIDE, NETWORK_SIDE), dtype=np.float32),
            serialization_format="pt2",
            extra_files=[str(extra)],
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", "numpy"],
        )


def _measure(version: str, data: str, manifest: shards.Manifest) -> Metrics:
    model = load(f"models:/{NAME}/{version}")
    if model.wnids != manifest.wnids:
        raise Refused(f"version {version} knows other classes than {data}")
    threads = os.cpu_count() or 1
    with Loader(data, manifest, "val", threads=threads, cache_gb=20) as loader:
        return evaluate(model.network, loader, model.input_spec, device=torch.device("cpu"))


def _compare_with_logged(version: str, found: Metrics, logged: dict[str, float]) -> None:
    top1, loss = logged.get("val_top1"), logged.get("val_loss")
    if top1 is None or loss is None:
        raise Refused(f"the run of version {version} has no val_top1 and val_loss to compare with")
    off = abs(found.top1 - top1) > max(_TOP1_TOLERANCE, 2 / found.images)
    if off or abs(found.loss - loss) > _LOSS_TOLERANCE * max(1.0, loss):
        raise Refused(
            f"version {version} as loaded has val top-1 {found.top1:.4f} and loss "
            f"{found.loss:.4f}, its run logged {top1:.4f} and {loss:.4f}: not the model it claims"
        )


def _told(version: str, metrics: Metrics, note: str) -> str:
    return (
        f"version {version}: val top-1 {metrics.top1:.4f}, top-5 {metrics.top5:.4f}, loss "
        f"{metrics.loss:.4f} on {metrics.images} pictures ({note})"
    )


def _versions(client: MlflowClient) -> list[ModelVersion]:
    return list(client.search_model_versions(f"name = '{NAME}'"))


def _run_of(client: MlflowClient, version: ModelVersion) -> Run | None:
    """The training behind a version; None where it was registered without one, or deleted."""
    try:
        return client.get_run(version.run_id) if version.run_id else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _aliases(client: MlflowClient) -> dict[str, str]:
    try:
        aliases = client.get_registered_model(NAME).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
    return {name: str(version) for name, version in aliases.items()}


def _resolve(client: MlflowClient, version: str | None) -> ModelVersion:
    version = version or _aliases(client).get("candidate")
    if version is None:
        raise UserError("there is no candidate; train one with `python training/run.py`")
    known = {str(v.version): v for v in _versions(client)}
    if version not in known:
        raise UserError(f"there is no version {version}; there are {', '.join(known) or 'none'}")
    return known[version]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m training.registry", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all versions with their aliases and accuracy")
    gate = commands.add_parser("promote", help="check the candidate and make it the champion")
    gate.add_argument("--version", help="a version's number; alias `candidate` by default")
    gate.add_argument("--data", help="where the run's shards are now, if they were moved")
    commands.add_parser("rollback", help="give the alias back to the champion before")
    args = parser.parse_args(argv)
    try:
        client = tracking.connect(tracking.tracking_uri())
        if args.command == "list":
            print(list_versions(client))
        else:
            promoting = args.command == "promote"
            lines = promote(client, args.version, args.data) if promoting else rollback(client)
            print("\n".join(lines))
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
