"""From pictures of the network's size to logits, in one module; and a network from its files."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, nn

from alexnet import Variant, renamed
from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec

# Of the fields in a description; one of a later release is refused instead of misread.
LAYOUT = 1


class Classifier(nn.Module):
    """images: uint8 (N, 3, 227, 227) → logits float32 (N, classes).

    Normalises as `centre_view` does and then asks the network, so that whoever has this module, or
    an export of it, needs no statistics. They are buffers: they move to a device with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images.to(torch.float32) - self.mean) / self.std)
        return logits


@dataclass(frozen=True)
class ModelFields:
    """What makes an AlexNet of these weights; see AlexNet for the meaning."""

    variant: Variant
    num_classes: int
    width: float
    batch_norm: bool
    norm_group: int


def read_description(path: Path) -> dict[str, Any]:
    """The JSON beside the weights. Raises UserError for a damaged one and for another layout."""
    try:
        description: dict[str, Any] = json.loads(path.read_text())
        layout = description["layout"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path.name} is damaged or missing ({error!r}); register the model again"
        ) from error
    if layout != LAYOUT:
        raise UserError(
            f"{path.name} has layout {layout}, this release reads {LAYOUT}; load it with the "
            "release that wrote it"
        )
    return renamed(description)


def names_of_classes(
    description: Mapping[str, Any], num_classes: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`wnids` and `class_names` of a description, one of each for every class. Raises KeyError or
    ValueError: a name too few or too many would give a prediction to its neighbour."""
    found = []
    for field in ("wnids", "class_names"):
        names = description[field]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{field} is no list of names")
        if len(names) != num_classes:
            raise ValueError(f"{len(names)} {field} for {num_classes} classes")
        found.append(tuple(names))
    wnids, class_names = found
    return wnids, class_names


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What a safetensors file holds, on the CPU. Raises OSError and SafetensorError."""
    try:
        return load_file(path)
    except OSError:  # the file system may map no files into memory; else this says the same again
        return load(path.read_bytes())


def load_network(weights: Path, fields: Mapping[str, Any]) -> AlexNet:
    """The network of `fields` (see ModelFields) with the weights of a safetensors file, on the CPU
    and in evaluation mode. Raises UserError where the two do not belong together."""
    try:
        known = asdict(ModelFields(**fields))
        with torch.device("meta"):  # the weights would only overwrite an initialisation
            network = AlexNet(**known)
        tensors = read_tensors(weights)
        # On storage of their own: the file may vanish, or be written over, under the mapped ones.
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        expected = {name: tensor.dtype for name, tensor in network.state_dict().items()}
        if other := [name for name in copies if copies[name].dtype != expected.get(name)]:
            raise ValueError(f"{other[0]} is {copies[other[0]].dtype}")
        network.load_state_dict(copies, assign=True)
    except (OSError, SafetensorError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{weights.name} does not hold the weights of this network ({reason}); register the "
            "model again"
        ) from error
    return network.eval()
