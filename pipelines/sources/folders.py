"""Folders train/WNID/ and val/WNID/."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import pyarrow as pa

from alexnet.errors import UserError
from pipelines import devkit, storage, tars
from pipelines.sources.ilsvrc import announced, check_promise
from pipelines.sources.table import SPLITS, Source, labelled, part

SYNSET_MAPPING = "LOC_synset_mapping.txt"
_IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
_TRAIN_NAME = re.compile(r"(n\d{8})_\d+")
_Row = tuple[str, tars.Member, str, str]  # split, where, WNID, container


def recognises(files: dict[str, int]) -> bool:
    return any(name.split("/", 1)[0] in SPLITS for name in files if "/" in name)


def scan(raw: str, files: dict[str, int], splits: Sequence[str], partial: bool) -> Source:
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
            check_promise(raw, kit, splits, rows)
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
        announced=announced(kit, splits),
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


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _table(rows: list[_Row], wnids: Sequence[str]) -> pa.Table:
    parts = [
        part(split, [member.name], wnid, source, member.offset, member.size)
        for split, member, wnid, source in rows
    ]
    return labelled(parts, wnids)
