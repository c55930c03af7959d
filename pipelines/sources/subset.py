"""Fewer classes, or fewer pictures of each: a view of a source that was scanned whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import storage
from pipelines.sources.table import SPLITS, UNLABELLED, Source, labelled, read_text


def select(source: Source, wnids: Sequence[str], per_class: int | None) -> Source:
    """Only these classes (all when empty), at most `per_class` pictures of each in each split.

    Labels become ranks among the classes kept. Of a class the first pictures in the source's
    order stay. Nobody can tell which unlabelled test pictures belong to the classes: they stay,
    at most per_class times the number of classes. Raises UserError for a class that the source
    lacks, and when a split loses all its pictures.
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
                f"--subset: no {split} picture is left of {source.count(split):,}; "
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


def parse(text: str) -> tuple[str, ...]:
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
        f"{table.num_rows:,} of {source.table.num_rows:,} pictures; the rest is left out"
    )
