"""Picture files and folders of them to named classes, a few at a time."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from alexnet.errors import UserError
from alexnet.predict import BATCH_SIZE, decode, top_k
from alexnet.preprocess import InputSpec, resize_and_crop
from pipelines import storage
from training import figures
from training.trained import Trained

# Of the formats that `decode` reads.
SUFFIXES = frozenset(
    f".{name}"
    for name in ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff")
) | {".ppm", ".pgm", ".pbm"}
ON_SHEET = 60


@dataclass(frozen=True)
class Found:
    """paths: those named, and the pictures of folders in order of their names; skipped: how many
    other files the folders hold."""

    paths: tuple[str, ...]
    skipped: int


def find(named: Sequence[str]) -> Found:
    """Files as they are named, whatever they are called; folders with everything below them, where
    the name's end tells a picture and hidden files are none.

    Raises UserError for a folder that cannot be read or holds no picture.
    """
    paths: list[str] = []
    skipped = 0
    for name in named:
        # Path's own would raise for a name that is too long for a file.
        if not os.path.isdir(name):  # noqa: PTH112
            paths.append(name)
            continue
        files = list(_below(name))
        pictures = [path for path in files if _is_picture(Path(path))]
        if not pictures:
            raise UserError(
                f"{name} holds no picture ({len(files)} files, none of them called *.jpg, *.png "
                "…); name another folder"
            )
        paths += pictures
        skipped += len(files) - len(pictures)
    return Found(tuple(paths), skipped)


def _below(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        yield from (str(Path(place) / file) for file in sorted(files))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


@dataclass(frozen=True)
class ClassName:
    name: str
    wnid: str


@dataclass(frozen=True)
class Prediction:
    """Of one file: the likeliest classes with their probabilities and the uint8 (3, crop, crop)
    picture; or no classes, no picture and the line that says what is wrong with the file."""

    path: str
    classes: tuple[tuple[ClassName, float], ...]
    picture: torch.Tensor | None
    error: str | None

    def told(self) -> str:
        lines = [f"  {probability:7.2%}  {known.name}" for known, probability in self.classes]
        return "\n".join([self.path, *lines])

    def json_line(self) -> str:
        if self.error is not None:
            return json.dumps({"path": self.path, "error": self.error})
        classes = [
            {"name": known.name, "wnid": known.wnid, "probability": probability}
            for known, probability in self.classes
        ]
        return json.dumps({"path": self.path, "classes": classes})


def predict(model: Trained, paths: Sequence[str], top: int) -> Iterator[Prediction]:
    """In the order of `paths`, with a batch of pictures in memory."""
    spec = model.input_spec
    names = [ClassName(n, w) for n, w in zip(model.class_names, model.wnids, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for at in range(0, len(paths), BATCH_SIZE):
            part = paths[at : at + BATCH_SIZE]
            read = list(pool.map(lambda path: _read(path, spec), part))
            images = [image for image in read if not isinstance(image, UserError)]
            stacked = torch.stack(images) if images else torch.empty(0)
            answers = iter(top_k(model.network, stacked, spec, names, top) if images else [])
            for path, image in zip(part, read, strict=True):
                if isinstance(image, UserError):
                    yield Prediction(path, (), None, str(image))
                else:
                    yield Prediction(path, tuple(next(answers)), image, None)


def _read(path: str, spec: InputSpec) -> torch.Tensor | UserError:
    try:
        # Contiguous, because the crop is a view that would keep the whole resized picture.
        return resize_and_crop(decode(path), spec.resize, spec.crop).contiguous()
    except UserError as error:
        return error


def write_sheet(file: str, model: str, predictions: Sequence[Prediction], of: int) -> None:
    """A PNG of the predicted pictures with the likeliest class of each; `of`: how many there are in
    all. Raises UserError where it cannot be written."""
    pictures = [p.picture for p in predictions if p.picture is not None]
    captions = [figures.Caption(None, p.classes[0][0].name, p.classes[0][1]) for p in predictions]
    some = f"{len(captions)} of {of} pictures" if len(captions) < of else f"{of} pictures"
    stacked = torch.stack(pictures) if pictures else torch.empty(0)
    png = io.BytesIO()
    figures.contact_sheet(stacked, captions, f"{model}: {some}").savefig(png, format="png")
    storage.write(storage.absolute(file), png.getvalue())
