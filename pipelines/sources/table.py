"""What every layout of RAW is turned into: one row per picture, with its place and its label.

Labels are the 0-based rank of the sorted WNIDs, as in torchvision, timm and Keras; never the ID
order of meta.mat. Everything is done by columns: ImageNet has 1.28 million rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError

SPLITS = ("train", "val", "test")
UNLABELLED = -1  # of a test picture whose class nobody has published; its WNID is ""

TABLE = pa.schema(
    [
        ("split", pa.string()),
        ("key", pa.string()),  # file name without extension; unique in its split
        ("name", pa.string()),
        ("label", pa.int64()),
        ("wnid", pa.string()),
        ("source", pa.string()),  # container, relative to RAW
        ("offset", pa.int64()),  # bytes; in a .parquet container the number of the row
        ("size", pa.int64()),  # bytes; null in a .parquet container
    ]
)
_MAX_KEY = 90  # characters: KEY.json must fit the 100 of a USTAR name
_GOOD_KEY = rf"^[\x21-\x2d\x30-\x7e]{{1,{_MAX_KEY}}}$"  # printable ASCII, no dot, slash or blank

Shuffle = Literal["classes", "global", "source"]


@dataclass(frozen=True)
class StoredAs:
    """How pictures that are shards already were made."""

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
    containers: tuple[tuple[str, int], ...]  # archives with their bytes
    announced: dict[str, int] | None  # pictures per split according to the devkit or lists
    notes: tuple[str, ...]  # what a person should know, one line each
    official: bool = False  # every archive has the size of the published one
    shuffle: Shuffle = "classes"  # what suits the layout's order
    stored: StoredAs | None = None
    # storage.version of every tar, from before the look into it
    archives: dict[str, str] = field(default_factory=dict)

    def count(self, split: str) -> int:
        return int(pc.sum(pc.equal(self.table["split"], split)).as_py() or 0)


def part(split: str, names: Any, wnids: Any, source: Any, offset: Any, size: Any) -> pa.Table:
    """Rows of one split from columns (arrays, lists, or one value for all but `names`).

    `names` are base names with extension; a picture without a label has the WNID "".
    """
    names = _column(names, pa.string(), 0)
    rows = len(names)
    return pa.table(
        {
            "split": _column(split, pa.string(), rows),
            "name": names,
            "wnid": _column(wnids, pa.string(), rows),
            "source": _column(source, pa.string(), rows),
            "offset": _column(offset, pa.int64(), rows),
            "size": _column(size, pa.int64(), rows),
        }
    )


def labelled(parts: Sequence[pa.Table], wnids: Sequence[str]) -> pa.Table:
    """The `part`s as one TABLE: with keys, and with the rank of each WNID as its label."""
    table = pa.concat_tables(parts).combine_chunks()
    label = pc.index_in(table["wnid"], value_set=pa.array(wnids, pa.string())).cast(pa.int64())
    columns = {
        **{name: table[name] for name in table.column_names},
        "key": pc.replace_substring_regex(table["name"], r"\.[^.]*$", ""),
        "label": pc.fill_null(label, UNLABELLED),
    }
    return pa.table([columns[name] for name in TABLE.names], schema=TABLE)


def check(raw: str, table: pa.Table) -> None:
    """Raises UserError unless every key is usable and unique in its split, every label known."""
    bad = table.filter(pc.invert(pc.match_substring_regex(table["key"], _GOOD_KEY)))
    if bad.num_rows:
        raise UserError(
            f"{raw}: {bad['key'][0].as_py()!r} cannot name a sample; rename that file to at most "
            f"{_MAX_KEY} ASCII characters without a blank, or a dot before the extension"
        )
    for split in SPLITS:
        keys = table.filter(pc.equal(table["split"], split))["key"].combine_chunks()
        keys = keys.take(pc.sort_indices(keys))
        twice = keys[1:].filter(pc.equal(keys[1:], keys[:-1]))
        if len(twice):
            name = twice[0].as_py()
            raise UserError(
                f"{raw}: {pc.sum(pc.equal(keys, name)).as_py()} {split} files are named {name} "
                f"({len(twice)} names too many in all); rename or remove them"
            )
    unlabelled = pc.and_(pc.equal(table["label"], UNLABELLED), pc.not_equal(table["split"], "test"))
    assert not pc.any(unlabelled).as_py(), "a train or val picture has no label"


def _column(value: Any, kind: pa.DataType, rows: int) -> pa.Array:
    if isinstance(value, str | int | None):
        return pa.repeat(pa.scalar(value, kind), rows)
    if isinstance(value, pa.ChunkedArray):
        value = value.combine_chunks()
    return value.cast(kind) if isinstance(value, pa.Array) else pa.array(value, kind)
