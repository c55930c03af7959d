"""People's WebDataset tars, drawn for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import webdataset as wds
from drawn import A, B, C, jpeg

WNIDS = (A, B, C)
TRAIN, VAL = "imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"

Files = list[tuple[str, bytes]]


def sample(key: str, image: bytes, label: object = None, /, **more: object) -> Files:
    """KEY.jpg, KEY.cls where there is a label, and KEY.json where there is anything more."""
    files = [(f"{key}.jpg", image)]
    files += [(f"{key}.cls", str(label).encode())] if label is not None else []
    return files + ([(f"{key}.json", json.dumps(more).encode())] if more else [])


def written(raw: Path, name: str, files: Files) -> None:
    """By webdataset itself, where each file can be one of its samples."""
    raw.mkdir(exist_ok=True)
    by_key: dict[str, dict[str, Any]] = {}
    for file, data in files:
        key, _, kind = file.partition(".")
        by_key.setdefault(key, {"__key__": key})[kind] = data
    with wds.TarWriter(str(raw / name), encoder=False) as writer:
        for each in by_key.values():
            writer.write(each)


def timm(raw: Path, **info: Any) -> Path:
    """Two train tars and one of validation, as timm/imagenet-1k-wds: the keys of train have WNIDs,
    those of val do not; `info` goes into _info.json."""
    for number in (0, 1):
        files: Files = []
        for n in range(4):
            label = (n + number) % 3
            key = f"{WNIDS[label]}_{10 * number + n}"
            more = {"filename": f"{WNIDS[label]}/{key}.JPEG", "height": 60, "width": 80}
            files += sample(key, jpeg(10 * number + n), label, label=label, **more)
        written(raw, f"imagenet1k-train-{number:04d}.tar", files)
    files = []
    for n in (2, 0, 1):
        more = {"filename": f"ILSVRC2012_val_{n:08d}.JPEG", "height": 60, "width": 80}
        files += sample(f"ILSVRC2012_val_{n:08d}", jpeg(100 + n), n, label=n, **more)
    written(raw, VAL, files)
    train = {"name": "train", "filenames": [TRAIN, "imagenet1k-train-0001.tar"]}
    val = {"name": "validation", "filenames": [VAL], "shard_lengths": [3], "num_samples": 3}
    splits = {"train": train | {"shard_lengths": [4, 4], "num_samples": 8}, "validation": val}
    document = {"name": "imagenet1k", "splits": splits} | info
    (raw / "_info.json").write_text(json.dumps(document))
    return raw


def numbered(raw: Path, labels: dict[str, Sequence[object]], names: str = "") -> Path:
    """Tars (by name) of images that have nothing but a number."""
    for number, (name, those) in enumerate(labels.items()):
        files: Files = []
        for n, label in enumerate(those):
            files += sample(f"{n:05d}", jpeg(20 * number + n), label)
        written(raw, name, files)
    if names:
        (raw / "classnames.txt").write_text(names)
    return raw
