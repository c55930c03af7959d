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
from pipelines import devkit, storage
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
    foldered = _splits(found, {"train", "val", *splits})  # one ranking, whatever the splits
    foldered = foldered.filter(pc.not_equal(foldered["folder"], ""))
    check_folders(raw, foldered)
    found = of_splits(raw, found, splits, "WNID/")
    kit = devkit.find(raw, files)
    parts, labels_from = [], {}
    for split in splits:
        rows = found.filter(pc.equal(found["split"], split))
        wnids, labels_from[split] = _wnids(raw, split, rows, kit)
        parts.append(part(split, rows["name"], wnids, rows["source"], 0, rows["size"]))
    classes = tuple(sorted(pc.unique(foldered["folder"]).to_pylist()))
    if kit:
        if strangers := sorted(set(classes) - set(kit.wnids)):
            raise UserError(f"{raw}: folder {strangers[0]} is no class of the devkit")
        classes, names = kit.wnids, tuple(kit.words[wnid] for wnid in kit.wnids)
    else:
        names = _names(raw, files, classes)
        if not partial:
            _check_classes(raw, foldered)
    table = labelled(parts, classes)
    if kit and not partial:
        check_promise(raw, kit, table, splits)
    return Source(
        raw=raw,
        layout="imagefolder",
        table=table,
        wnids=classes,
        class_names=names,
        labels_from=labels_from,
        containers=(),
        announced=announced(kit, splits),
        notes=notes,
    )


def pictures(files: dict[str, int], below: str = "") -> tuple[pa.Table, tuple[str, ...]]:
    """The pictures under train/, val/ and test/ of the folder `below`, and a note on other files.

    Columns split, folder ("" where there is none), name, source (relative to RAW), size (bytes).
    """
    source, size = pa.array(list(files), pa.string()), pa.array(list(files.values()), pa.int64())
    place = rf"^{re.escape(below)}(?P<split>train|val|test)/(?:(?P<folder>.*)/)?(?P<name>[^/]+)$"
    found = pc.extract_regex(source, place)
    columns = {name: pc.struct_field(found, name) for name in ("split", "folder", "name")}
    table = pa.table({**columns, "source": source, "size": size})
    table = table.filter(pc.is_valid(table["split"])).combine_chunks()
    picture = pc.match_substring_regex(table["source"], _IS_PICTURE)
    litter = pc.match_substring_regex(table["source"], _IS_LITTER)
    ignored = table.filter(pc.or_(pc.invert(picture), litter))
    table = table.filter(pc.and_(picture, pc.invert(litter)))
    if not ignored.num_rows:
        return table, ()
    first = pc.min(ignored["source"]).as_py()
    return table, (f"ignored {ignored.num_rows} files that are no pictures, first {first}",)


def of_splits(raw: str, found: pa.Table, splits: Sequence[str], below: str) -> pa.Table:
    """The `pictures` of `splits`, in sorted order.

    Raises UserError when a split has none, when only some of its pictures are in class folders,
    and when train pictures are in none.
    """
    found = _splits(found, splits)
    for split in splits:
        if not pc.any(pc.equal(found["split"], split)).as_py():
            raise UserError(
                f"{raw}: --splits {','.join(splits)} needs pictures in {split}/{below}, not there; "
                "add them or ask for fewer --splits"
            )
    foldered = pc.not_equal(found["folder"], "")
    for split in splits:
        here = pc.equal(found["split"], split)
        flat = found.filter(pc.and_(here, pc.invert(foldered)))
        if flat.num_rows and (split == "train" or flat.num_rows < pc.sum(here).as_py()):
            raise UserError(
                f"{raw}: {flat['source'][0].as_py()} lies in no class folder "
                f"({flat.num_rows:,} such pictures); expected {split}/WNID/"
            )
    return found.sort_by("source").combine_chunks()


def _splits(found: pa.Table, splits: Collection[str]) -> pa.Table:
    return found.filter(pc.is_in(found["split"], value_set=pa.array([*splits], pa.string())))


def check_folders(raw: str, found: pa.Table) -> None:
    """Raises UserError for `pictures` below a class folder, or in that of another class."""
    named = pc.extract_regex(found["name"], r"^(?P<wnid>n\d{8})_\d+\.[^.]+$")
    prefix = pc.struct_field(named, "wnid")
    deep = found.filter(pc.match_substring(found["folder"], "/"))
    if deep.num_rows:
        raise UserError(
            f"{raw}: {deep['source'][0].as_py()} lies too deep ({deep.num_rows:,} such pictures); "
            "expected SPLIT/WNID/NAME"
        )
    astray = pc.fill_null(pc.not_equal(prefix, found["folder"]), False)
    if pc.any(astray).as_py():
        raise UserError(
            f"{raw}: {found.filter(astray)['source'][0].as_py()} contradicts its folder: the name "
            f"says {prefix.filter(astray)[0].as_py()} ({pc.sum(astray).as_py():,} such pictures); "
            "put it where it belongs"
        )


def _wnids(
    raw: str, split: str, rows: pa.Table, kit: devkit.Devkit | None
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
        names = rows["name"].combine_chunks()
        return devkit.wnids_by_number(where, names, prefix, truth), _BY_NUMBER
    if split == "test":
        return "", "none: the pictures are unlabelled"
    raise UserError(
        f"{where} has no class folders and {raw} no devkit with its labels; add {devkit.NAME}, "
        f"or sort the pictures into {split}/WNID/"
    )


def _check_truth(where: str, rows: pa.Table, prefix: str, truth: Sequence[str]) -> None:
    """Raises UserError when a folder contradicts the ground truth of a numbered picture."""
    rows = rows.filter(pc.match_substring_regex(rows["name"], rf"^{prefix}_\d{{8}}\.[^.]+$"))
    told = devkit.wnids_by_number(where, rows["name"].combine_chunks(), prefix, truth)
    wrong = pc.not_equal(rows["folder"], told)
    if pc.any(wrong).as_py():
        name = rows.filter(wrong)["source"][0].as_py()
        raise UserError(
            f"{name} in {where.rpartition('/')[0]} contradicts the devkit, whose ground truth says "
            f"{told.filter(wrong.combine_chunks())[0].as_py()} ({pc.sum(wrong).as_py():,} such "
            "pictures); take both from the same release"
        )


def _check_classes(raw: str, foldered: pa.Table) -> None:
    """Raises UserError when val or test cannot be the same classes as train."""
    classes = {
        split: set(
            pc.unique(foldered.filter(pc.equal(foldered["split"], split))["folder"]).to_pylist()
        )
        for split in SPLITS
    }
    train = classes["train"]
    for split in ("val", "test"):
        if strangers := sorted(classes[split] - train if train else ()):
            raise UserError(
                f"{raw}: {split}/{strangers[0]} is no class of train ({len(strangers)} such "
                "folders); add train pictures of it, remove it, or pass --partial"
            )
    if len(train) == _FULL_SET and classes["val"] and classes["val"] != train:
        missing = min(train - classes["val"])
        raise UserError(
            f"{raw}: train has {_FULL_SET} classes and val {len(classes['val'])}, without "
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
