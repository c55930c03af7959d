"""What a training leaves in the registry."""

import json
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

from alexnet.preprocess import NETWORK_SIDE
from pipelines import shards
from training import checkpoint, figures, tracking
from training.config import TrainConfig
from training.loop import build_model
from training.registry.versions import DESCRIPTION, NAME


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
        extra = Path(beside) / DESCRIPTION
        extra.write_text(json.dumps(description, indent=1))
        info = _log_model(run_id, model.eval(), extra)
    version = mlflow.register_model(info.model_uri, NAME).version
    for key, value in (("recipe", config.recipe), ("variant", config.model.variant)):
        client.set_model_version_tag(NAME, version, key, value)
    client.set_registered_model_alias(NAME, "candidate", version)
    return str(version)


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
