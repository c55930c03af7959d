"""What `mlflow.pyfunc.load_model("models:/alexnet@champion")` gives: images in, classes out.

MLflow copies this file into each registered model and runs it there (a model "from code", without
pickle), beside a copy of the package `alexnet`; nothing else of this project is there.

The signature is marked as one from type hints: `predict` checks what comes in, where MLflow 3.17
would force it into one data frame or one tensor, and either refuses half of what `predict` takes.
Over HTTP a request then has it as "inputs", and no other way.
"""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from alexnet import NETWORK_SIDE
from alexnet.classifier import BATCH_SIZE, Classifier, decode, load_network, read_description
from alexnet.errors import UserError
from alexnet.preprocess import InputSpec, resize_and_crop

IMAGE = "image"


class AlexNetModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """On the CPU. State: the network, its class names, the geometry of its images."""

    def load_context(self, context: Any) -> None:
        description = read_description(Path(context.artifacts["description"]))
        self._spec = InputSpec.from_json(description["input_spec"])
        network = load_network(Path(context.artifacts["weights"]), description["model"])
        self._classifier = Classifier(network, self._spec).eval()
        self._class_names: list[str] = description["class_names"]

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """model_input: one of
          images  the content of an image file as bytes or as base64 text, a list of these, or a
                    data frame or dictionary with them as `image`; resized and cut as the shards of
                    the training were
          pixels    whole numbers 0..255, (N, 3, 227, 227), RGB, taken as they are
        params: `top_k`, how many classes to name for each, 5 by default.

        A row for each image in the order given: `classes`, a list of names, the likeliest first,
        and `probabilities`, a list of floats. Fewer than top_k where there are fewer classes.
        Raises MlflowException (400 over HTTP), one line, naming the place of a broken image.
        """
        top_k = int((params or {}).get("top_k", 5))
        if top_k < 1:
            raise _refusal(f"top_k {top_k} is below 1; ask for 1 class or more")
        if isinstance(model_input, pd.DataFrame | dict):
            if IMAGE not in model_input:
                columns = ", ".join(map(str, model_input))
                raise _refusal(f"there is no column {IMAGE!r}, but {columns}; name it so")
            model_input = model_input[IMAGE]
        pixels = _pixels(model_input)
        images = model_input if pixels is not None else _images(model_input)
        rows: list[tuple[list[str], list[float]]] = []
        for at in range(0, len(images), BATCH_SIZE):
            batch = self._prepared(images, at) if pixels is None else pixels[at : at + BATCH_SIZE]
            rows += self._likeliest(batch, top_k)
        return pd.DataFrame(rows, columns=["classes", "probabilities"])

    def _prepared(self, images: Sequence[Any], at: int) -> Tensor:
        """uint8 (B, 3, 227, 227): the next batch, the middle of what the shards would hold."""
        margin = (self._spec.crop - NETWORK_SIDE) // 2
        window = slice(margin, margin + NETWORK_SIDE)
        cut = []
        for number, image in enumerate(images[at : at + BATCH_SIZE], start=at + 1):
            try:
                whole = decode(_content(image))
                stored = resize_and_crop(whole, self._spec.resize, self._spec.crop)
            except UserError as error:
                raise _refusal(f"image {number} of {len(images)}: {error}") from error
            cut.append(stored[:, window, window])
        return torch.stack(cut)

    def _likeliest(self, images: Tensor, top_k: int) -> list[tuple[list[str], list[float]]]:
        with torch.inference_mode():
            probabilities = self._classifier(images).softmax(1)
        values, classes = probabilities.topk(min(top_k, probabilities.shape[1]))
        return [
            ([self._class_names[label] for label in labels], shares)
            for labels, shares in zip(classes.tolist(), values.tolist(), strict=True)
        ]


def _pixels(given: Any) -> Tensor | None:
    """uint8 (N, 3, 227, 227), or None for what is no array of numbers."""
    if not (isinstance(given, np.ndarray) and given.dtype.kind in "biufc"):
        return None
    wanted = f"pixels are whole numbers 0..255, (N, 3, {NETWORK_SIDE}, {NETWORK_SIDE})"
    if given.shape[1:] != (3, NETWORK_SIDE, NETWORK_SIDE) or len(given) == 0:
        raise _refusal(f"{wanted}; these are {given.shape}")
    if given.dtype.kind not in "iu":
        raise _refusal(f"{wanted}; these are {given.dtype}, give them as they were in the image")
    if given.dtype != np.uint8 and not (given.min() >= 0 and given.max() <= 255):
        raise _refusal(f"{wanted}; these go from {given.min()} to {given.max()}")
    return torch.from_numpy(np.array(given, dtype=np.uint8))


def _images(given: Any) -> list[Any]:
    if isinstance(given, np.ndarray):  # of text, which is what a server makes of a JSON list
        given = given.ravel()
    images = [given] if isinstance(given, bytes | str) else list(given)
    if not images:
        raise _refusal("there is no image; give one or more")
    return images


def _content(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise UserError(f"it is {type(image).__name__}; give bytes or base64 text")
    try:
        return base64.b64decode("".join(image.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"it is no base64 text ({error}); encode the image's file so") from error


def _refusal(line: str) -> Exception:
    return mlflow.exceptions.MlflowException.invalid_parameter_value(line)  # type: ignore[no-any-return]


mlflow.models.set_model(AlexNetModel())
