"""Kaggle's layout and Hugging Face's parquet files, drawn for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from drawn import A, B, C, imagefolder

DATA = "ILSVRC/Data/CLS-LOC"
SETS = "ILSVRC/ImageSets/CLS-LOC"
HEADER = "ImageId,PredictionString\n"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def csv(rows: str) -> bytes:
    return (HEADER + rows).encode()


def kaggle(folder: Path, changes: dict[str, bytes | None] | None = None) -> Path:
    """Three classes of two train images, three val images, two of test.

    `changes` replaces or adds files; None leaves one out. An image's bytes are its own name.
    """
    train = [f"{wnid}/{wnid}_{n}" for wnid in (A, B, C) for n in (7, 3)]
    val = [f"ILSVRC2012_val_{n:08d}" for n in (1, 2, 3)]
    test = [f"ILSVRC2012_test_{n:08d}" for n in (1, 2)]
    names = f"{A} tench, Tinca tinca\n{B} jacamar\n{C} yurt\n"
    # Only some train images have boxes; the rows of both files are in no order.
    boxes = f"{C}_3,{C} 1 1 223 223 \n{A}_7,{A} 0 0 9 9 {A} 10 10 20 20 \n"
    labels = f"{val[2]},{A} 1 2 3 4 \n{val[0]},{C} 1 2 3 4 {C} 5 6 7 8 \n{val[1]},{B} 1 2 3 4 \n"
    files: dict[str, bytes | None] = {
        "LOC_synset_mapping.txt": names.encode(),
        "LOC_train_solution.csv": csv(boxes),
        "LOC_val_solution.csv": csv(labels),
    }
    for split, keys in (("train", train), ("val", val), ("test", test)):
        lines = [f"{key} {number}\n" for number, key in enumerate(keys, start=1)]
        name = "train_cls" if split == "train" else split
        files[f"{SETS}/{name}.txt"] = "".join(lines).encode()
        files |= {f"{DATA}/{split}/{key}.JPEG": key.rpartition("/")[2].encode() for key in keys}
    files |= changes or {}
    return imagefolder(folder, {name: data for name, data in files.items() if data is not None})


Row = tuple[str | None, int | None]  # image.path, label


def parquet(
    path: Path,
    rows: Sequence[Row],
    *,
    names: Sequence[str] = (),
    row_group: int = 2,
    size: int = 50,
) -> None:
    """As `datasets` writes it. An image is the canonical name, repeated to `size` bytes."""
    metadata = {}
    if names:
        feature = {"label": {"names": list(names), "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": feature}})}
    images: list[dict[str, Any]] = [
        {"path": name, "bytes": ((name or "") * size).encode()[:size]} for name, _ in rows
    ]
    columns = [pa.array(images, IMAGE), pa.array([label for _, label in rows], pa.int64())]
    schema = pa.schema([("image", IMAGE), ("label", pa.int64())], metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=row_group)


def train_row(wnid: str, number: int, label: int | None) -> Row:
    return f"{wnid}_{number}_{wnid}.JPEG", label


def val_row(number: int, wnid: str, label: int | None) -> Row:
    return f"ILSVRC2012_val_{number:08d}_{wnid}.JPEG", label


TRAIN = [train_row(B, 1, 1), train_row(A, 5, 0), train_row(C, 2, 2), train_row(A, 4, 0)]
VAL = [val_row(1, C, 2), val_row(2, A, 0), val_row(3, B, 1)]
TEST: list[Row] = [("ILSVRC2012_test_00000001.JPEG", -1), ("ILSVRC2012_test_00000002.JPEG", -1)]
NAMES = ("tench", "jacamar", "yurt")


def hugging_face(
    folder: Path, *, train: Sequence[Row] = TRAIN, val: Sequence[Row] = VAL, **options: Any
) -> Path:
    """Two train files, one each of validation and test, in folder/data."""
    data, options = folder / "data", {"names": NAMES} | options
    half = -(-len(train) // 2)
    parquet(data / "train-00000-of-00002.parquet", train[:half], **options)
    parquet(data / "train-00001-of-00002.parquet", train[half:], **options)
    parquet(data / "validation-00000-of-00001.parquet", val, **options)
    parquet(data / "test-00000-of-00001.parquet", TEST, **options)
    return folder
