"""Pictures that a shard set holds more than once, inside a split and across splits.

ImageNet has them, some under two classes, and published results were measured with them: they are
told and never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.sources import UNLABELLED

_SAMPLES_SHOWN = 5  # of one group and split: a blank picture may occur thousands of times


@dataclass(frozen=True)
class Tally:
    groups: int  # different pictures
    samples: int  # that show one of them


@dataclass(frozen=True)
class Group:
    """One picture that several samples show."""

    sha256: str
    size: int  # samples
    across_splits: bool
    other_labels: bool
    samples: tuple[tuple[str, str, str], ...]  # (split, key, wnid) of the first ones


@dataclass(frozen=True)
class Repeats:
    """A group that has samples of two splits is counted as across splits, and nowhere else.

    Labels differ where two samples of a group have different ones; unlabelled ones differ from
    none.
    """

    within_same_label: Tally
    within_other_labels: Tally
    across_same_label: Tally
    across_other_labels: Tally
    examples: tuple[Group, ...]  # across splits before within, other labels before the same

    @property
    def groups(self) -> int:
        return sum(tally.groups for tally in self._tallies)

    @property
    def samples(self) -> int:
        return sum(tally.samples for tally in self._tallies)

    @property
    def _tallies(self) -> tuple[Tally, ...]:
        return (
            self.within_same_label,
            self.within_other_labels,
            self.across_same_label,
            self.across_other_labels,
        )


@dataclass(frozen=True)
class Duplicates:
    files: Repeats  # the same bytes in the raw data
    pictures: Repeats  # the same bytes in the shards; every repeated file is one of these, too

    def lines(self) -> list[str]:
        """One line for each kind there is, with the first example; [] when nothing repeats."""
        return [*_lines("raw file", self.files), *_lines("stored picture", self.pictures)]


def find(indexes: dict[str, pa.Table], examples: int = 5) -> Duplicates:
    """From tables of `shards.INDEX` by split; shows at most `examples` groups of each kind.

    By columns: 1.28 million samples take seconds and a few hundred megabytes.
    """
    return Duplicates(
        files=_repeats(indexes, "source_sha256", examples),
        pictures=_repeats(indexes, "sha256", examples),
    )


def _repeats(indexes: dict[str, pa.Table], column: str, examples: int) -> Repeats:
    groups = _groups(indexes, column)
    sizes = groups["sample_count"].to_numpy()
    across = groups["across"].to_numpy().astype(bool)
    other = groups["other"].to_numpy().astype(bool)

    def tally(chosen: np.ndarray[Any, Any]) -> Tally:
        return Tally(int(chosen.sum()), int(sizes[chosen].sum()))

    return Repeats(
        within_same_label=tally(~across & ~other),
        within_other_labels=tally(~across & other),
        across_same_label=tally(across & ~other),
        across_other_labels=tally(across & other),
        examples=_examples(indexes, column, groups, examples),
    )


def _groups(indexes: dict[str, pa.Table], column: str) -> pa.Table:
    """Columns digest, sample_count, across, other (0 or 1); only digests that occur twice."""
    parts = [
        pa.table(
            {
                "digest": index[column],
                "sample": pa.repeat(pa.scalar(number, pa.int8()), index.num_rows),
                "label": pc.if_else(pc.equal(index["label"], UNLABELLED), None, index["label"]),
            }
        )
        for number, index in enumerate(indexes.values())
    ]
    extremes = [(name, what) for name in ("sample", "label") for what in ("min", "max")]
    counted = (
        pa.concat_tables(parts)
        .group_by("digest", use_threads=False)
        .aggregate([*extremes, ("sample", "count")])
    )
    several = counted.filter(pc.greater(counted["sample_count"], 1)).combine_chunks()
    # Two different values in a group are told by its smallest and largest: no sets are needed.
    differ = {
        name: pc.fill_null(pc.not_equal(several[f"{of}_min"], several[f"{of}_max"]), False)
        for name, of in (("across", "sample"), ("other", "label"))
    }
    columns = {name: value.cast(pa.int8()) for name, value in differ.items()}
    return pa.table(
        {"digest": several["digest"], "sample_count": several["sample_count"], **columns}
    )


def _examples(
    indexes: dict[str, pa.Table], column: str, groups: pa.Table, examples: int
) -> tuple[Group, ...]:
    chosen = []
    for across, other in ((1, 1), (1, 0), (0, 1), (0, 0)):
        kind = pc.and_(pc.equal(groups["across"], across), pc.equal(groups["other"], other))
        chosen += groups.filter(kind).sort_by("digest").slice(0, examples).to_pylist()
    digests = [row["digest"] for row in chosen]
    shown: dict[str, list[tuple[str, str, str]]] = {digest: [] for digest in digests}
    for split, index in indexes.items():
        rows = index.select(["key", "wnid", column])
        rows = rows.filter(pc.is_in(rows[column], value_set=pa.array(digests, pa.string())))
        for digest in digests:
            same = rows.filter(pc.equal(rows[column], digest)).slice(0, _SAMPLES_SHOWN)
            shown[digest] += [(split, row["key"], row["wnid"]) for row in same.to_pylist()]
    return tuple(
        Group(
            sha256=row["digest"],
            size=row["sample_count"],
            across_splits=bool(row["across"]),
            other_labels=bool(row["other"]),
            samples=tuple(shown[row["digest"]]),
        )
        for row in chosen
    )


def _lines(what: str, repeats: Repeats) -> list[str]:
    kinds = [
        (repeats.across_other_labels, True, True, "across splits, with different labels"),
        (repeats.across_same_label, True, False, "across splits, with the same label"),
        (repeats.within_other_labels, False, True, "within a split, with different labels"),
        (repeats.within_same_label, False, False, "within a split, with the same label"),
    ]
    return [
        f"{tally.groups:,} {what}{'s' * (tally.groups > 1)} more than once {where} "
        f"({tally.samples:,} samples){_first(repeats.examples, across, other)}"
        for tally, across, other, where in kinds
        if tally.groups
    ]


def _first(examples: Sequence[Group], across: bool, other: bool) -> str:
    for group in examples:
        if (group.across_splits, group.other_labels) == (across, other):
            return ", such as " + " and ".join(
                f"{split} {key} ({wnid or 'unlabelled'})"
                for split, key, wnid in (group.samples[0], group.samples[-1])
            )
    return ""
