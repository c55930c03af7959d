"""The layout of Kaggle's "ImageNet Object Localization Challenge".

Images lie in ILSVRC/Data/CLS-LOC/{train/WNID,val,test}/. LOC_synset_mapping.txt has the classes,
LOC_val_solution.csv the labels of val. LOC_train_solution.csv repeats those of the train images
with boxes, about two fifths. ILSVRC/ImageSets/CLS-LOC/{train_cls,val,test}.txt list the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import entries, storage
from pipelines.sources import folders
from pipelines.sources.folders import SYNSET_MAPPING, check_folders, require, synset_mapping
from pipelines.sources.table import NO_LABELS, Layout, Source, labelled, part, read_text

_DATA = "ILSVRC/Data/CLS-LOC/"
_SOLUTION = "LOC_{}_solution.csv"
_LISTS = {
    "train": "ILSVRC/ImageSets/CLS-LOC/train_cls.txt",
    "val": "ILSVRC/ImageSets/CLS-LOC/val.txt",
    "test": "ILSVRC/ImageSets/CLS-LOC/test.txt",
}
_DOWNLOADS = ("imagenet-object-localization-challenge", "imagenet_object_localization")


def _recognises(found: entries.Listing) -> bool:
    """Also the download as it came, if there is nothing else, to say what to do with it."""
    if found.tops(_DATA):
        return True
    archives = _archives(found.files)
    others = [name for name in found.files if name not in archives]
    return bool(archives) and all(name.startswith("LOC_") for name in others)


def _scan(raw: str, listing: entries.Listing, splits: Sequence[str], partial: bool) -> Source:
    files = listing.files
    if not listing.tops(_DATA):
        archive = _archives(files)[0]
        raise UserError(
            f"{raw} holds {archive} as it was downloaded; extract it there (byte ranges of what "
            "is compressed cannot be read)"
        )
    wnids, names = _classes(raw, files)
    found = folders.images(raw, listing, splits, partial, _DATA)
    require(raw, found, splits, "")
    parts, labels_from, announced = [], {}, {}
    for split in splits:
        rows = found.images[split]
        check_folders(raw, split, rows, wanted=True)
        keys = pc.replace_substring_regex(rows["name"], r"\.[^.]*$", "")
        listed = _listed(raw, split) if _LISTS[split] in files else None
        solution = _solution(raw, split) if _SOLUTION.format(split) in files else None
        if not partial:
            _check_complete(raw, split, keys, listed, solution)
        if listed is not None:
            announced[split] = len(listed)
        wnid, labels_from[split] = _wnids(raw, split, rows, keys, solution)
        parts.append(part(split, rows["name"], wnid, rows["source"], 0, rows["size"]))
    table = labelled(parts, wnids)
    _check_classes(raw, table, wnids, splits, partial)
    return Source(
        raw=raw,
        layout="kaggle",
        table=table,
        wnids=wnids,
        class_names=names,
        labels_from=labels_from,
        announced=announced or None,
        left_out=found.left_out,
    )


def _archives(files: dict[str, int]) -> list[str]:
    return [
        name
        for name in files
        if name.startswith(_DOWNLOADS) and name.endswith((".zip", ".tar.gz", ".tgz", ".tar"))
    ]


def _classes(raw: str, files: dict[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if SYNSET_MAPPING not in files:
        raise UserError(f"{raw}: {SYNSET_MAPPING} is not there; add it from the same download")
    pairs = synset_mapping(raw)
    wnids = [wnid for wnid, _ in pairs]
    if not wnids or wnids != sorted(set(wnids)):
        after = next((b for a, b in pairwise(wnids) if a >= b), "nothing")
        raise UserError(
            f"{raw}/{SYNSET_MAPPING}: {after} is out of order or there twice, but the labels are "
            "the ranks of sorted WNIDs; take the file of the original download"
        )
    return tuple(wnids), tuple(name or wnid for wnid, name in pairs)


def _listed(raw: str, split: str) -> pa.Array:
    """Keys in a list with lines such as "n01440764/n01440764_8084 1" or "ILSVRC2012_val_… 1"."""
    return pc.replace_substring_regex(_lines(storage.join(raw, _LISTS[split])), r"^\S*/|\s.*$", "")


def _solution(raw: str, split: str) -> pa.Table:
    """Columns key and wnid of the csv, whose rows "KEY,WNID x y x y WNID x y x y …" are unsorted.

    Raises UserError for a row that is none, whose boxes have several WNIDs, or that comes twice.
    """
    uri = storage.join(raw, _SOLUTION.format(split))
    lines = _lines(uri)
    lines = lines.filter(pc.not_equal(lines, "ImageId,PredictionString"))
    row = pc.extract_regex(
        lines, r"^(?P<key>[^,\s]+),\s*(?P<boxes>(?:n\d{8}(?:\s+-?[\d.]+){4}\s*)+)$"
    )
    if row.null_count:
        strange = lines.filter(pc.is_null(row))[0].as_py()
        raise UserError(f"{uri}: {strange[:80]!r} is no row KEY,WNID x y x y; fetch it again")
    keys = pc.struct_field(row, "key")
    words = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(pc.struct_field(row, "boxes")))
    first = pc.list_element(words, 0)
    is_wnid = pc.starts_with(words.flatten(), "n")
    wnids, rows = words.flatten().filter(is_wnid), pc.list_parent_indices(words).filter(is_wnid)
    differs = pc.not_equal(wnids, first.take(rows))
    if pc.any(differs).as_py():
        number = rows.filter(differs)[0].as_py()
        raise UserError(
            f"{uri}: the row of {keys[number].as_py()} names {first[number].as_py()} and "
            f"{wnids.filter(differs)[0].as_py()}; fetch it again"
        )
    if len(pc.unique(keys)) < len(keys):
        counts = pc.value_counts(keys)
        twice = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))[0]["values"]
        raise UserError(f"{uri} has several rows for {twice.as_py()}; fetch it again")
    return pa.table({"key": keys, "wnid": first})


def _lines(uri: str) -> pa.Array:
    """Without those that are blank."""
    text = read_text(uri).replace("\r\n", "\n").replace("\r", "\n")
    lines = pc.split_pattern(pa.array([text]), "\n").flatten()
    return lines.filter(pc.match_substring_regex(lines, r"\S"))


def _check_complete(
    raw: str, split: str, keys: pa.Array, listed: pa.Array | None, solution: pa.Table | None
) -> None:
    """Raises UserError when an image of a list is not there, or one that is on no list."""
    expected = {_SOLUTION.format(split): None if solution is None else solution["key"]}
    expected[_LISTS[split]] = listed
    for name, wanted in expected.items():
        if wanted is None:
            continue
        absent = wanted.filter(pc.invert(pc.is_in(wanted, value_set=keys)))
        if len(absent):
            raise UserError(
                f"{raw}: {absent[0].as_py()} of {name} is not in {_DATA}{split} ({len(absent):,} "
                f"of {len(wanted):,} are missing); add them or pass --partial"
            )
    if listed is None:
        return
    extra = keys.filter(pc.invert(pc.is_in(keys, value_set=listed)))
    if len(extra):
        raise UserError(
            f"{raw}: {extra[0].as_py()} in {_DATA}{split} is not in {_LISTS[split]} "
            f"({len(extra):,} of {len(keys):,}); remove them or pass --partial"
        )


def _wnids(
    raw: str, split: str, rows: pa.RecordBatch, keys: pa.Array, solution: pa.Table | None
) -> tuple[pa.Array | str, str]:
    """The WNIDs of one split's images, "" without a label, and where they come from. Raises
    UserError when the folder and the solution contradict each other, or when a val image has no
    label."""
    file = _SOLUTION.format(split)
    told = pa.nulls(len(keys), pa.string())
    if solution is not None:
        places = pc.index_in(keys, value_set=solution["key"].combine_chunks())
        told = solution["wnid"].combine_chunks().take(places)
    folder = rows["folder"]
    if folder[0].as_py() != "":  # val, too, where it was sorted by hand
        wrong = pc.fill_null(pc.not_equal(folder, told), False)
        if pc.any(wrong).as_py():
            raise UserError(
                f"{raw}: {rows.filter(wrong)['source'][0].as_py()} contradicts {file}, which says "
                f"{told.filter(wrong)[0].as_py()} ({pc.sum(wrong).as_py():,} such images); "
                "take both from the original download"
            )
        return folder, "name of the class folder" + f", equal to {file}" * (solution is not None)
    if split == "test":
        return "", NO_LABELS
    if told.null_count:
        raise UserError(
            f"{raw}: {keys.filter(pc.is_null(told))[0].as_py()} has no row in {file} "
            f"({told.null_count:,} {split} images without a label); add it from the original "
            "download"
        )
    return told, file


def _check_classes(
    raw: str, table: pa.Table, wnids: Sequence[str], splits: Sequence[str], partial: bool
) -> None:
    known = pc.is_in(table["wnid"], value_set=pa.array([*wnids, ""], pa.string()))
    if strange := table["wnid"].filter(pc.invert(known))[:1].to_pylist():
        raise UserError(f"{raw}: {strange[0]} is no class of {SYNSET_MAPPING}; remove its images")
    found = set(pc.unique(table["wnid"].filter(pc.equal(table["split"], "train"))).to_pylist())
    if "train" in splits and not partial and len(found) < len(wnids):
        raise UserError(
            f"{raw}: {min(set(wnids) - found)} of {SYNSET_MAPPING} has no train images "
            f"({len(wnids) - len(found)} such classes); add them or pass --partial"
        )


LAYOUT = Layout(
    name="the Kaggle layout",
    expected="Kaggle's ILSVRC/Data/CLS-LOC/",
    lists=r"^(LOC_[^/]*|ILSVRC/ImageSets/CLS-LOC/[^/]*)$",
    recognises=_recognises,
    places=lambda found: folders.places(found, _DATA),
    scan=_scan,
)
