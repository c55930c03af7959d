"""What every layout of RAW is turned into: one row per image, with its place and its label.

Labels are the 0-based rank of the sorted WNIDs, as in torchvision, timm and Keras; never the ID
order of meta.mat. Everything is done by columns: ImageNet has 1.28 million rows.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import entries, shards, storage

SPLITS = shards.SPLITS
NO_LABELS = "none: the images are unlabelled"  # where the labels of a split are from
UNLABELLED = -1  # of a test image whose class nobody has published; its WNID is ""

TABLE = pa.schema(
    [
        ("split", pa.string()),
        ("key", pa.string()),  # unique in its split; see `labelled` and `with_own_keys`
        ("name", pa.string()),
        ("label", pa.int64()),
        ("wnid", pa.string()),
        ("source", pa.string()),  # container, relative to RAW
        ("offset", pa.int64()),  # bytes; in a .parquet container the number of the row
        ("size", pa.int64()),  # bytes; null in a .parquet container
    ]
)
PARQUET = ".parquet"  # ending of a container whose rows are images
_MAX_KEY = 90  # characters: KEY.json must fit the 100 of a USTAR name
_GOOD_KEY = rf"^[\x21-\x2d\x30-\x7e]{{1,{_MAX_KEY}}}$"  # printable ASCII, no dot, slash or blank

_SHOWN = 5

# Below this share of neighbours with different labels, images are sorted by class.
_FEWEST_CHANGES = 0.1
# Images of a stretch, and by how much more than chance its labels may differ from all. With 2,
# batches of thousands from a window of a few shards are still nearly as mixed as a full shuffle's.
_STRETCH, _UNEVEN = 1000, 2.0

Shuffle = Literal["classes", "global", "source"]


@dataclass(frozen=True)
class StoredAs:
    """How images that are shards already were made."""

    resize: int
    crop: int
    quality: int
    digest: str  # of their manifest


@dataclass(frozen=True)
class Source:
    raw: str
    layout: str
    table: pa.Table  # of schema TABLE
    wnids: tuple[str, ...]  # sorted; the position is the label
    class_names: tuple[str, ...]
    labels_from: dict[str, str]  # per split, in words
    containers: tuple[tuple[str, int], ...] = ()  # archives with their bytes
    announced: dict[str, int] | None = None  # images per split according to the devkit or lists
    notes: tuple[str, ...] = ()  # what a person should know, one line each
    official: bool = False  # every archive has the size of the published one
    shuffle: Shuffle = "classes"  # what suits the layout's order
    stored: StoredAs | None = None
    # storage.version of every tar, from before the look into it
    archives: dict[str, str] = field(default_factory=dict)
    accounts: entries.Accounts = field(default_factory=entries.Accounts)  # of every entry of RAW
    left_out: dict[str, str] = field(default_factory=dict)  # entries, by --partial: name → why
    ignored_members: dict[str, int] = field(default_factory=dict)  # of each archive
    other_splits: tuple[str, ...] = ()  # that RAW holds and nobody asked for

    def count(self, split: str) -> int:
        return int(pc.sum(pc.equal(self.table["split"], split)).as_py() or 0)


@dataclass(frozen=True)
class Layout:
    """One form of RAW, as `sources.scan` uses it."""

    name: str
    expected: str  # what RAW would hold, for a person
    lists: str  # regex of what is read beside images and archives
    recognises: Callable[[entries.Listing], bool]
    places: Callable[[entries.Listing], dict[str, str]]  # regex of the entries of each split
    scan: Callable[[str, entries.Listing, Sequence[str], bool], Source]


def part(split: str, names: Any, wnids: Any, source: Any, offset: Any, size: Any) -> pa.Table:
    """Rows of one split from columns (arrays, lists, or one value for all but `names`).

    `names` are base names with extension; an image without a label has the WNID "".
    """
    given = {"split": split, "name": names, "wnid": wnids}
    given |= {"source": source, "offset": offset, "size": size}
    columns = {k: _column(value, TABLE.field(k).type, len(names)) for k, value in given.items()}
    return pa.table(columns)


def labelled(parts: Sequence[pa.Table], wnids: Sequence[str]) -> pa.Table:
    """The `part`s as one TABLE: with the rank of each WNID as its label, and with keys where they
    have none: file names without extension."""
    table = pa.concat_tables(parts).combine_chunks()
    label = pc.index_in(table["wnid"], value_set=pa.array(wnids, pa.string())).cast(pa.int64())
    columns = {
        "key": pc.replace_substring_regex(table["name"], r"\.[^.]*$", ""),
        **{name: table[name] for name in table.column_names},
        "label": pc.fill_null(label, UNLABELLED),
    }
    return pa.table([columns[name] for name in TABLE.names], schema=TABLE)


def order_that_mixes(table: pa.Table) -> Shuffle:
    """How a source whose images are in the order of `table` is spread over shards so that each has
    every class: as it is where its train images are mixed, which gives the longest reads.

    Not mixed are those of which nearly all neighbours are of one class, and those whose stretches
    hold other shares of the classes than chance would give them.
    """
    train = table.filter(pc.equal(table["split"], "train"))["label"].to_numpy()
    labels, ranks, counts = np.unique(train, return_inverse=True, return_counts=True)
    if len(labels) < 2:
        return "source"
    if np.mean(train[1:] != train[:-1]) < _FEWEST_CHANGES:
        return "classes"
    stretches = len(train) // _STRETCH
    degrees = (stretches - 1) * (len(labels) - 1)
    if degrees < 1:
        return "source"
    number = np.arange(len(train)) * stretches // len(train)
    cells = np.bincount(number * len(labels) + ranks, minlength=stretches * len(labels))
    expected = np.outer(np.bincount(number), counts / len(train))
    chi2 = float(((cells.reshape(expected.shape) - expected) ** 2 / expected).sum())
    # Of mixed images it is 1 ± √(2 / degrees): few stretches may differ by chance.
    uneven = chi2 / degrees > max(_UNEVEN, 1 + 5 * (2 / degrees) ** 0.5)
    return "classes" if uneven else "source"


def ranked(
    raw: str, classes: pa.Table, names: Sequence[str], partial: bool
) -> tuple[list[int], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The labels that images have, in order; the WNID and the name of each; notes.

    classes: columns label, wnid, place (of an image that has both). names: of the classes by their
    labels, [] if nothing tells. Raises UserError unless labels and WNIDs belong to each other one
    to one and in one order, and, unless `partial`, unless the labels are the ranks of the WNIDs.
    """
    rows = reversed(classes.to_pylist())  # the first place of each pair stays
    places = {(row["label"], row["wnid"]): row["place"] for row in rows}
    pairs = sorted(places)
    for one, other in pairwise(pairs):
        if not (one[0] < other[0] and one[1] < other[1]):
            told = [f"{places[pair]} has {pair[1]} with label {pair[0]}" for pair in (one, other)]
            raise UserError(
                f"{raw}: {told[0]}, {told[1]}; labels must be ranks of sorted WNIDs: fetch both "
                "files again"
            )
    labels, wnids = [label for label, _ in pairs], tuple(wnid for _, wnid in pairs)
    named = bool(labels) and len(names) > max(labels)
    class_names = tuple(names[label] for label in labels) if named else wnids
    if labels == list(range(len(labels))) and len(names) in (0, len(labels)):
        return labels, wnids, class_names, ()
    if labels and not partial:
        raise UserError(
            f"{raw}: {len(wnids)} classes have images, but the labels go to {max(labels)} and "
            f"{len(names) or 'no'} classes are named; add what is missing or pass --partial"
        )
    note = f"labels are ranks among the {len(wnids)} classes with images, not those of the files"
    return labels, wnids, class_names, () if labels == list(range(len(labels))) else (note,)


def image_names(paths: pa.Array, source: str, rows: pa.Array) -> pa.Array:
    """Names of the raw files from `image.path` in a parquet file, which repeats the WNID in
    Hugging Face's: n01440764_10026_n01440764.JPEG, ILSVRC2012_val_00000293_n01440764.JPEG. Where
    it is null, the name is that of the parquet file with the number of the row."""
    names = pc.replace_substring_regex(paths, r"^.*/", "")
    names = pc.replace_substring_regex(names, r"_n\d{8}(\.[^.]*)$", r"\1")
    stem = source.rpartition("/")[2].removesuffix(PARQUET)
    numbered = pc.binary_join_element_wise(stem, rows.cast(pa.string()), "-")
    return pc.if_else(pc.equal(pc.fill_null(names, ""), ""), numbered, names)


def with_own_keys(table: pa.Table) -> pa.Table:
    """A TABLE of people's own images: the key is the file's name without extension, as ImageNet's
    are, where that can serve and no other file of the split has it; else letters and digits of
    folder and name, and a hash of the place. So a key depends on nothing but its file, and on
    whether another has its name."""
    usable = pc.match_substring_regex(table["key"], _GOOD_KEY)
    whole = pc.binary_join_element_wise(table["split"], table["key"], "/")
    codes = np.asarray(whole.combine_chunks().dictionary_encode().indices)
    alone = np.bincount(codes)[codes] == 1 if len(codes) else np.zeros(0, np.bool_)
    bad = np.flatnonzero(~(np.asarray(usable) & alone))
    made = [_own_key(**row) for row in table.select(_PLACE).take(pa.array(bad)).to_pylist()]
    keys = np.asarray(table["key"].combine_chunks(), dtype=object)
    keys[bad] = made
    return table.set_column(TABLE.names.index("key"), "key", pa.array(keys, pa.string()))


_PLACE = ["name", "source", "offset"]


def _own_key(name: str, source: str, offset: int) -> str:
    folder = source.rpartition("/")[0].rpartition("/")[2]
    words = unicodedata.normalize("NFKD", f"{folder} {name.rpartition('.')[0] or name}")
    words = re.sub(r"[^A-Za-z0-9]+", "_", words.encode("ascii", "ignore").decode()).strip("_")
    place = hashlib.sha256(f"{source}#{offset}".encode()).hexdigest()
    return f"{words[:60]}-{place[:16]}".lstrip("-")


def fewer(splits: Sequence[str], absent: Sequence[str]) -> str:
    """The way to build without the absent splits, if one is left, and what it is good for."""
    left = [split for split in splits if split not in absent]
    why = "" if {"train", "val"} <= {*left} else " (but a training needs train and val)"
    return f", or pass --splits {','.join(left)}{why}" if left else ""


def read_text(uri: str) -> str:
    """A list as people keep it: UTF-8, or UTF-16 with its mark, as Excel writes both."""
    data = storage.read(uri)
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf16 else "utf-8-sig", "replace")


def check(raw: str, table: pa.Table) -> None:
    """Raises UserError unless every key is usable and unique in its split, every label known."""
    bad = table["key"].filter(pc.invert(pc.match_substring_regex(table["key"], _GOOD_KEY)))
    if len(bad):
        shown = ", ".join(repr(key) for key in bad[:_SHOWN].to_pylist())
        raise UserError(
            f"{raw}: {len(bad):,} names cannot name a sample ({shown}{', …' * (len(bad) > _SHOWN)})"
            f"; rename those files to at most {_MAX_KEY} ASCII characters without a blank, or a "
            "dot before the extension"
        )
    for split in SPLITS:
        keys = table.filter(pc.equal(table["split"], split))["key"].combine_chunks()
        keys = keys.take(pc.sort_indices(keys))
        twice = keys[1:].filter(pc.equal(keys[1:], keys[:-1]))
        if len(twice):
            names = pc.unique(twice)
            shown = ", ".join(names[:_SHOWN].to_pylist()) + ", …" * (len(names) > _SHOWN)
            raise UserError(
                f"{raw}: {len(names):,} names are those of several {split} files ({shown}; "
                f"{len(twice):,} files too many in all); rename or remove them"
            )
    unlabelled = pc.and_(pc.equal(table["label"], UNLABELLED), pc.not_equal(table["split"], "test"))
    assert not pc.any(unlabelled).as_py(), "a train or val image has no label"


def _column(value: Any, kind: pa.DataType, rows: int) -> pa.Array:
    if isinstance(value, str | int | None):
        return pa.repeat(pa.scalar(value, kind), rows)
    if isinstance(value, pa.ChunkedArray):
        value = value.combine_chunks()
    return value.cast(kind) if isinstance(value, pa.Array) else pa.array(value, kind)


# A val split of one's own, fewer classes, fewer images: views of a source that was scanned whole


def hold_out(source: Source, share: float) -> Source:
    """Makes this share of each class's train images the val split, at least one and not all: those
    whose place in RAW has the lowest hashes. So the same images are val whenever it is asked, and
    more images of a class move few of them.

    Raises UserError for a source with a val split of its own, and for a class of one image.
    """
    if "val" in source.other_splits:
        raise UserError(f"{source.raw} has a val split of its own; leave --val-share away")
    train = np.flatnonzero(pc.equal(source.table["split"], "train"))
    rows = source.table.take(pa.array(train))
    places = zip(rows["source"].to_pylist(), rows["offset"].to_pylist(), strict=True)
    hashes = [hashlib.sha256(f"{name}#{at}".encode()).digest()[:8] for name, at in places]
    labels = rows["label"].to_numpy()
    order = np.lexsort((np.frombuffer(b"".join(hashes), ">u8"), labels))
    _, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    if 1 in count:
        alone = rows["wnid"][order[first[np.flatnonzero(count == 1)[0]]].item()].as_py()
        raise UserError(
            f"{source.raw}: class {alone} has one train image, which cannot be both train and val "
            f"({np.sum(count == 1):,} such classes); add images or remove the class"
        )
    rank = np.arange(len(order)) - np.repeat(first, count)
    held = np.clip(np.rint(count * share), 1, count - 1)
    split = np.asarray(source.table["split"], dtype=object)
    split[train[order[rank < np.repeat(held, count)]]] = "val"
    table = source.table.set_column(0, "split", pa.array(split, pa.string()))
    told = f"val: {np.sum(held):,.0f} of {len(train):,} train images, held out by --val-share"
    return replace(
        source,
        table=table,
        labels_from=source.labels_from | {"val": source.labels_from["train"]},
        announced=None,  # of the train images as they were
        notes=(*source.notes, f"{told} {share:g}"),
    )


def select(source: Source, wnids: Sequence[str], per_class: int | None) -> Source:
    """Only these classes (all when empty), at most `per_class` images of each in each split.

    Labels become ranks among the classes kept. Of a class the first images in the source's
    order stay. Nobody can tell which unlabelled test images belong to the classes: they stay,
    at most per_class times the number of classes. Raises UserError for a class that the source
    lacks, and when a split loses all its images.
    """
    if not wnids and per_class is None:
        return source
    if unknown := sorted(set(wnids) - set(source.wnids)):
        raise UserError(
            f"--subset: {unknown[0]} is none of the {len(source.wnids)} classes of {source.raw} "
            f"({len(unknown)} unknown in all); remove it"
        )
    kept = tuple(sorted(set(wnids))) or source.wnids
    known = pc.is_in(source.table["wnid"], value_set=pa.array(kept, pa.string()))
    chosen = pc.or_(known, pc.equal(source.table["label"], UNLABELLED))
    table = source.table.filter(chosen)
    if per_class is not None:
        table = _first(table, per_class, len(kept))
    for split in SPLITS:
        if source.count(split) and not pc.any(pc.equal(table["split"], split)).as_py():
            raise UserError(
                f"--subset: no {split} image is left of {source.count(split):,}; "
                "choose other classes or fewer --splits"
            )
    names = dict(zip(source.wnids, source.class_names, strict=True))
    accounts = source.accounts
    if accounts.images:  # files of their own
        out = source.table.num_rows - table.num_rows
        ignored = accounts.ignored | ({"not_chosen": out} if out else {})
        accounts = replace(accounts, images=accounts.images - out, ignored=ignored)
    return replace(
        source,
        table=labelled([table.drop_columns(["label"])], kept),
        wnids=kept,
        class_names=tuple(names[wnid] for wnid in kept),
        announced=None,  # of the whole set
        notes=(*source.notes, _left_out(source, table, kept)),
        accounts=accounts,
    )


def parse_subset(text: str) -> tuple[str, ...]:
    """WNIDs from a comma list, or from a text file with one at the start of each line.

    What follows a WNID in its line is ignored, so LOC_synset_mapping.txt is such a file. Raises
    UserError when there is none or when the file is not there.
    """
    if "/" in text or text.endswith(".txt"):
        lines = read_text(storage.absolute(text)).splitlines()
        words = [line.split()[0] for line in lines if line.strip()]
    else:
        words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"--subset {text!r} names no class; give WNIDs with commas, or a file")
    return tuple(sorted(set(words)))


def _first(table: pa.Table, per_class: int, classes: int) -> pa.Table:
    """The rows that stay, in the order of the table."""
    keys = [(name, "ascending") for name in ("split", "label", "source", "offset")]
    order = pc.sort_indices(table, sort_keys=keys).to_numpy()
    label = np.asarray(table["label"])[order]
    split = np.asarray(pc.index_in(table["split"], value_set=pa.array(SPLITS)))[order]
    new: Any = np.ones(len(order), np.bool_)
    new[1:] = (label[1:] != label[:-1]) | (split[1:] != split[:-1])
    starts = np.flatnonzero(new)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    limit = np.where(label == UNLABELLED, per_class * classes, per_class)
    return table.take(pa.array(np.sort(order[rank < limit])))


def _left_out(source: Source, table: pa.Table, kept: Sequence[str]) -> str:
    return (
        f"subset: {len(kept):,} of {len(source.wnids):,} classes, "
        f"{table.num_rows:,} of {source.table.num_rows:,} images; the rest is left out"
    )
