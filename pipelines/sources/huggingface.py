"""Parquet files as Hugging Face's ILSVRC/imagenet-1k has them, and as people push their own sets.

{train,validation,test}-00000-of-00294.parquet in RAW or RAW/data, with the columns `image` (struct
of bytes and path) and `label`. ImageNet's paths repeat the WNID, so that every label can be
checked; elsewhere the label's number stands for a name of its ClassLabel feature, which is then
the class. Label -1 is a test image without one. Only paths and labels are read, never images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alexnet.errors import UserError
from pipelines import entries, storage
from pipelines.sources.table import (
    NO_LABELS,
    PARQUET,
    SPLITS,
    UNLABELLED,
    Layout,
    Source,
    fewer,
    image_names,
    labelled,
    order_that_mixes,
    part,
    ranked,
    with_own_keys,
)

_PART = re.compile(
    r"(?P<series>(?:data/)?(?P<split>train|validation|val|test))-(?P<number>\d{5})-of-"
    r"(?P<total>\d{5})(?:-[0-9a-f]{16})?\.parquet"
)
_WNID_FIRST, _WNID_LAST = r"^(?P<wnid>n\d{8})_\d", r"_(?P<wnid>n\d{8})\.[^.]*$"
_THREADS_S3 = 16


@dataclass(frozen=True)
class _File:
    name: str
    split: str
    series: str  # what all parts of a split begin with
    number: int
    total: int


@dataclass(frozen=True)
class _Found:
    file: _File
    rows: pa.Table  # of `part`
    classes: pa.Table  # columns label, wnid, place: where each pair of the two is first
    names: tuple[str, ...]  # of the classes, if the file tells
    by_name: bool  # the classes are these names: no path tells a WNID


def _recognises(found: entries.Listing) -> bool:
    return any(name.endswith(PARQUET) and _PART.fullmatch(name) for name in found.files)


def _scan(raw: str, listing: entries.Listing, splits: Sequence[str], partial: bool) -> Source:
    files = listing.files
    files_there = _parts(raw, files, splits, partial)
    with ThreadPoolExecutor(_THREADS_S3 if storage.is_s3(raw) else 1) as pool:
        read = list(pool.map(lambda file: _read(raw, file), files_there))
    own = any(found.by_name for found in read)
    if own:
        names = _own_names(raw, read, partial)
        wnids = class_names = tuple(sorted(names))
        note = "labels are the ranks of the sorted class names, not the numbers in the files"
        notes: tuple[str, ...] = () if wnids == names else (note,)
    else:
        classes = pa.concat_tables([found.classes for found in read])
        names = next((found.names for found in read if found.names), ())
        _, wnids, class_names, notes = ranked(raw, classes, names, partial)
    used = [found for split in splits for found in read if found.file.split == split]
    table = labelled([found.rows for found in used], wnids)
    shuffle = order_that_mixes(table)
    origin = "a name of its ClassLabel" if own else "equal to the rank of the WNID in image.path"
    with_labels = {found.file.split for found in used if len(found.classes)}
    return Source(
        raw=raw,
        layout="huggingface",
        table=with_own_keys(table) if own else table,
        wnids=wnids,
        class_names=class_names,
        labels_from={
            split: f"column label, {origin}" if split in with_labels else NO_LABELS
            for split in splits
        },
        containers=tuple((found.file.name, files[found.file.name]) for found in used),
        notes=notes,
        shuffle=shuffle,
    )


def _own_names(raw: str, read: list[_Found], partial: bool) -> tuple[str, ...]:
    """The classes of a set where they are the names of the ClassLabel feature.

    Raises UserError where files disagree about them or have labels without a name, and, unless
    `partial`, for a class without an image.
    """
    one = next(found for found in read if found.by_name)
    known = set[str]()
    for found in read:
        if len(found.classes) and (found.by_name, found.names) != (True, one.names):
            raise UserError(
                f"{raw}: {found.file.name} has other class names than {one.file.name}, or a WNID "
                "in its paths where that has none; take the files of one data set"
            )
        known |= {*found.classes["wnid"].to_pylist()}
    if (missing := sorted({*one.names} - known)) and not partial:
        raise UserError(
            f"{raw}: {len(missing):,} of {len(one.names):,} classes have no image, first "
            f"{missing[0]}; add what is missing or pass --partial"
        )
    return one.names


def _parts(raw: str, files: dict[str, int], splits: Sequence[str], partial: bool) -> list[_File]:
    """Every file there: of all splits, so that labels do not depend on the splits asked for.

    Raises UserError when a split of `splits` has none, when there are two sets of files for a
    split, and, unless `partial`, when some of a set are missing.
    """
    found = []
    for name in sorted(files):
        if match := _PART.fullmatch(name):
            split = "val" if match["split"] == "validation" else match["split"]
            number, total = int(match["number"]), int(match["total"])
            found.append(_File(name, split, match["series"], number, total))
    for split in sorted({file.split for file in found}):
        own = [file for file in found if file.split == split]
        sets = {(file.series, file.total): file.name for file in own}
        numbers = {file.number for file in own}
        if len(sets) > 1 or len(numbers) < len(own):
            names = [*sets.values()] if len(sets) > 1 else [file.name for file in own]
            raise UserError(
                f"{raw} holds several sets of {split} files ({names[0]}, {names[1]}, …); keep one"
            )
        missing = sorted(set(range(own[0].total)) - numbers)
        if missing and not partial:
            raise UserError(
                f"{raw}: {own[0].series}-{missing[0]:05d}-of-{own[0].total:05d}.parquet is not "
                f"there ({len(missing)} of {own[0].total} missing); add them or pass --partial"
            )
    if absent := [split for split in splits if split not in {file.split for file in found}]:
        expected = "validation" if absent[0] == "val" else absent[0]
        raise UserError(
            f"{raw}: --splits {','.join(splits)} needs {expected}-*.parquet, not there; "
            f"add them{fewer(splits, absent)}"
        )
    return found


def _read(raw: str, file: _File) -> _Found:
    """Without Arrow's threads and row group by row group, so that it takes little memory."""
    uri = storage.join(raw, file.name)
    stored = storage.RangeFile(uri, 0, storage.size(uri))
    try:
        with pq.ParquetFile(stored, pre_buffer=False) as parquet:
            _check_schema(uri, parquet.schema_arrow)
            groups = [
                parquet.read_row_group(number, ["image.path", "label"], use_threads=False)
                for number in range(parquet.num_row_groups)
            ]
            names = _told_names(parquet.schema_arrow.metadata or {})
            rows = pa.concat_tables([_columns(group) for group in groups] or [_EMPTY])
            rows.validate(full=True)  # paths that are no UTF-8, which Arrow takes as they come
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{uri} is damaged ({line}); fetch it again") from error
    rows = rows.combine_chunks()
    number = pa.array(np.arange(len(rows)), pa.int64())
    by_name = bool(names) and not _tells_wnids(rows)
    wnid = (_named if by_name else _wnids)(uri, file.split, rows, names)
    pairs = pa.table({"label": rows["label"], "wnid": wnid, "row": number})
    pairs = pairs.filter(pc.not_equal(pairs["label"], UNLABELLED))
    first = pairs.group_by(["label", "wnid"], use_threads=False).aggregate([("row", "min")])
    places = pa.array(
        [f"{file.name} row {row:,}" for row in first["row_min"].to_pylist()], pa.string()
    )
    return _Found(
        file,
        part(
            file.split,
            image_names(rows["path"], file.name, number),
            wnid,
            file.name,
            number,
            None,
        ),
        first.drop_columns(["row_min"]).append_column("place", places),
        names,
        by_name and len(first) > 0,
    )


_EMPTY = pa.Table.from_batches([], pa.schema([("path", pa.string()), ("label", pa.int64())]))


def _columns(group: pa.Table) -> pa.Table:
    path = pa.nulls(len(group), pa.string())
    if "image" in group.column_names:  # else its images have bytes alone
        path = pc.struct_field(group["image"], "path").cast(pa.string())
    return pa.table({"path": path, "label": group["label"].cast(pa.int64())})


def _check_schema(uri: str, schema: pa.Schema) -> None:
    image: Any = schema.field("image").type if "image" in schema.names else None
    fields = {field.name for field in image} if image and pa.types.is_struct(image) else set()
    if "bytes" not in fields:
        raise UserError(
            f"{uri}: column image is {image or 'not there'}, expected a struct of bytes and path; "
            "take the files of a data set whose images are embedded"
        )
    label = schema.field("label").type if "label" in schema.names else None
    if label is None or not pa.types.is_integer(label):
        raise UserError(f"{uri}: column label is {label or 'not there'}, expected an integer")


def _told_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """Of the ClassLabel feature, which Hugging Face keeps in the schema; () when there is none."""
    try:
        document = json.loads(metadata.get(b"huggingface", b"{}"))
        names = document["info"]["features"]["label"]["names"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _tells_wnids(rows: pa.Table) -> bool:
    name = pc.replace_substring_regex(rows["path"], r"^.*/", "").combine_chunks()
    found = pc.coalesce(_told(name, _WNID_LAST), _told(name, _WNID_FIRST))
    return bool(len(rows) > found.null_count)


def _named(uri: str, split: str, rows: pa.Table, names: Sequence[str]) -> pa.Array:
    """The name of each label, "" of an unlabelled test image. Raises UserError for any other."""
    label = pc.fill_null(rows["label"], UNLABELLED).combine_chunks()
    least = UNLABELLED if split == "test" else 0
    wrong = pc.or_(pc.less(label, least), pc.greater_equal(label, len(names)))
    if pc.any(wrong).as_py():
        row = pc.index(wrong, True).as_py()
        raise UserError(
            f"{uri}: row {row:,} has label {label[row].as_py()} ({pc.sum(wrong).as_py():,} such "
            f"rows); expected {least} to {len(names) - 1}, the numbers of its class names"
        )
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"{uri}: two classes have one name, or one has none; rename them")
    return pa.array([*names, ""], pa.string()).take(
        pc.if_else(pc.less(label, 0), len(names), label)
    )


def _wnids(uri: str, split: str, rows: pa.Table, names: Sequence[str]) -> pa.Array:
    """The WNID that each path tells, "" for an unlabelled image.

    Raises UserError for a row without a path, for a path with two WNIDs, and for a label without
    a WNID or a WNID without a label.
    """
    name = pc.replace_substring_regex(rows["path"], r"^.*/", "").combine_chunks()
    label = pc.fill_null(rows["label"], UNLABELLED).combine_chunks()
    first, last = _told(name, _WNID_FIRST), _told(name, _WNID_LAST)
    wnid = pc.coalesce(last, first)
    unlabelled = pc.equal(label, UNLABELLED)
    wrongs = (
        (pc.is_null(name), "has no image.path, which tells the WNID"),
        (pc.fill_null(pc.not_equal(first, last), False), "has two WNIDs in its path"),
        (pc.less(label, UNLABELLED), "has an impossible label"),
        (pc.and_(unlabelled, pa.scalar(split != "test")), f"is in {split} without a label"),
        (pc.and_(unlabelled, pc.is_valid(wnid)), "has a WNID in its path, but no label"),
        (pc.and_(pc.invert(unlabelled), pc.is_null(wnid)), "has a label, but no WNID in its path"),
    )
    for wrong, reason in wrongs:
        if pc.any(wrong).as_py():
            row = pc.index(wrong, True).as_py()
            raise UserError(
                f"{uri}: row {row:,} ({name[row].as_py()}, label {label[row].as_py()}) {reason} "
                f"({pc.sum(wrong).as_py():,} such rows); expected NAME_WNID.JPEG and its rank"
                f"{'' if names else ', or names of the labels in a ClassLabel feature'}"
            )
    return pc.fill_null(wnid, "")


def _told(names: pa.Array, pattern: str) -> pa.Array:
    return pc.struct_field(pc.extract_regex(names, pattern), "wnid")


LAYOUT = Layout(
    name="Hugging Face parquet files",
    expected="train-*.parquet",
    lists=r"^(data/)?dataset_infos\.json$",
    recognises=_recognises,
    places=lambda found: {
        split: rf"^(data/)?({names})-\d{{5}}-of-.*\.parquet$"
        for split, names in zip(SPLITS, ("train", "val|validation", "test"), strict=True)
    },
    scan=_scan,
)
