"""Images in folders: train/WNID/, val/WNID/ and test/WNID/, or flat val/ and test/; or folders of
classes alone, which all are train.

Flat val images get their labels from a devkit beside the folders; flat test images have none,
unless it is the devkit of 2010 with its test ground truth.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import entries, storage
from pipelines.sources import devkit
from pipelines.sources.ilsvrc import announced, check_promise
from pipelines.sources.table import (
    NO_LABELS,
    SPLITS,
    Layout,
    Source,
    fewer,
    labelled,
    part,
    read_text,
    with_own_keys,
)

SYNSET_MAPPING = "LOC_synset_mapping.txt"
_BY_FOLDER = "name of the class folder"
_BY_NUMBER = "number in the file name, line of the devkit's ground truth, WNID of meta.mat"
# A file under any other name may be an image, which its bytes will tell.
_ENDING = r"\.(jpe?g|jpe|jfif|png|webp|bmp|gif|tiff?|ppm|pgm|pbm)$"
_IS_IMAGE, _IN_FOLDER = rf"(?i){_ENDING}", rf"(?i)^[^/]+/[^/]+{_ENDING}"
_IS_ARCHIVE = r"(?i)\.(tar|tgz|tbz2?|txz|tar\.\w+|zip|7z|rar|parquet|arrow|tfrecords?|mdb)$"
_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_FULL_SET = 1000  # classes of ILSVRC


@dataclass(frozen=True)
class Found:
    """images: of each split that has some, columns folder ("" where there is none), name, source
    (relative to RAW), size (bytes), in the order of the names. vacant: class folders without an
    image, by split, and why. left_out: entries that were passed over by --partial, and why."""

    images: dict[str, pa.RecordBatch]
    vacant: dict[str, dict[str, str]]
    left_out: dict[str, str]


def _recognises(found: entries.Listing) -> bool:
    return any(map(any, _split_folders(found, "").values()))


def _is_unsplit(found: entries.Listing) -> bool:
    """Images lie in folders at the top, none of which is called like a split."""
    return not _recognises(found) and any(re.search(_IN_FOLDER, name) for name in found.files)


def places(found: entries.Listing, below: str = "") -> dict[str, str]:
    """Regex of the entries of each split."""
    tops = _split_folders(found, below)
    return {
        s: rf"^{re.escape(below)}({'|'.join(names)})(/|$)" if any(names) else ""
        for s, names in tops.items()
        if names
    }


def _scan(raw: str, listing: entries.Listing, splits: Sequence[str], partial: bool) -> Source:
    files = listing.files
    ranking = [split for split in SPLITS if split in {"train", "val", *splits}]
    found = images(raw, listing, ranking, partial)
    require(raw, found, splits, "WNID/")
    classes = {split: {*vacant} for split, vacant in found.vacant.items()}
    for split, rows in found.images.items():  # one ranking, whatever the splits
        classes[split] |= check_folders(raw, split, rows, split in splits)
    wnids = tuple(sorted(set().union(*classes.values())))
    kit = devkit.find(raw, files)
    if kit:
        if strangers := sorted(set(wnids) - set(kit.wnids)):
            raise UserError(f"{raw}: folder {strangers[0]} is no class of the devkit")
        wnids, names = kit.wnids, tuple(kit.words[wnid] for wnid in kit.wnids)
    else:
        told = dict(synset_mapping(raw)) if SYNSET_MAPPING in files else {}
        names = tuple(told.get(wnid) or wnid for wnid in wnids)
        if not partial:
            _check_classes(raw, classes)
    parts, labels_from = [], {}
    for split in splits:
        rows = found.images[split]
        of_rows, labels_from[split] = _wnids(raw, split, rows, kit)
        parts.append(part(split, rows["name"], of_rows, rows["source"], 0, rows["size"]))
    table = with_own_keys(labelled(parts, wnids))
    if kit and not partial:
        check_promise(raw, kit, table, splits)
    return Source(
        raw=raw,
        layout="imagefolder",
        table=table,
        wnids=wnids,
        class_names=names,
        labels_from=labels_from,
        announced=announced(kit, splits),
        left_out=found.left_out,
    )


def _split_folders(found: entries.Listing, below: str) -> dict[str, list[str]]:
    """The folders in `below` that hold each split; [] where none does. "" is `below` itself."""
    tops = found.tops(below)
    folders = {
        split: [top for top in tops if top.lower() in known] for split, known in _FOLDERS.items()
    }
    return folders if below or any(folders.values()) else folders | {"train": [""]}


def images(
    raw: str, found: entries.Listing, splits: Sequence[str], partial: bool, below: str = ""
) -> Found:
    """What may be an image in the folders of `splits`, which lie in the folder `below`.

    Raises UserError for a split with two folders, for archives among the images, and, unless
    `partial`, for class folders in which no file may be an image.
    """
    names = pa.array(list(found.files), pa.string())
    sizes = pa.array(list(found.files.values()), pa.int64())
    batches, vacant = {}, {}
    left_out: dict[str, str] = {}
    for split, tops in _split_folders(found, below).items():
        if len(tops) > 1:
            raise UserError(f"{raw} is ambiguous: {' and '.join(tops)} both are {split}; keep one")
        if split not in splits or not tops:
            continue
        place = f"{below}{tops[0]}/" if tops[0] else below
        inside = pc.starts_with(names, place)
        source, size = names.filter(inside), sizes.filter(inside)
        rule = entries.rules(source)
        archive = pc.and_(pc.is_null(rule), pc.match_substring_regex(source, _IS_ARCHIVE))
        left_out |= _archives(raw, source.filter(archive), partial)
        good = pc.and_(pc.is_null(rule), pc.invert(archive))
        ignored = source.filter(pc.invert(good)).to_pylist()
        source, size = source.filter(good), size.filter(good)
        inner = rf"^{re.escape(place)}(?:(?P<folder>.*)/)?(?P<name>[^/]+)$"
        folder, name = pc.extract_regex(source, inner).flatten()
        vacant[split] = _vacant(found, place, ignored, set(pc.unique(folder).to_pylist()))
        vacant[split] |= _strange(raw, source, folder)
        if len(source):
            columns = {"folder": folder, "name": name, "source": source, "size": size}
            batches[split] = pa.record_batch(columns)
            if not pc.any(pc.not_equal(folder, "")).as_py():  # flat: no class folders
                vacant[split] = {}
        empty = {f"{place}{name}" for name in vacant[split]} & set(found.empty)
        left_out |= dict.fromkeys(sorted(empty), "an empty class folder")
    _refuse_vacant(raw, vacant, partial)
    return Found(batches, vacant, left_out)


def _archives(raw: str, names: pa.Array, partial: bool) -> dict[str, str]:
    if len(names) and not partial:
        raise UserError(
            f"{raw}: {names[0].as_py()} is an archive among class folders ({len(names):,} such); "
            "extract them, or pass --partial to leave them out"
        )
    return dict.fromkeys(names.to_pylist(), "an archive among class folders")


def _vacant(
    found: entries.Listing, place: str, ignored: Sequence[str], filled: set[str]
) -> dict[str, str]:
    """The class folders in `place` in which no file may be an image, and why."""
    reasons = dict.fromkeys([*ignored, *found.ignored], "no file in it may be an image")
    reasons |= dict.fromkeys(found.empty, "it is empty") | found.broken
    folders = {*found.empty} | {name for name in found.broken if not _is_file(name)}
    classes: dict[str, str] = {}
    for name, why in reasons.items():
        first, _, rest = name.removeprefix(place).partition("/")
        if name.startswith(place) and (rest or name in folders):
            classes[first] = why
    taken = {name.split("/", 1)[0] for name in filled}
    return {name: classes[name] for name in sorted(classes.keys() - taken)}


def _strange(raw: str, source: pa.Array, folder: pa.Array) -> dict[str, str]:
    """The class folders without a usual ending of images in which no file begins like one."""
    usual = pc.unique(folder.filter(pc.match_substring_regex(source, _IS_IMAGE)))
    odd = pc.unique(folder.filter(pc.invert(pc.is_in(folder, value_set=usual)))).to_pylist()
    if not odd:
        return {}
    from pipelines.transform.headers import form  # with its package's torch: seldom needed

    strange = {}
    for name in sorted({*odd} - {""}):
        files = source.filter(pc.equal(folder, name)).to_pylist()
        if not any(form(storage.read(storage.join(raw, file), 0, 32)) for file in files):
            strange[name] = f"none of its {len(files):,} files begins like an image"
    return strange


def _is_file(name: str) -> bool:
    """Of what cannot be looked at: a class folder, unless the name is that of a file."""
    return bool(re.search(_IS_IMAGE, name) or entries.rule(name))


def _refuse_vacant(raw: str, vacant: dict[str, dict[str, str]], partial: bool) -> None:
    reasons = {f"{split}/{name}": why for split, of in vacant.items() for name, why in of.items()}
    if reasons and not partial:
        raise UserError(
            f"{raw}: {len(reasons):,} class folder{'s' * (len(reasons) > 1)} without an image: "
            f"{entries.named(reasons)}; add images or remove the folder, or pass --partial to keep "
            "its label without images"
        )


def require(raw: str, found: Found, splits: Sequence[str], below: str) -> None:
    if absent := [split for split in splits if split not in found.images]:
        folders = " or ".join(f"{name}/{below}" for name in _FOLDERS[absent[0]])
        own = ", or pass --val-share 0.1 to hold out a tenth of train" if absent == ["val"] else ""
        raise UserError(
            f"{raw}: --splits {','.join(splits)} needs images in {folders}, not there; add them"
            f"{own}{fewer(splits, absent)}"
        )


def check_folders(raw: str, split: str, rows: pa.RecordBatch, wanted: bool) -> set[str]:
    """The class folders of one split's `images`.

    Raises UserError for images below a class folder or in that of another class, and, if the
    split is wanted, when only some are in class folders, or a train image is in none.
    """
    deep = rows.filter(pc.match_substring(rows["folder"], "/"))
    if deep.num_rows:
        raise UserError(
            f"{raw}: {deep['source'][0].as_py()} lies too deep ({deep.num_rows:,} such images); "
            f"expected {split}/WNID/NAME"
        )
    (prefix,) = pc.extract_regex(rows["name"], r"^(?P<wnid>n\d{8})_\d+\.[^.]+$").flatten()
    foldered = pc.not_equal(rows["folder"], "")
    astray = pc.and_(foldered, pc.fill_null(pc.not_equal(prefix, rows["folder"]), False))
    if pc.any(astray).as_py():
        raise UserError(
            f"{raw}: {rows.filter(astray)['source'][0].as_py()} contradicts its folder: the name "
            f"says {prefix.filter(astray)[0].as_py()} ({pc.sum(astray).as_py():,} such images); "
            "put it where it belongs"
        )
    flat = rows.filter(pc.invert(foldered))
    if wanted and flat.num_rows and (split == "train" or flat.num_rows < rows.num_rows):
        raise UserError(
            f"{raw}: {flat['source'][0].as_py()} lies in no class folder "
            f"({flat.num_rows:,} such images); expected {split}/WNID/"
        )
    return set(pc.unique(rows["folder"]).to_pylist()) - {""}


def _wnids(
    raw: str, split: str, rows: pa.RecordBatch, kit: devkit.Devkit | None
) -> tuple[pa.Array | str, str]:
    """The WNIDs of one split's images, "" without a label, and where they come from."""
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
        return "", NO_LABELS
    raise UserError(
        f"{where} has no class folders and {raw} no devkit with its labels; add {devkit.NAME}, "
        f"or sort the images into {split}/WNID/"
    )


def _check_truth(where: str, rows: pa.RecordBatch, prefix: str, truth: Sequence[str]) -> None:
    """Raises UserError when a folder contradicts the ground truth of a numbered image."""
    rows = rows.filter(pc.match_substring_regex(rows["name"], rf"^{prefix}_\d{{8}}\.[^.]+$"))
    told = devkit.wnids_by_number(where, rows["name"], prefix, truth)
    wrong = pc.not_equal(rows["folder"], told)
    if pc.any(wrong).as_py():
        name = rows.filter(wrong)["source"][0].as_py()
        raise UserError(
            f"{name} in {where.rpartition('/')[0]} contradicts the devkit, whose ground truth says "
            f"{told.filter(wrong)[0].as_py()} ({pc.sum(wrong).as_py():,} such "
            "images); take both from the same release"
        )


def _check_classes(raw: str, classes: dict[str, set[str]]) -> None:
    """Raises UserError when val or test cannot be the same classes as train."""
    train, val = classes.get("train", set()), classes.get("val", set())
    for split in ("val", "test"):
        if strangers := sorted(classes.get(split, set()) - train if train else ()):
            raise UserError(
                f"{raw}: {split}/{strangers[0]} is no class of train ({len(strangers)} such "
                "folders); add train images of it, remove it, or pass --partial"
            )
    if len(train) == _FULL_SET and val and val != train:
        missing = min(train - val)
        raise UserError(
            f"{raw}: train has {_FULL_SET} classes and val {len(val)}, without "
            f"{missing}; add what is missing or pass --partial"
        )


def synset_mapping(raw: str) -> list[tuple[str, str]]:
    """(WNID, name) of each line "n01440764 tench, Tinca tinca" of LOC_synset_mapping.txt."""
    text = read_text(storage.join(raw, SYNSET_MAPPING))
    pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(wnid, "".join(name).strip()) for wnid, *name in pairs]


LAYOUT = Layout(
    name="class folders",
    expected="folders train/WNID/ and val/WNID/",
    lists=r"^(LOC_synset_mapping\.txt|ILSVRC20(12_devkit_t12|10_devkit-1\.0)\.tar\.gz"
    r"|ILSVRC2010_test_ground_truth\.txt)$",
    recognises=_recognises,
    places=places,
    scan=_scan,
)
UNSPLIT_LAYOUT = replace(
    LAYOUT,
    name="class folders without splits",
    expected="folders CLASS/ of images, with --val-share",
    recognises=_is_unsplit,
)
