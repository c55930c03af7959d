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
from pipelines import entries, storage
from training import figures
from training.network import LoadedModel

ON_SHEET = 60


@dataclass(frozen=True)
class Found:
    """paths: those named, and the pictures of folders in order of their names; skipped: how many
    other entries the folders hold, ignored as in a build."""

    paths: tuple[str, ...]
    skipped: int


def find(named: Sequence[str]) -> Found:
    """Files as they are named; folders with everything below them, but what a build ignores by its
    name. Links are followed; one that leads nowhere is a path that cannot be read.

    Raises UserError for a folder that cannot be read or holds nothing that may be a picture.
    """
    paths: list[str] = []
    skipped = 0
    for name in named:
        # Path's own would raise for a name that is too long for a file.
        if not os.path.isdir(name):  # noqa: PTH112
            paths.append(name)
            continue
        below = entries.listing(name)
        files = sorted([*below.files, *below.broken])
        pictures = [file for file in files if entries.rule(file) is None]
        if not pictures:
            raise UserError(
                f"{name} holds no picture ({below.total} entries, each ignored by its name); name "
                "another folder"
            )
        paths += [str(Path(name) / file) for file in pictures]
        skipped += below.total - len(pictures)
    return Found(tuple(paths), skipped)


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


def predict(model: LoadedModel, paths: Sequence[str], top: int) -> Iterator[Prediction]:
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
