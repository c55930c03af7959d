"""From the files of a model and of images to classes: all that a registered version needs."""

import io
import json
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, nn

from alexnet import Variant, former_network, renamed
from alexnet.errors import UserError, reason
from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec, centre_view

# Of the fields in a description; one of a later release is refused instead of misread.
LAYOUT = 1
BATCH_SIZE = 64
# Not all that Pillow knows: some readers start other programs (EPS), and most are seldom tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

Name = TypeVar("Name")


class Classifier(nn.Module):
    """images: uint8 (N, 3, 227, 227) → logits float32 (N, classes).

    Normalises as `centre_view` does and then asks the network, so that whoever has this module, or
    an export of it, needs no statistics. They are buffers: they move to a device with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, spec: InputSpec, class_names: Sequence[str] = ()
    ) -> None:
        """class_names: in label order, for whoever has to name what is found."""
        super().__init__()
        self.network, self.class_names = network, tuple(class_names)
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images.to(torch.float32) - self.mean) / self.std)
        return logits


@dataclass(frozen=True)
class ModelFields:
    """What makes an AlexNet of these weights; see AlexNet for the meaning. dropout: see DROPOUT."""

    variant: Variant
    num_classes: int
    width: float
    batch_norm: bool
    norm_group: int
    dropout: str | None = None


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
    and in evaluation mode. Raises UserError where the two do not belong together, and for weights
    of a network that this release has no more."""
    try:
        known = asdict(ModelFields(**fields))
        if former := former_network(known["variant"], known.pop("dropout")):
            raise UserError(f"{weights.name} is of {former}; use the release that wrote it")
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
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"{weights.name} does not hold the weights of this network ({why}); register the model "
            "again"
        ) from error
    return network.eval()


class Described(NamedTuple):
    """What a model's files hold; wnids and class_names in label order."""

    network: AlexNet
    input_spec: InputSpec
    class_names: tuple[str, ...]
    wnids: tuple[str, ...]
    description: dict[str, Any]


def read_model(weights: Path) -> Described:
    """From model.safetensors and the alexnet.json beside it, as a registered version holds them
    among its artifacts; on the CPU, in evaluation mode. Raises UserError where either is missing,
    damaged or of another release."""
    description = read_description(weights.with_name("alexnet.json"))
    try:
        network = load_network(weights, description["model"])
        wnids, class_names = names_of_classes(description, description["model"]["num_classes"])
        spec = InputSpec.from_json(description["input_spec"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{weights.parent}: its alexnet.json lacks what is needed ({error!r}); register the "
            "model again"
        ) from error
    return Described(network, spec, class_names, wnids, description)


def load_classifier(weights: str | Path) -> Classifier:
    """`read_model`, ready for uint8 images."""
    found = read_model(Path(weights))
    return Classifier(found.network, found.input_spec, found.class_names).eval()


def decode(image: str | Path | bytes) -> Tensor:
    """A file's path or its content → uint8 (3, H, W), RGB, on the CPU.

    Strict: a truncated file is an error, never half grey. An orientation in EXIF is ignored, as it
    is when shards are built; whatever has another colour model becomes RGB.

    Raises UserError for a file that is missing, unreadable, damaged, none of FORMATS, beyond
    Pillow's limit of pixels, or grey with more than 8 bits, which Pillow would cut to white.
    """
    name = "the image" if isinstance(image, bytes) else str(image)
    try:
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}; give an image file") from error
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, of no consequence here, and up to twice its pixel limit.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                if opened.mode[0] in "IF":  # 16- or 32-bit whole numbers, or floats
                    raise UserError(f"{name} has more than 8 bits per pixel; save it with 8 first")
                pixels = np.array(opened.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller first"
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"cannot decode {name} (it is none of {', '.join(FORMATS)}); give a whole JPEG or PNG"
        ) from error
    # What Pillow's readers raise on damaged files is not one family.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        raise UserError(
            f"cannot decode {name} ({reason(error)}); give a whole JPEG or PNG"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def top_k(
    model: nn.Module, images: Tensor, spec: InputSpec, class_names: Sequence[Name], k: int
) -> list[list[tuple[Name, float]]]:
    """images: uint8 (N, 3, crop, crop) → for each the k likeliest (class name, probability), where
    a name is whatever stands for a class. Fewer than k where there are fewer classes.

    Uses the centre view, on the model's device; the model is in evaluation mode. Raises UserError
    for k below 1.
    """
    if k < 1:
        raise UserError(f"cannot list the {k} likeliest classes; ask for 1 or more")
    device = next(model.parameters()).device
    found = []
    for at in range(0, len(images), BATCH_SIZE):
        with torch.inference_mode():
            views = centre_view(images[at : at + BATCH_SIZE].to(device), spec)
            values, classes = model(views).softmax(-1).topk(min(k, len(class_names)))
        for labels, shares in zip(classes.tolist(), values.tolist(), strict=True):
            found.append([(class_names[i], share) for i, share in zip(labels, shares, strict=True)])
    return found
