"""Images and raw sets drawn for tests, encoded by Pillow and packed by tarfile."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

ROOT = Path(__file__).resolve().parents[1]


def image(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
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
    return encoded(image(seed=seed), quality=95)


def tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def devkit(wnids: list[str], announced: int | list[int], truth: str, year: int = 2012) -> bytes:
    """A devkit whose leaf k + 1 is wnids[k], each with `announced` images."""
    meta = ("meta.mat", synsets(wnids, announced, f"ILSVRC{year}_ID"))
    return packed_devkit([meta, (f"ILSVRC{year}_validation_ground_truth.txt", truth.encode())])


def synsets(wnids: list[str], announced: int | list[int], id_field: str) -> bytes:
    """A meta.mat: the leaves in the order of their IDs, then the node above them."""
    names = f"{id_field} WNID words gloss num_children children wordnet_height num_train_images"
    table = np.empty((len(wnids) + 1, 1), [(name, object) for name in names.split()])
    counts = [announced] * len(wnids) if isinstance(announced, int) else announced
    for row, (wnid, count) in enumerate(zip(wnids, counts, strict=True)):
        table[row, 0] = (row + 1, wnid, f"name of {wnid}", "gloss", 0, [], 0, count)
    leaves = list(range(1, len(wnids) + 1))
    table[-1, 0] = (len(table), "n00000001", "entity", "", len(leaves), leaves, 1, 0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": table})
    return meta.getvalue()


def packed_devkit(files: list[tuple[str, bytes]]) -> bytes:
    return gzip.compress(tar([(f"devkit/data/{name}", data) for name, data in files]))


A, B, C = "n00000010", "n00000020", "n00000030"


def imagefolder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def class_folders(folder: Path, images: dict[str, int | bytes]) -> str:
    """By relative name: a drawn JPEG of that seed, or these bytes."""
    made = {name: what if isinstance(what, bytes) else jpeg(what) for name, what in images.items()}
    return str(imagefolder(folder, made))


def archives(folder: Path, **replaced: bytes | None) -> Path:
    """Three classes of two train images, three val images; IDs C = 1, A = 2, B = 3.

    `train`, `val` or `devkit` replace an archive; None leaves it out.
    """
    names = {key: f"ILSVRC2012_img_{key}.tar" for key in ("train", "val")}
    names |= {"devkit": "ILSVRC2012_devkit_t12.tar.gz"}
    val = [(f"ILSVRC2012_val_{n:08d}.JPEG", jpeg(100 + n)) for n in (2, 3, 1)]
    made = {
        "train": _train(B, C, A, numbers=(7, 3)),
        "val": tar(val),
        "devkit": devkit([C, A, B], 2, "3\n1\n2\n"),
    }
    return _written(folder, names, made | replaced)


def archives_2010(folder: Path, **replaced: bytes | None) -> Path:
    """Two classes of two train images, two val and two test images, a patch for each split.

    IDs B = 1, A = 2; val: A, B; test: B, A. `train`, `val`, `test`, `devkit`, `patches` or `truth`
    replace a file; None leaves it out.
    """
    names = {key: f"ILSVRC2010_images_{key}.tar" for key in ("train", "val", "test")}
    names |= {"patches": "patch_images.tar", "devkit": "ILSVRC2010_devkit-1.0.tar.gz"}
    names |= {"truth": "ILSVRC2010_test_ground_truth.txt"}
    places = [f"train/{B}_2", "val/ILSVRC2010_val_00000001", "test/ILSVRC2010_test_00000002"]
    patches = [(f"patch_images/{name}.JPEG", jpeg(301 + n)) for n, name in enumerate(places)]
    made = {
        "train": _train(A, B, numbers=(1, 2)),
        "val": tar([(f"val/ILSVRC2010_val_{n:08d}.JPEG", jpeg(100 + n)) for n in (2, 1)]),
        "test": tar([(f"test/ILSVRC2010_test_{n:08d}.JPEG", jpeg(200 + n)) for n in (1, 2)]),
        "patches": tar(patches),
        "devkit": devkit([B, A], 2, "2\n1\n", year=2010),
        "truth": b"1\n2\n",
    }
    return _written(folder, names, made | replaced)


def _train(*wnids: str, numbers: tuple[int, ...]) -> bytes:
    inner = [[(f"{w}_{n}.JPEG", jpeg(10 * k + n)) for n in numbers] for k, w in enumerate(wnids)]
    return tar([(f"{wnid}.tar", tar(images)) for wnid, images in zip(wnids, inner, strict=True)])


def _written(folder: Path, names: dict[str, str], made: dict[str, bytes | None]) -> Path:
    return imagefolder(folder, {names[key]: data for key, data in made.items() if data is not None})
