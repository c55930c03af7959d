"""The weights that a run begins with, where they are not drawn: --init-from.

The driver reads them once, checks that they are of the network to be trained, and keeps them beside
the run's checkpoints, where workers on any node find the same bytes.
"""

import dataclasses
import hashlib
import re
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import Manifest
from training import network
from training.config import TrainConfig

_KEPT = r"initial-([0-9a-f]{64})\.safetensors"
_HEAD = ("classifier.fc8.weight", "classifier.fc8.bias")


@dataclass(frozen=True)
class Initial:
    """weights: of the network to be trained, by name; without those of its last layer where the
    classes are others. said: where they are from, for a log line."""

    said: str
    weights: dict[str, torch.Tensor]


def load_initial(config: TrainConfig, manifest: Manifest) -> Initial:
    """What `config.init_from` names, a registered model, the folder of a run or checkpoint, or a
    safetensors file with weights alone.

    Raises UserError for what is not there or damaged, and for weights of another network.
    """
    source = str(config.init_from)
    wnids, weights = _read(source)
    with torch.device("meta"):
        wanted = network.build_model(config, manifest.num_classes).state_dict()
    if differs := _differences(weights, wanted):
        raise UserError(
            f"--init-from {source} is of another network ({differs}); train with its own "
            "--model.variant, --model.width and --model.batch-norm, or begin with other weights"
        )
    classes = len(weights[_HEAD[0]])
    same = classes == manifest.num_classes and wnids in (None, manifest.wnids)
    if not same:
        weights = {key: value for key, value in weights.items() if key not in _HEAD}
    head = "" if same else f", without the last layer, whose {classes:,} classes are others"
    return Initial(f"begins with the weights of {source}{head}", weights)


def _read(source: str) -> tuple[tuple[str, ...] | None, dict[str, torch.Tensor]]:
    """The WNIDs, where they are known, and the weights."""
    if not source.endswith(".safetensors"):
        found = network.load_model(source)
        return found.wnids, found.network.state_dict()
    try:
        return None, load(storage.read(source))
    except SafetensorError as error:
        raise UserError(
            f"--init-from {source} is no safetensors file ({error}); pass one, "
            "models:/alexnet@champion or run:NAME"
        ) from error


def _differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> str:
    """ "" where all but the last layer's classes are alike."""
    for name in sorted(found.keys() ^ wanted.keys()):
        return f"it has {'no' if name in wanted else 'a'} {name}"
    for name, tensor in found.items():
        first = 1 if name in _HEAD else 0
        has, needs = tuple(tensor.shape), tuple(wanted[name].shape)
        if has[first:] != needs[first:] or tensor.dtype != wanted[name].dtype:
            return f"its {name} is {has} of {tensor.dtype}, not {needs} of {wanted[name].dtype}"
    return ""


def lasting(config: TrainConfig) -> TrainConfig:
    """With --init-from in the form that stays true, since a run goes on with it alone."""
    source = str(config.init_from)
    if config.init_from is None:
        return config
    if run := re.fullmatch(r"run:(.+)", source):
        source = storage.join(str(config.storage), run[1])
    whole = storage.absolute if source.endswith(".safetensors") else network.lasting
    return dataclasses.replace(config, init_from=whole(source))


def keep(initial: Initial, folder: str) -> None:
    """Writes the weights into the run's folder, under their own hash, in place of others."""
    content = save(initial.weights)
    name = f"initial-{hashlib.sha256(content).hexdigest()}.safetensors"
    for other, _ in storage.list_files(folder):
        if re.fullmatch(_KEPT, other) and other != name:
            storage.delete(storage.join(folder, other))
    storage.write(storage.join(folder, name), content)


def read_kept(folder: str) -> dict[str, torch.Tensor]:
    """Raises UserError where they are gone, or not what was kept."""
    for name, _ in storage.list_files(folder):
        if kept := re.fullmatch(_KEPT, name):
            content = storage.read(storage.join(folder, name))
            if hashlib.sha256(content).hexdigest() == kept[1]:
                return load(content)
    raise UserError(
        f"the weights that this run begins with are gone from {folder}, or damaged; train anew "
        "under another --name"
    )
