"""The published ILSVRC archives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from alexnet.errors import UserError
from pipelines import devkit, index, storage, tars
from pipelines.sources.table import Source, labelled, part

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
_TRAIN_NAME = re.compile(r"(n\d{8})_\d+")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


def recognises(files: dict[str, int]) -> bool:
    return TRAIN_TAR in files or VAL_TAR in files


def scan(raw: str, files: dict[str, int], splits: Sequence[str], partial: bool) -> Source:
    needed = {"train": [TRAIN_TAR], "val": [VAL_TAR, devkit.NAME]}
    missing = [name for split in splits for name in needed[split] if name not in files]
    if missing:
        raise UserError(
            f"{raw}: --splits {','.join(splits)} needs {' and '.join(missing)}, not there; add "
            "what is missing or ask for fewer --splits"
        )
    kit = devkit.load(storage.join(raw, devkit.NAME)) if devkit.NAME in files else None
    per_class = _index_train(raw) if "train" in splits else {}
    wnids = kit.wnids if kit else tuple(sorted(per_class))
    if strangers := sorted(set(per_class) - set(wnids)):
        raise UserError(f"{raw}: {TRAIN_TAR} holds {strangers[0]}.tar, no class of the devkit")
    rows = [
        ("train", member, wnid, TRAIN_TAR)
        for wnid, members in sorted(per_class.items())
        for member in members
    ]
    labels_from = {"train": "name of the inner tar, equal to the prefix of the file name"}
    if "val" in splits:
        assert kit is not None  # among the needed files
        rows += _label_val(raw, kit)
        labels_from["val"] = (
            "number in the file name, line of the ground truth, ILSVRC2012_ID, WNID of meta.mat"
        )
    if kit and not partial:
        check_promise(raw, kit, splits, rows)
    used = [TRAIN_TAR] * ("train" in splits) + [VAL_TAR] * ("val" in splits)
    return Source(
        raw=raw,
        layout="ilsvrc2012",
        table=_table(rows, wnids),
        wnids=wnids,
        class_names=tuple(kit.words[wnid] for wnid in wnids) if kit else wnids,
        labels_from={split: labels_from[split] for split in splits},
        containers=tuple((name, files[name]) for name in used),
        announced=announced(kit, splits),
        notes=(),
    )


_Row = tuple[str, tars.Member, str, str]  # split, where, WNID, container


def _index_train(raw: str) -> dict[str, list[tars.Member]]:
    uri = storage.join(raw, TRAIN_TAR)
    per_class = {}
    for name, pictures in index.nested(uri).items():
        if not re.fullmatch(r"n\d{8}\.tar", name):
            raise UserError(f"{uri} holds {name}; expected only nXXXXXXXX.tar, one a class")
        wnid = name.removesuffix(".tar")
        for picture in pictures:
            match = _TRAIN_NAME.fullmatch(_stem(picture.name))
            if match is None or match[1] != wnid:
                raise UserError(f"{uri}: {name} holds {picture.name}; expected only {wnid}_*.JPEG")
        per_class[wnid] = pictures
    return per_class


def _label_val(raw: str, kit: devkit.Devkit) -> list[_Row]:
    uri = storage.join(raw, VAL_TAR)
    pictures = index.flat(uri)
    rows: list[_Row] = []
    for picture in pictures:
        match = _VAL_NAME.fullmatch(_stem(picture.name))
        if match is None:
            raise UserError(f"{uri} holds {picture.name}; expected only ILSVRC2012_val_*.JPEG")
        number = int(match[1])
        if not 1 <= number <= len(kit.val_wnids):
            raise UserError(
                f"{uri} holds {picture.name} and {len(pictures)} pictures in all, but the devkit's "
                f"ground truth has {len(kit.val_wnids)} lines; take both from the same release"
            )
        rows.append(("val", picture, kit.val_wnids[number - 1], VAL_TAR))
    return rows


def check_promise(raw: str, kit: devkit.Devkit, splits: Sequence[str], rows: list[_Row]) -> None:
    found = Counter((split, wnid) for split, _, wnid, _ in rows)
    if "train" in splits:
        wrong = [w for w in kit.wnids if found["train", w] != kit.train_images[w]]
        if wrong:
            total = sum(1 for row in rows if row[0] == "train")
            raise UserError(
                f"{raw}: {wrong[0]} has {found['train', wrong[0]]:,} train pictures, the devkit "
                f"announces {kit.train_images[wrong[0]]:,} ({len(wrong)} of {len(kit.wnids)} "
                f"classes differ; {total:,} of {sum(kit.train_images.values()):,} in all); add "
                "the missing ones or pass --partial"
            )
    val = sum(1 for row in rows if row[0] == "val")
    if "val" in splits and val != len(kit.val_wnids):
        raise UserError(
            f"{raw}: {VAL_TAR} holds {val:,} pictures, the devkit's ground truth has "
            f"{len(kit.val_wnids):,} lines; add the missing ones or pass --partial"
        )


def announced(kit: devkit.Devkit | None, splits: Sequence[str]) -> dict[str, int] | None:
    if kit is None:
        return None
    counts = {"train": sum(kit.train_images.values()), "val": len(kit.val_wnids)}
    return {split: counts[split] for split in splits}


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _table(rows: list[_Row], wnids: Sequence[str]) -> pa.Table:
    parts = [
        part(split, [member.name], wnid, source, member.offset, member.size)
        for split, member, wnid, source in rows
    ]
    return labelled(parts, wnids)
