"""RAW, in any layout known here, as one table: where each picture lies and what its label is.

Labels are the 0-based rank of the sorted WNIDs, as in torchvision, timm and Keras; never the ID
order of meta.mat. Two sources of a label that disagree refuse the build.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import devkit, index, storage, tars

SPLITS = ("train", "val")
TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
SYNSET_MAPPING = "LOC_synset_mapping.txt"

TABLE = pa.schema(
    [
        ("split", pa.string()),
        ("key", pa.string()),  # file name without extension; unique in its split
        ("name", pa.string()),
        ("label", pa.int64()),
        ("wnid", pa.string()),
        ("source", pa.string()),  # container, relative to RAW
        ("offset", pa.int64()),  # bytes
        ("size", pa.int64()),
    ]
)
_IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
_MAX_KEY = 90  # characters: KEY.json must fit the 100 of a USTAR name
_TRAIN_NAME = re.compile(r"(n\d{8})_\d+")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True)
class Source:
    raw: str
    layout: str  # "archives" or "imagefolder"
    table: pa.Table  # of schema TABLE
    wnids: tuple[str, ...]
    class_names: tuple[str, ...]
    labels_from: dict[str, str]  # per split, in words
    containers: tuple[tuple[str, int], ...]  # archives with their bytes
    announced: dict[str, int] | None  # pictures per split according to the devkit
    notes: tuple[str, ...]  # what a person should know, one line each

    def count(self, split: str) -> int:
        return int(pc.sum(pc.equal(self.table["split"], split)).as_py() or 0)


def scan(raw: str, splits: Sequence[str], partial: bool = False) -> Source:
    """Recognise the layout of `raw`, find every picture of `splits` and label it.

    Raises UserError when the layout is unknown, ambiguous or incomplete, when an archive is
    damaged, when labels contradict each other, and, unless `partial`, when there are fewer or
    more pictures than the devkit announces.
    """
    files = dict(storage.list_files(raw))
    tops = {name.split("/", 1)[0] for name in files if "/" in name}
    archives = [name for name in (TRAIN_TAR, VAL_TAR) if name in files]
    folders = [split for split in SPLITS if split in tops]
    if archives and folders:
        raise UserError(
            f"{raw} is ambiguous: it holds {' and '.join(archives)} and also the folders "
            f"{', '.join(f'{name}/' for name in folders)}; give each its own folder"
        )
    if archives or (devkit.NAME in files and not folders):
        source = _scan_archives(raw, files, splits, partial)
    elif folders:
        source = _scan_folders(raw, files, splits, partial)
    else:
        found = ", ".join(sorted({name.split("/", 1)[0] for name in files})[:5]) or "nothing"
        raise UserError(
            f"{raw}: no known layout; expected {TRAIN_TAR}, {VAL_TAR} and {devkit.NAME}, or "
            f"folders train/WNID/ and val/WNID/; found {found}"
        )
    _check_keys(raw, source.table)
    return source


# ILSVRC2012 archives


def _scan_archives(raw: str, files: dict[str, int], splits: Sequence[str], partial: bool) -> Source:
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
        _check_promise(raw, kit, splits, rows)
    used = [TRAIN_TAR] * ("train" in splits) + [VAL_TAR] * ("val" in splits)
    return Source(
        raw=raw,
        layout="archives",
        table=_table(rows, wnids),
        wnids=wnids,
        class_names=tuple(kit.words[wnid] for wnid in wnids) if kit else _names(raw, files, wnids),
        labels_from={split: labels_from[split] for split in splits},
        containers=tuple((name, files[name]) for name in used),
        announced=_announced(kit, splits),
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


def _check_promise(raw: str, kit: devkit.Devkit, splits: Sequence[str], rows: list[_Row]) -> None:
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


def _announced(kit: devkit.Devkit | None, splits: Sequence[str]) -> dict[str, int] | None:
    if kit is None:
        return None
    counts = {"train": sum(kit.train_images.values()), "val": len(kit.val_wnids)}
    return {split: counts[split] for split in splits}


# Folders train/WNID/ and val/WNID/


def _scan_folders(raw: str, files: dict[str, int], splits: Sequence[str], partial: bool) -> Source:
    rows, ignored = _folder_rows(raw, files, splits)
    wnids = tuple(sorted({wnid for _, _, wnid, _ in rows}))  # of both splits: one ranking
    rows = [row for row in rows if row[0] in splits]
    for split in splits:
        if not any(row[0] == split for row in rows):
            raise UserError(
                f"{raw}: --splits {','.join(splits)} needs pictures in {split}/WNID/, not there; "
                "add them or ask for fewer --splits"
            )
    names = _names(raw, files, wnids)
    kit = devkit.load(storage.join(raw, devkit.NAME)) if devkit.NAME in files else None
    if kit:
        if strangers := sorted(set(wnids) - set(kit.wnids)):
            raise UserError(f"{raw}: folder {strangers[0]} is no class of the devkit")
        if not partial:
            _check_promise(raw, kit, splits, rows)
        wnids, names = kit.wnids, tuple(kit.words[wnid] for wnid in kit.wnids)
    litter = f"ignored {len(ignored)} files that are no pictures, first {(ignored or [''])[0]}"
    return Source(
        raw=raw,
        layout="imagefolder",
        table=_table(rows, wnids),
        wnids=wnids,
        class_names=names,
        labels_from=dict.fromkeys(splits, "name of the class folder"),
        containers=(),
        announced=_announced(kit, splits),
        notes=(litter,) if ignored else (),
    )


def _folder_rows(
    raw: str, files: dict[str, int], splits: Sequence[str]
) -> tuple[list[_Row], list[str]]:
    """Rows of both splits, and the names of the files that are no pictures."""
    rows: list[_Row] = []
    ignored: list[str] = []
    for name in sorted(files):
        split, *folders, file = name.split("/") if "/" in name else ("", name)
        if split not in SPLITS or (split not in splits and not folders):
            continue
        if file.startswith(".") or not file.lower().endswith(_IMAGE_SUFFIXES):
            ignored.append(name)
            continue
        if not folders:
            raise UserError(f"{raw}: {name} lies in no class folder; expected {split}/WNID/")
        match = _TRAIN_NAME.fullmatch(_stem(file))
        if len(folders) != 1 or (match and match[1] != folders[0]):
            raise UserError(f"{raw}: {name} contradicts its folder; expected {split}/WNID/WNID_*")
        rows.append((split, tars.Member(file, 0, files[name]), folders[0], name))
    return rows, ignored


def _names(raw: str, files: dict[str, int], wnids: Iterable[str]) -> tuple[str, ...]:
    """From LOC_synset_mapping.txt ("n01440764 tench, Tinca tinca") if there, else the WNIDs."""
    names: dict[str, str] = {}
    if SYNSET_MAPPING in files:
        text = storage.read(storage.join(raw, SYNSET_MAPPING)).decode("utf-8", "replace")
        names = {line.partition(" ")[0]: line.partition(" ")[2] for line in text.splitlines()}
    return tuple(names.get(wnid) or wnid for wnid in wnids)


# Both


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _table(rows: Iterable[_Row], wnids: Sequence[str]) -> pa.Table:
    rank = {wnid: label for label, wnid in enumerate(wnids)}
    columns = [
        (split, _stem(member.name), member.name, rank[wnid], wnid, source, *member_range)
        for split, member, wnid, source in rows
        for member_range in ((member.offset, member.size),)
    ]
    return pa.Table.from_arrays(
        [
            pa.array(column, field.type)
            for column, field in zip(zip(*columns, strict=True), TABLE, strict=True)
        ],
        schema=TABLE,
    )


def _check_keys(raw: str, table: pa.Table) -> None:
    for key in table["key"].to_pylist():
        if not key or "." in key or len(key) > _MAX_KEY or not key.isascii():
            raise UserError(
                f"{raw}: {key!r} cannot name a sample; rename that file to at most {_MAX_KEY} "
                "ASCII characters without a dot before the extension"
            )
    groups = table.group_by(["split", "key"]).aggregate([("key", "count")])
    twice = groups.filter(pc.greater(groups["key_count"], 1)).sort_by("key")
    if twice.num_rows:
        split, key = twice["split"][0].as_py(), twice["key"][0].as_py()
        raise UserError(
            f"{raw}: {twice['key_count'][0].as_py()} {split} files are named {key} "
            f"({twice.num_rows} names in all are not unique); rename or remove them"
        )
