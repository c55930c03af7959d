"""Pictures and raw sets drawn for tests, encoded by Pillow and packed by tarfile."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

ROOT = Path(__file__).resolve().parents[1]


def picture(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    """RGB: a smooth ground with a few rectangles, so that JPEG keeps it nearly as it is."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 60, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    pixels = ramp + rng.uniform(20, 120, 3)
    for _ in range(3):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        pixels[top : top + height // 3 + 1, left : left + width // 3 + 1] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0) -> bytes:
    return encoded(picture(seed=seed), quality=95)


def tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def devkit(wnids_by_id: list[str], announced: int, ground_truth: str) -> bytes:
    """An ILSVRC2012 devkit whose leaf k + 1 is wnids_by_id[k], each with `announced` pictures."""
    names = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images"
    table = np.empty((len(wnids_by_id) + 1, 1), [(name, object) for name in names.split()])
    for row, wnid in enumerate(wnids_by_id):
        table[row, 0] = (row + 1, wnid, f"name of {wnid}", "gloss", 0, [], 0, announced)
    everything = list(range(1, len(wnids_by_id) + 1))
    table[-1, 0] = (len(table), "n00000001", "entity", "", len(everything), everything, 1, 0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": table})
    files = {"meta.mat": meta.getvalue()}
    files["ILSVRC2012_validation_ground_truth.txt"] = ground_truth.encode()
    return gzip.compress(tar([(f"devkit/data/{name}", data) for name, data in files.items()]))


A, B, C = "n00000010", "n00000020", "n00000030"


def archives(folder: Path, **replaced: bytes | None) -> Path:
    """Three classes of two train pictures, three val pictures; IDs C = 1, A = 2, B = 3.

    `train`, `val` or `devkit` replace an archive; None leaves it out.
    """
    inner = [
        (f"{wnid}.tar", tar([(f"{wnid}_{n}.JPEG", jpeg(10 * k + n)) for n in (7, 3)]))
        for k, wnid in enumerate((B, C, A))
    ]
    val = [(f"ILSVRC2012_val_{n:08d}.JPEG", jpeg(100 + n)) for n in (2, 3, 1)]
    made = {
        "train": tar(inner),
        "val": tar(val),
        "devkit": devkit([C, A, B], 2, "3\n1\n2\n"),
    } | replaced
    names = {
        "train": "ILSVRC2012_img_train.tar",
        "val": "ILSVRC2012_img_val.tar",
        "devkit": "ILSVRC2012_devkit_t12.tar.gz",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for key, name in names.items():
        if (data := made[key]) is not None:
            (folder / name).write_bytes(data)
    return folder


def imagefolder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder
