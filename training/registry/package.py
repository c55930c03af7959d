"""What a training leaves in the registry."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from dataclasses import asdict
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from safetensors import SafetensorError
from safetensors.torch import save_file

import alexnet
from alexnet import DROPOUT, NETWORK_SIDE
from alexnet.classifier import LAYOUT, ModelFields
from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec
from pipelines import shards
from training import checkpoint, figures, store, tracking
from training.accuracy import document
from training.config import TrainConfig
from training.evaluate import score
from training.metrics import metric_history, metrics_of, name_in_mlflow
from training.network import build_model
from training.registry import card
from training.registry.versions import DESCRIPTION, SUMS, WEIGHTS, file_sums, sha256

logger = logging.getLogger("training")

_LOGGED = "alexnet"  # name and kind of a run's model: what it is, whatever it is registered as
_REQUIRED = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "torch")


def register(
    client: MlflowClient,
    run_id: str,
    folder: Path,
    manifest: shards.Manifest,
    config: TrainConfig,
    *,
    workers: int | None = None,
) -> str | None:
    """Logs a finished run's figures, card and model; returns the new version's number.

    folder: the last checkpoint. workers: processes on Ray to score the val split with; None does
    it here. The run gets `figures/`, `evaluation/classes.json` and `card/card.md`, the version what
    pyfunc_model.py needs: weights, alexnet.json and the package `alexnet`, without pickle. The
    version comes last, with all of its tags, so that there is never half of one; then alias
    `candidate` moves to it. None when config.register is off. A run that was registered, and killed
    before it could say so, is not registered a second time.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    name = config.model_name
    if config.register and (before := _registered_before(client, name, run_id, folder)):
        client.set_registered_model_alias(name, "candidate", before)
        return before
    state = checkpoint.load_state(folder)
    _complete(client, run_id, state)
    network = build_model(config, manifest.num_classes).eval()
    network.load_state_dict(checkpoint.load_tensors(folder, "model"))
    spec = InputSpec.from_json(state["input_spec"])
    _log_figures(client, run_id, network, spec, manifest, config)
    if not config.synthetic:
        _log_evaluation(client, run_id, network, spec, manifest, config, workers)
    text = card.write(client, run_id, network, manifest, config)
    if not config.register:
        return None
    description = _description(spec, manifest, config)
    with tempfile.TemporaryDirectory(prefix="register-") as temporary:
        model_id, sums = _log_model(client, run_id, network, description, Path(temporary))
    _link_metrics(client, run_id, model_id, manifest)
    tags = {"recipe": config.recipe, **tracking.variant_tags(config), **sums}
    tags["validation_status"] = "pending"
    _make_sure_of_name(client, name)
    source: dict[str, str] = {"source": f"models:/{model_id}", "model_id": model_id}
    if store.registry_uri(client.tracking_uri) != client.tracking_uri:  # it knows no such model
        source = {"source": client.get_logged_model(model_id).artifact_location}
    version = client.create_model_version(
        name, run_id=run_id, tags=tags, description=text, await_creation_for=0, **source
    )
    # Which a server does itself.
    link = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: link})
    client.set_registered_model_alias(name, "candidate", version.version)
    return str(version.version)


def _registered_before(client: MlflowClient, name: str, run_id: str, folder: Path) -> str | None:
    """The number of this run's version with the weights of a checkpoint."""
    weights = sha256(folder / "model.safetensors")
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if version.tags.get("weights_sha256") == weights:
            return str(version.version)
    return None


def _complete(client: MlflowClient, run_id: str, state: dict[str, Any]) -> None:
    """The figures of the last evaluation, as the checkpoint has them, where they never reached the
    run: without them the gate could never pass its version."""
    known = metrics_of(client.get_run(run_id))
    now, step = round(time.time() * 1000), int(state["evaluated_step"])
    lost = {key: value for key, value in state["metrics"].items() if known.get(key) != value}
    if lost:
        rows = [Metric(name_in_mlflow(key), value, now, step) for key, value in lost.items()]
        client.log_batch(run_id, rows)


def _log_figures(
    client: MlflowClient,
    run_id: str,
    network: AlexNet,
    spec: InputSpec,
    manifest: shards.Manifest,
    config: TrainConfig,
) -> None:
    keys = ("loss", "top1", "val_loss", "val_top1")
    history = {key: metric_history(client, run_id, key) for key in keys}
    curves = figures.curves(history, str(config.name))
    client.log_figure(run_id, curves, "figures/curves.png")
    kernels = figures.conv1_kernels(network.conv1.weight)
    client.log_figure(run_id, kernels, "figures/conv1_kernels.png")
    data = client.get_run(run_id).data.tags["data"]
    try:
        top5 = figures.top5(network, spec, manifest, data)
    except UserError as error:
        logger.warning(f"figures/top5.png is left out: {error}")
    else:
        client.log_figure(run_id, top5, "figures/top5.png")


def _log_evaluation(
    client: MlflowClient,
    run_id: str,
    network: AlexNet,
    spec: InputSpec,
    manifest: shards.Manifest,
    config: TrainConfig,
    workers: int | None,
) -> None:
    """Where the network goes wrong on the val split: accuracy by class as a table, the confusion
    matrix and the most confident errors as pictures. Once: MLflow adds to a table that is there."""
    import pandas as pd

    if client.list_artifacts(run_id, "evaluation"):
        return
    data, name = client.get_run(run_id).data.tags["data"], str(config.name)
    try:
        scored = score(
            network, spec, data, manifest, workers=workers, shared_fs=config.shared_fs, label="val"
        )
        found = document(scored, manifest)
        errors = figures.most_confident_errors(found["mistakes"], data, manifest, "val", name)
    except UserError as error:
        logger.warning(f"the confusion matrix and the errors are left out: {error}")
        return
    matrix = figures.confusion(scored.confusion, manifest.class_names, name)
    client.log_figure(run_id, matrix, "figures/confusion.png")
    client.log_figure(run_id, errors, "figures/mistakes.png")
    # As objects, since MLflow's way to look for columns of text is deprecated in pandas.
    table = pd.DataFrame(found["classes"], dtype=object)
    client.log_table(run_id, table, "evaluation/classes.json")


def _description(spec: InputSpec, manifest: shards.Manifest, config: TrainConfig) -> dict[str, Any]:
    fields = asdict(config.model)
    del fields["init"]  # how the weights began
    dropout = DROPOUT.get(config.model.variant)
    model = asdict(ModelFields(**fields, num_classes=manifest.num_classes, dropout=dropout))
    if dropout is None:
        del model["dropout"]  # which earlier releases do not know
    return {
        "layout": LAYOUT,
        "model": model,
        "variant": config.model.variant,
        "recipe": config.recipe,
        "preprocessing": (
            f"an image as 8-bit RGB; its shorter side resized to {spec.resize} by antialiased "
            f"Lanczos; the middle {spec.crop}×{spec.crop}, of that the middle "
            f"{NETWORK_SIDE}×{NETWORK_SIDE}; per channel (pixel − mean) / std of input_spec. An "
            "exported file begins with that last step: uint8 (N, 3, 227, 227) in, logits out"
        ),
        "input_spec": spec.to_json(),
        "class_names": list(manifest.class_names),
        "wnids": list(manifest.wnids),
        "manifest_sha256": manifest.digest,
    }


def _log_model(
    client: MlflowClient, run_id: str, network: AlexNet, description: dict[str, Any], folder: Path
) -> tuple[str, dict[str, str]]:
    """The id of the run's new MLflow model, and the version's tags that vouch for its files.

    `mlflow.pyfunc.log_model` would do most of this, but it uploads before anybody can take the
    files' hashes, and it needs an active run, whose status it then changes.
    """
    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, _LOGGED, run_id, params=run.data.params, model_type=_LOGGED
    )
    try:
        saved = Model(_LOGGED, run_id, model_uuid=logged.model_id, model_id=logged.model_id)
        _save(network, description, folder, saved)
        for compiled in [*(folder / "model").rglob("__pycache__")]:  # of MLflow, which tried it
            shutil.rmtree(compiled)
        sums = folder / "model" / SUMS
        sums.write_text(file_sums(folder / "model"))
        client.log_model_artifacts(logged.model_id, str(folder / "model"))
    except BaseException:
        with contextlib.suppress(*tracking.FAILURES):  # the first failure is the one to tell
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.finalize_logged_model(logged.model_id, "READY")
    weights = sha256(folder / "model" / WEIGHTS)
    return logged.model_id, {"artifacts_sha256": sha256(sums), "weights_sha256": weights}


def _link_metrics(
    client: MlflowClient, run_id: str, model_id: str, manifest: shards.Manifest
) -> None:
    """Says of the values of the last evaluation that they are of this model and data set. With the
    time that they have in the run, which then holds none of them twice."""
    run = client.get_run(run_id)
    _, val = tracking.inputs(manifest, run.data.tags["data"])
    data = val.dataset
    histories = (
        client.get_metric_history(run_id, key) for key in run.data.metrics if key[:4] == "val/"
    )
    last = [max(history, key=lambda point: (point.step, point.timestamp)) for history in histories]
    client.log_batch(
        run_id,
        [
            Metric(m.key, m.value, m.timestamp, m.step, model_id, data.name, data.digest, run_id)
            for m in last
        ],
    )


def _save(network: AlexNet, description: dict[str, Any], folder: Path, saved: Model) -> None:
    """Writes folder/model."""
    import mlflow.pyfunc

    weights, beside = folder / Path(WEIGHTS).name, folder / Path(DESCRIPTION).name
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    try:
        save_file(tensors, weights)
    except SafetensorError as error:
        raise UserError(
            f"the model cannot be written to {folder} ({error}); make room there or set TMPDIR, "
            "then run the same command again"
        ) from error
    _write_description(description, beside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow about its own use of pandas
        mlflow.pyfunc.save_model(
            folder / "model",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"weights": str(weights), "description": str(beside)},
            code_paths=[str(Path(alexnet.__file__).parent)],
            signature=_signature(),
            input_example=_example(),
            pip_requirements=[f"{name}=={installed(name).split('+')[0]}" for name in _REQUIRED],
            mlflow_model=saved,
        )


def _signature() -> ModelSignature:
    """pyfunc_model.py says why MLflow is not to check what goes in: `predict` does."""
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image")]),
        outputs=Schema(
            [
                ColSpec(Array(DataType.string), "classes"),
                ColSpec(Array(DataType.double), "probabilities"),
            ]
        ),
        params=ParamSchema([ParamSpec("top_k", DataType.long, 5)]),
    )
    signature._is_signature_from_type_hint = True
    return signature


def _example() -> dict[str, list[str]]:
    """One small image, a gradient, as base64 text of its PNG file."""
    import base64
    import io

    import numpy as np
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)).save(
        content, "PNG"
    )
    return {"image": [base64.b64encode(content.getvalue()).decode()]}


def _write_description(description: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(description, indent=1))


def _make_sure_of_name(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
