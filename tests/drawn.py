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


def devkit(
    wnids_by_id: list[str], announced: int | list[int], ground_truth: str, year: int = 2012
) -> bytes:
    """A devkit whose leaf k + 1 is wnids_by_id[k], each with `announced` images."""
    meta = synsets(wnids_by_id, announced, f"ILSVRC{year}_ID")
    truth = (f"ILSVRC{year}_validation_ground_truth.txt", ground_truth.encode())
    return packed_devkit([("meta.mat", meta), truth])


def synsets(wnids_by_id: list[str], announced: int | list[int], id_field: str) -> bytes:
    """A meta.mat: the leaves in the order of their IDs, then the node above them."""
    names = f"{id_field} WNID words gloss num_children children wordnet_height num_train_images"
    table = np.empty((len(wnids_by_id) + 1, 1), [(name, object) for name in names.split()])
    counts = [announced] * len(wnids_by_id) if isinstance(announced, int) else announced
    for row, wnid in enumerate(wnids_by_id):
        table[row, 0] = (row + 1, wnid, f"name of {wnid}", "gloss", 0, [], 0, counts[row])
    everything = list(range(1, len(wnids_by_id) + 1))
    table[-1, 0] = (len(table), "n00000001", "entity", "", len(everything), everything, 1, 0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": table})
    return meta.getvalue()


def packed_devkit(files: list[tuple[str, bytes]]) -> bytes:
    return gzip.compress(tar([(f"devkit/data/{name}", data) for name, data in files]))


A, B, C = "n00000010", "n00000020", "n00000030"


def archives(folder: Path, **replaced: bytes | None) -> Path:
    """Three classes of two train images, three val images; IDs C = 1, A = 2, B = 3.

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


def archives_2010(folder: Path, **replaced: bytes | None) -> Path:
    """Two classes of two train images, two val and two test images, a patch for each split.

    IDs B = 1, A = 2; val: A, B; test: B, A. `train`, `val`, `test`, `devkit`, `patches` or `truth`
    replace a file; None leaves it out.
    """
    made = {
        "train": tar(
            [
                (f"{wnid}.tar", tar([(f"{wnid}_{n}.JPEG", jpeg(10 * k + n)) for n in (1, 2)]))
                for k, wnid in enumerate((A, B))
            ]
        ),
        "val": tar([(f"val/ILSVRC2010_val_{n:08d}.JPEG", jpeg(100 + n)) for n in (2, 1)]),
        "test": tar([(f"test/ILSVRC2010_test_{n:08d}.JPEG", jpeg(200 + n)) for n in (1, 2)]),
        "patches": tar(
            [
                (f"patch_images/train/{B}_2.JPEG", jpeg(301)),
                ("patch_images/val/ILSVRC2010_val_00000001.JPEG", jpeg(302)),
                ("patch_images/test/ILSVRC2010_test_00000002.JPEG", jpeg(303)),
            ]
        ),
        "devkit": devkit([B, A], 2, "2\n1\n", year=2010),
        "truth": b"1\n2\n",
    } | replaced
    names = {
        "train": "ILSVRC2010_images_train.tar",
        "val": "ILSVRC2010_images_val.tar",
        "test": "ILSVRC2010_images_test.tar",
        "patches": "patch_images.tar",
        "devkit": "ILSVRC2010_devkit-1.0.tar.gz",
        "truth": "ILSVRC2010_test_ground_truth.txt",
    }
    return imagefolder(folder, {names[key]: data for key, data in made.items() if data is not None})


def imagefolder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder
