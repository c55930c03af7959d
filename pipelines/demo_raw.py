"""A small, learnable stand-in for ImageNet, drawn as true ILSVRC2012 archives with a devkit.

It takes the same road as the real set, with its known oddities: IDs in another order than sorted
WNIDs, a val tar in no order, some grey images, one CMYK, one PNG named .JPEG, one cut file.
"""

from __future__ import annotations

import colorsys
import gzip
import io
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from alexnet.errors import UserError
from pipelines import shards, storage
from pipelines.sources import devkit
from pipelines.sources.ilsvrc import TRAIN_TAR, VAL_TAR

_NOTE = "demo-raw.json"  # what was drawn, so that a second run knows it again
_Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class _Class:
    wnid: str
    words: str  # the second one is a key of _MASKS
    hue: float  # 0..1


_CLASSES = (
    _Class("n09106274", "red disc", 0.00),
    _Class("n09103871", "orange stripes", 0.08),
    _Class("n09104412", "yellow ring", 0.16),
    _Class("n09101939", "green triangle", 0.33),
    _Class("n09107723", "turquoise checkerboard, chequerboard", 0.47),
    _Class("n09102655", "sky dots", 0.55),
    _Class("n09108190", "blue square", 0.65),
    _Class("n09105086", "violet cross", 0.76),
    _Class("n09109348", "pink flower", 0.88),
    _Class("n09100517", "lime waves", 0.24),
)
# To bool from x and y, within [-1, 1]² for the object, r = |(x, y)| and m = max(|x|, |y|).
_MASKS: dict[str, Callable[[_Array, _Array, _Array, _Array], _Array]] = {
    "disc": lambda x, y, r, m: r < 0.9,
    "stripes": lambda x, y, r, m: (m < 0.85) & (np.sin(14 * x) > 0),
    "ring": lambda x, y, r, m: abs(r - 0.7) < 0.22,
    "triangle": lambda x, y, r, m: (y < 0.8) & (y > 2 * abs(x) - 0.9),
    "checkerboard": lambda x, y, r, m: (m < 0.85) & (np.sin(9 * x) * np.sin(9 * y) > 0),
    "dots": lambda x, y, r, m: (m < 0.85) & (np.cos(11 * x) + np.cos(11 * y) > 0.9),
    "square": lambda x, y, r, m: m < 0.85,
    "cross": lambda x, y, r, m: (m < 0.95) & (np.minimum(abs(x), abs(y)) < 0.27),
    "flower": lambda x, y, r, m: r < 0.55 + 0.35 * np.cos(5 * np.arctan2(y, x)),
    "waves": lambda x, y, r, m: (r < 0.95) & (np.sin(12 * y + 2 * np.sin(6 * x)) > 0),
}


@dataclass(frozen=True)
class Drawing:
    classes: int = 10
    per_class: int = 60
    val_per_class: int = 10

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= len(_CLASSES):
            raise UserError(f"--classes {self.classes}: choose 2 to {len(_CLASSES)}")
        if self.per_class < 1 or self.val_per_class < 1:
            raise UserError("--per-class and --val-per-class must be at least 1")


def draw(folder: str, drawing: Drawing, seed: int) -> str:
    """Write the three archives and return a line about them.

    Raises UserError when `folder` holds anything but (a part of) this very drawing.
    """
    note = storage.join(folder, _NOTE)
    wanted = {"drawing": asdict(drawing), "seed": seed}
    present = dict(storage.list_files(folder))
    if present:
        found = shards.read_json(note) if _NOTE in present else {}
        if {name: found.get(name) for name in wanted} != wanted:
            raise UserError(f"{folder} is not empty and holds another set; choose another DIR")
        if found["sizes"] and found["sizes"].items() <= present.items():
            return f"{folder} holds this drawn set already; nothing to do"
    storage.sweep(folder)
    if not present:  # of two that begin at the same time with different drawings, one is refused
        storage.write_new(note, shards.canonical_json(wanted | {"sizes": {}}))
    classes = _CLASSES[: drawing.classes]
    order = np.random.default_rng([seed, 0]).permutation(drawing.classes * drawing.val_per_class)
    val_classes = order % drawing.classes  # of image number k + 1
    archives = {
        devkit.NAME: _devkit(classes, drawing, val_classes),
        VAL_TAR: _val_tar(classes, val_classes, seed),
        TRAIN_TAR: _train_tar(classes, drawing, seed),
    }
    for name, data in archives.items():
        storage.write(storage.join(folder, name), data)
    sizes = {name: len(data) for name, data in archives.items()}
    storage.write(note, shards.canonical_json(wanted | {"sizes": sizes}))
    train, val = drawing.classes * drawing.per_class, len(val_classes)
    return f"{folder}: drew {train} train + {val} val images in {drawing.classes} classes"


def _train_tar(classes: tuple[_Class, ...], drawing: Drawing, seed: int) -> bytes:
    tars = []
    for number, kind in enumerate(classes):
        images = []
        for index in range(drawing.per_class):
            rng = np.random.default_rng([seed, 1, number, index])
            data = _encode(_image(kind, rng), _train_form(number, index))
            images.append((f"{kind.wnid}_{number + 17 * index}.JPEG", data))
        tars.append((f"{kind.wnid}.tar", _tar(images)))
    return _tar(tars)


def _train_form(number: int, index: int) -> str:
    """The oddities, each in a class of its own."""
    odd = {(0, 1): "png", (1, 1): "cmyk", (1, 3): "grey", (2, 1): "truncated", (3, 1): "grey"}
    return odd.get((number, index), "grey" if index == 5 and number % 2 else "plain")


def _val_tar(classes: tuple[_Class, ...], val_classes: _Array, seed: int) -> bytes:
    images = []
    for index, number in enumerate(val_classes.tolist()):
        image = _image(classes[number], np.random.default_rng([seed, 2, index]))
        form = "grey" if index == 7 else "plain"
        images.append((f"ILSVRC2012_val_{index + 1:08d}.JPEG", _encode(image, form)))
    order = np.random.default_rng([seed, 3]).permutation(len(images))
    return _tar(images[index] for index in order)


def _image(kind: _Class, rng: np.random.Generator) -> _Array:
    """uint8 (H, W, 3): one object, turned, anywhere near the middle, on a dull noisy ground."""
    height, width = (int(rng.normal(375, 35)), int(rng.normal(500, 45)))
    if rng.random() < 0.25:
        height, width = width, height
    side = min(height, width)
    scale = side * rng.uniform(0.26, 0.44)
    centre_y = height / 2 + side * rng.uniform(-0.1, 0.1)
    centre_x = width / 2 + side * rng.uniform(-0.1, 0.1)
    angle = rng.uniform(-0.35, 0.35)
    cos, sin = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(centre_y)
    x = np.arange(width, dtype=np.float32)[None, :] - np.float32(centre_x)
    x, y = cos * x + sin * y, cos * y - sin * x
    shape = kind.words.split()[1].rstrip(",")
    mask = _MASKS[shape](x, y, np.hypot(x, y), np.maximum(abs(x), abs(y)))
    hue, saturation = (kind.hue + rng.normal(0, 0.012)) % 1, rng.uniform(0.65, 1)
    colour = np.array(colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.7, 1))) * 225
    ground = np.full(3, rng.uniform(40, 170)) + rng.uniform(-14, 14, 3)
    image = np.where(mask[..., None], colour.astype(np.uint8), ground.astype(np.uint8))
    noise = rng.integers(0, 30, (-(-height // 2), -(-width // 2), 3), dtype=np.uint8)
    return image + noise.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]


def _encode(pixels: _Array, form: str) -> bytes:
    image = Image.fromarray(pixels)
    if form in ("grey", "cmyk"):
        image = image.convert({"grey": "L", "cmyk": "CMYK"}[form])
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if form == "png" else "JPEG", quality=85)  # which PNG ignores
    data = buffer.getvalue()
    return data[: len(data) * 3 // 5] if form == "truncated" else data


def _tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _devkit(classes: tuple[_Class, ...], drawing: Drawing, val_classes: _Array) -> bytes:
    """IDs count from the last class to the first: neither the sorted nor the drawn order."""
    id_of_class = [len(classes) - number for number in range(len(classes))]
    truth = "".join(f"{id_of_class[number]}\n" for number in val_classes.tolist())
    folder = devkit.NAME.removesuffix(".tar.gz")
    members = {
        "readme.txt": b"Drawn images in the form of the ILSVRC2012 devkit.\n",
        "data/meta.mat": _meta(classes[::-1], drawing.per_class),
        "data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    archive = _tar((f"{folder}/{name}", data) for name, data in members.items())
    return gzip.compress(archive, mtime=0)


def _meta(classes: tuple[_Class, ...], per_class: int) -> bytes:
    """`classes` in ID order, then one inner node above them, as in the real file."""
    from scipy.io import savemat  # half a second to import

    count = len(classes)
    leaves: list[tuple[Any, ...]] = [
        (number + 1, kind.wnid, kind.words, f"a drawn {kind.words}", 0, [], 0, per_class)
        for number, kind in enumerate(classes)
    ]
    children = [*range(1, count + 1)]
    root = (count + 1, "n09100001", "drawing", "anything drawn", count, children, 1, 0)
    names = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images"
    table = np.empty((count + 1, 1), dtype=[(name, object) for name in names.split()])
    for row, values in enumerate([*leaves, root]):
        table[row, 0] = values
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": table}, do_compression=True)
    header = b"MATLAB 5.0 MAT-file, drawn".ljust(116)  # scipy's holds the time of day
    return header + buffer.getvalue()[116:]
