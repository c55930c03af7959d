"""From picture files to class names with probabilities."""

import io
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from alexnet.errors import UserError
from alexnet.preprocess import InputSpec, centre_view

BATCH_SIZE = 64
# Not all that Pillow knows: some readers start other programs (EPS), and most are seldom tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

Name = TypeVar("Name")


def decode(picture: str | Path | bytes) -> Tensor:
    """A file's path or its content → uint8 (3, H, W), RGB, on the CPU.

    Strict: a truncated file is an error, never half grey. An orientation in EXIF is ignored, as it
    is when shards are built; whatever has another colour model becomes RGB.

    Raises UserError for a file that is missing, unreadable, damaged, none of FORMATS, beyond
    Pillow's limit of pixels, or grey with more than 8 bits, which Pillow would cut to white.
    """
    name = "the picture" if isinstance(picture, bytes) else str(picture)
    try:
        content = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}; give a picture file") from error
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, which is of no consequence here, and between one and two
            # times its limit of pixels it only warns as well.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.mode[0] in "IF":  # 16- or 32-bit whole numbers, or floats
                    raise UserError(f"{name} has more than 8 bits per pixel; save it with 8 first")
                pixels = np.array(image.convert("RGB"))
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
        reason = " ".join(str(error).split())
        raise UserError(f"cannot decode {name} ({reason}); give a whole JPEG or PNG") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def top_k(
    model: nn.Module, images: Tensor, spec: InputSpec, class_names: Sequence[Name], k: int
) -> list[list[tuple[Name, float]]]:
    """images: uint8 (N, 3, crop, crop) → for each the k likeliest (class name, probability), where
    a name is whatever stands for a class.

    Uses the centre view, on the model's device, with dropout off; the model's mode is as before
    afterwards. Fewer than k where there are fewer classes.

    Raises UserError for k below 1, or when the names are not as many as the model's classes.
    """
    if k < 1:
        raise UserError(f"cannot list the {k} likeliest classes; ask for 1 or more")
    device = next(model.parameters()).device
    was_training = model.training
    if was_training:  # an exported program is in evaluation mode and refuses to be told so
        model.eval()
    try:
        with torch.inference_mode():
            batches = [
                model(centre_view(images[at : at + BATCH_SIZE].to(device), spec)).softmax(-1).cpu()
                for at in range(0, len(images), BATCH_SIZE)
            ]
    finally:
        if was_training:
            model.train()
    return [_likeliest(row, class_names, k) for batch in batches for row in batch]


def _likeliest(
    probabilities: Tensor, class_names: Sequence[Name], k: int
) -> list[tuple[Name, float]]:
    if len(probabilities) != len(class_names):
        raise UserError(
            f"{len(class_names)} class names do not fit a model of {len(probabilities)} classes; "
            "take the names that belong to the model"
        )
    values, classes = probabilities.topk(min(k, len(probabilities)))
    return [
        (class_names[index], value)
        for index, value in zip(classes.tolist(), values.tolist(), strict=True)
    ]
