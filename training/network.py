"""A network: from a config, from a checkpoint of a run, or from a registered version."""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from alexnet.classifier import load_network, names_of_classes
from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec
from pipelines import storage
from pipelines.shards import Manifest
from training import checkpoint
from training.config import ModelConfig, TrainConfig

_REGISTERED = re.compile(r"models:/.+|runs:/.+|[\w-]+")


def build_model(config: TrainConfig, num_classes: int) -> AlexNet:
    """The network of a config, initialised from its seed, on the CPU."""
    torch.manual_seed(config.seed)
    network = AlexNet(
        config.model.variant,
        num_classes=num_classes,
        width=config.model.width,
        batch_norm=config.model.batch_norm,
        norm_group=config.model.norm_group,
        init=config.model.init,
    )
    for layer in network.classifier:
        if isinstance(layer, nn.Dropout):
            layer.p = config.optim.dropout
    return network


def input_spec(manifest: Manifest, config: TrainConfig) -> InputSpec:
    """Geometry and statistics of the shards, as the trained model will carry them."""
    covariance = manifest.pixels.covariance
    deviations = [math.sqrt(covariance[i][i]) for i in range(3)]
    red, green, blue = deviations if config.normalise == "mean_std" else (1.0, 1.0, 1.0)
    return InputSpec(
        resize=manifest.resize,
        crop=manifest.crop,
        mean=manifest.pixels.mean,
        std=(red, green, blue),
        covariance=covariance,
    )


@dataclass(frozen=True)
class LoadedModel:
    """network: float32 (B,3,227,227) -> logits (B, classes), on the CPU, in evaluation mode.
    wnids, class_names: of its classes, in label order."""

    name: str
    about: str
    network: torch.nn.Module
    input_spec: InputSpec
    wnids: tuple[str, ...]
    class_names: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """Such as alexnet-3 of models:/alexnet/3, or the end of a checkpoint's place."""
        return "-".join(re.findall(r"[\w.]+", self.name.removeprefix("models:")))[-60:]


def load_model(model: str) -> LoadedModel:
    """model: champion, candidate, a version's number, models:/alexnet@champion, models:/alexnet/3;
    or a folder or s3:// prefix of a checkpoint, or of a run, whose newest whole one is taken.

    Raises UserError for one that is not there, damaged, or from another release.
    """
    if _is_registered(model):
        return _registered(model)
    with _checkpoint(model) as folder:
        return _from_checkpoint(model, folder)


def lasting(model: str) -> str:
    """What `load_model` takes, in the form that stays true: the version that an alias points to
    now, a whole path. What is not there stays as it is, for `load_model` to refuse."""
    if not _is_registered(model):
        return storage.absolute(model)
    # mlflow takes seconds, and a checkpoint needs none
    from training import tracking
    from training.registry import versions

    uri = model
    if "/" not in model:
        uri = f"models:/{versions.NAME}{'/' if model.isdecimal() else '@'}{model}"
    if match := re.fullmatch(r"models:/([^/@]+)@(.+)", uri):
        client = tracking.connect(tracking.tracking_uri())
        with contextlib.suppress(*tracking.FAILURES):
            held = client.get_model_version_by_alias(match[1], match[2])
            return f"models:/{match[1]}/{held.version}"
    return uri


def check_fits(model: LoadedModel, manifest: Manifest, data: str) -> None:
    """Raises UserError, one line with what differs, when accuracy on these shards would mean
    nothing: other classes, or images cut in another way."""
    spec, differs = model.input_spec, []
    if (spec.resize, spec.crop) != (manifest.resize, manifest.crop):
        differs.append(
            f"images resized to {manifest.resize} and cut to {manifest.crop}, where it learned "
            f"from {spec.resize} and {spec.crop}"
        )
    if model.wnids != manifest.wnids:
        differs.append(_other_classes(model.wnids, manifest.wnids))
    if differs:
        raise UserError(
            f"{model.name} does not fit {data}: {'; '.join(differs)}; pass the shards that it "
            "was trained on, or others of the same classes and geometry"
        )


def _other_classes(has: tuple[str, ...], wanted: tuple[str, ...]) -> str:
    if len(has) != len(wanted):
        return f"{len(wanted)} classes, where it knows {len(has)}"
    label = next(i for i, (a, b) in enumerate(zip(has, wanted, strict=True)) if a != b)
    return f"other classes, for example label {label} is {wanted[label]}, where it has {has[label]}"


def _is_registered(model: str) -> bool:
    # Path's own would raise for a name that is too long for a file.
    return not os.path.isdir(model) and _REGISTERED.fullmatch(model) is not None  # noqa: PTH112


def _registered(model: str) -> LoadedModel:
    from training.registry import versions

    # The version is what is reported: the alias may point elsewhere tomorrow.
    uri, alias = lasting(model), model.rpartition("@")[2]
    numbered = re.fullmatch(r"models:/[^/@]+/\d+", uri) and "/" not in alias
    about = f"now {alias}" if numbered and not alias.isdecimal() else ""
    found = versions.load(uri)
    return LoadedModel(uri, about, found.network, found.input_spec, found.wnids, found.class_names)


@contextlib.contextmanager
def _checkpoint(where: str) -> Iterator[Path]:
    """A local folder, with its hashes verified, for the time of the block."""
    where = storage.absolute(where)
    if storage.exists(storage.join(where, "state.json")):
        with checkpoint.local(where) as folder:
            checkpoint.verify(folder)
            yield folder
        return
    with checkpoint.newest_good(where) as newest:
        if newest is None:
            raise UserError(
                f"{where} holds no checkpoint (no state.json); pass the folder of a run or of a "
                "checkpoint, or a registered model such as champion"
            )
        yield newest


def _from_checkpoint(name: str, folder: Path) -> LoadedModel:
    state = checkpoint.load_state(folder)
    try:
        # The fields of the model alone: where and how it was trained may have other names by now.
        fields = dataclasses.asdict(ModelConfig(**state["config"]["model"]))
        del fields["init"]
        fields |= {"num_classes": state["num_classes"], "dropout": state.get("dropout")}
        averaged = state["config"]["optim"]["ema_decay"] > 0
        about = f"recipe {state['config']['recipe']}, step {state['step']} of "
        about += f"{state['total_steps']}" + (", averaged weights" if averaged else "")
        wnids, class_names = names_of_classes(state, state["num_classes"])
        spec = InputSpec.from_json(state["input_spec"])
        network = load_network(folder / "model.safetensors", fields)
    except (LookupError, TypeError, ValueError, UserError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(
            f"checkpoint {name} is from another release ({reason}); evaluate it with that one"
        ) from error
    return LoadedModel(name, about, network, spec, wnids, class_names)
