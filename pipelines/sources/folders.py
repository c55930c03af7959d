"""Pictures in folders: train/WNID/, val/WNID/ and test/WNID/, or flat val/ and test/.

Flat val pictures get their labels from a devkit beside the folders; flat test pictures have none,
unless it is the devkit of 2010 with its test ground truth.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import storage
from pipelines.sources import devkit
from pipelines.sources.ilsvrc import announced, check_promise
from pipelines.sources.table import SPLITS, Source, labelled, part

SYNSET_MAPPING = "LOC_synset_mapping.txt"
_BY_FOLDER = "name of the class folder"
_BY_NUMBER = "number in the file name, line of the devkit's ground truth, WNID of meta.mat"
_IS_PICTURE = r"(?i)\.(jpeg|jpg|png|webp|bmp|gif)$"
_IS_LITTER = r"(^|/)(\.|__MACOSX/)"  # of Finder, notebooks, editors
_FULL_SET = 1000  # classes of ILSVRC


def recognises(files: dict[str, int]) -> bool:
    return any(name.split("/", 1)[0] in SPLITS for name in files if "/" in name)


def scan(raw: str, files: dict[str, int], splits: Sequence[str], partial: bool) -> Source:
    found, notes = pictures(files)
    require(raw, found, splits, "WNID/")
    classes = {  # one ranking, whatever the splits
        split: check_folders(raw, split, rows, split in splits)
        for split, rows in found.items()
        if split in {"train", "val", *splits}
    }
    wnids = tuple(sorted(set().union(*classes.values())))
    kit = devkit.find(raw, files)
    if kit:
        if strangers := sorted(set(wnids) - set(kit.wnids)):
            raise UserError(f"{raw}: folder {strangers[0]} is no class of the devkit")
        wnids, names = kit.wnids, tuple(kit.words[wnid] for wnid in kit.wnids)
    else:
        names = _names(raw, files, wnids)
        if not partial:
            _check_classes(raw, classes)
    parts, labels_from = [], {}
    for split in splits:
        rows = found[split]
        of_rows, labels_from[split] = _wnids(raw, split, rows, kit)
        parts.append(part(split, rows["name"], of_rows, rows["source"], 0, rows["size"]))
    table = labelled(parts, wnids)
    if kit and not partial:
        check_promise(raw, kit, table, splits)
    return Source(
        raw=raw,
        layout="imagefolder",
        table=table,
        wnids=wnids,
        class_names=names,
        labels_from=labels_from,
        containers=(),
        announced=announced(kit, splits),
        notes=notes,
    )


def pictures(
    files: dict[str, int], below: str = ""
) -> tuple[dict[str, pa.RecordBatch], tuple[str, ...]]:
    """The pictures under train/, val/ and test/ of the folder `below`, and a note on other files.

    Columns folder ("" where there is none), name, source (relative to RAW), size (bytes), in the
    order of `files`. A split without pictures is left out.
    """
    sources, sizes = pa.array(list(files), pa.string()), pa.array(list(files.values()), pa.int64())
    found, litter = {}, []
    for split in SPLITS:
        inside = pc.starts_with(sources, f"{below}{split}/")
        source, size = sources.filter(inside), sizes.filter(inside)
        good = pc.match_substring_regex(source, _IS_PICTURE)
        good = pc.and_not(good, pc.match_substring_regex(source, _IS_LITTER))
        litter.append(source.filter(pc.invert(good)))
        source, size = source.filter(good), size.filter(good)
        place = rf"^{re.escape(below)}{split}/(?:(?P<folder>.*)/)?(?P<name>[^/]+)$"
        folder, name = pc.extract_regex(source, place).flatten()
        if len(source):
            columns = {"folder": folder, "name": name, "source": source, "size": size}
            found[split] = pa.record_batch(columns)
    ignored = pa.concat_arrays(litter)
    note = f"ignored {len(ignored)} files that are no pictures, first {pc.min(ignored).as_py()}"
    return found, (note,) if len(ignored) else ()


def require(raw: str, found: Collection[str], splits: Sequence[str], below: str) -> None:
    if absent := [split for split in splits if split not in found]:
        raise UserError(
            f"{raw}: --splits {','.join(splits)} needs pictures in {absent[0]}/{below}, not there; "
            "add them or ask for fewer --splits"
        )


def check_folders(raw: str, split: str, rows: pa.RecordBatch, wanted: bool) -> set[str]:
    """The class folders of one split's `pictures`.

    Raises UserError for pictures below a class folder or in that of another class, and, if the
    split is wanted, when only some are in class folders, or a train picture is in none.
    """
    deep = rows.filter(pc.match_substring(rows["folder"], "/"))
    if deep.num_rows:
        raise UserError(
            f"{raw}: {deep['source'][0].as_py()} lies too deep ({deep.num_rows:,} such pictures); "
            f"expected {split}/WNID/NAME"
        )
    (prefix,) = pc.extract_regex(rows["name"], r"^(?P<wnid>n\d{8})_\d+\.[^.]+$").flatten()
    foldered = pc.not_equal(rows["folder"], "")
    astray = pc.and_(foldered, pc.fill_null(pc.not_equal(prefix, rows["folder"]), False))
    if pc.any(astray).as_py():
        raise UserError(
            f"{raw}: {rows.filter(astray)['source'][0].as_py()} contradicts its folder: the name "
            f"says {prefix.filter(astray)[0].as_py()} ({pc.sum(astray).as_py():,} such pictures); "
            "put it where it belongs"
        )
    flat = rows.filter(pc.invert(foldered))
    if wanted and flat.num_rows and (split == "train" or flat.num_rows < rows.num_rows):
        raise UserError(
            f"{raw}: {flat['source'][0].as_py()} lies in no class folder "
            f"({flat.num_rows:,} such pictures); expected {split}/WNID/"
        )
    return set(pc.unique(rows["folder"]).to_pylist()) - {""}


def _wnids(
    raw: str, split: str, rows: pa.RecordBatch, kit: devkit.Devkit | None
) -> tuple[pa.Array | str, str]:
    """The WNIDs of one split's pictures, "" without a label, and where they come from."""
    truth = {"val": kit.val_wnids, "test": kit.test_wnids}.get(split, ()) if kit else ()
    prefix = f"ILSVRC{kit.year}_{split}" if kit else ""
    where = f"{raw}/{split}"
    if rows["folder"][0].as_py() != "":
        if truth:
            _check_truth(where, rows, prefix, truth)
        return rows["folder"], _BY_FOLDER
    if truth:
        return devkit.wnids_by_number(where, rows["name"], prefix, truth), _BY_NUMBER
    if split == "test":
        return "", "none: the pictures are unlabelled"
    raise UserError(
        f"{where} has no class folders and {raw} no devkit with its labels; add {devkit.NAME}, "
        f"or sort the pictures into {split}/WNID/"
    )


def _check_truth(where: str, rows: pa.RecordBatch, prefix: str, truth: Sequence[str]) -> None:
    """Raises UserError when a folder contradicts the ground truth of a numbered picture."""
    rows = rows.filter(pc.match_substring_regex(rows["name"], rf"^{prefix}_\d{{8}}\.[^.]+$"))
    told = devkit.wnids_by_number(where, rows["name"], prefix, truth)
    wrong = pc.not_equal(rows["folder"], told)
    if pc.any(wrong).as_py():
        name = rows.filter(wrong)["source"][0].as_py()
        raise UserError(
            f"{name} in {where.rpartition('/')[0]} contradicts the devkit, whose ground truth says "
            f"{told.filter(wrong)[0].as_py()} ({pc.sum(wrong).as_py():,} such "
            "pictures); take both from the same release"
        )


def _check_classes(raw: str, classes: dict[str, set[str]]) -> None:
    """Raises UserError when val or test cannot be the same classes as train."""
    train, val = classes.get("train", set()), classes.get("val", set())
    for split in ("val", "test"):
        if strangers := sorted(classes.get(split, set()) - train if train else ()):
            raise UserError(
                f"{raw}: {split}/{strangers[0]} is no class of train ({len(strangers)} such "
                "folders); add train pictures of it, remove it, or pass --partial"
            )
    if len(train) == _FULL_SET and val and val != train:
        missing = min(train - val)
        raise UserError(
            f"{raw}: train has {_FULL_SET} classes and val {len(val)}, without "
            f"{missing}; add what is missing or pass --partial"
        )


def _names(raw: str, files: dict[str, int], wnids: Sequence[str]) -> tuple[str, ...]:
    names = dict(synset_mapping(raw)) if SYNSET_MAPPING in files else {}
    return tuple(names.get(wnid) or wnid for wnid in wnids)


def synset_mapping(raw: str) -> list[tuple[str, str]]:
    """(WNID, name) of each line "n01440764 tench, Tinca tinca" of LOC_synset_mapping.txt."""
    text = storage.read(storage.join(raw, SYNSET_MAPPING)).decode("utf-8", "replace")
    pairs = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [(wnid, name.strip()) for wnid, _, name in pairs]
