"""Has every picture one fate, and the class that it was given? The books, without a look at pixels.

Everything is done by columns: ImageNet has 1.28 million rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.shards import Manifest
from pipelines.sources import SPLITS, UNLABELLED, Source
from pipelines.verify import recount
from pipelines.verify.contents import Problem, index_name, quarantine_name, rows_of, selection

Rejected = Mapping[str, Collection[str]]  # keys of the rejected pictures by split


def check_index(manifest: Manifest, split: str, index: pa.Table) -> Iterator[str]:
    """What contradicts the manifest, or itself, in a table of schema INDEX."""
    counts = {row["values"]: row["counts"] for row in pc.value_counts(index["shard"]).to_pylist()}
    for shard in manifest.split_shards(split):
        if (rows := counts.pop(shard.name, 0)) != shard.samples:
            yield f"other number of rows for {shard.name}, {rows}, than its {shard.samples} samples"
    if counts:
        yield f"rows of shards that the manifest lacks: {', '.join(sorted(counts))}"
    if not _ordered(index):
        yield "rows are not in the order of shard and position"
    if pc.count_distinct(index["key"]).as_py() != index.num_rows:
        yield "a key appears twice"
    ranks = {wnid: label for label, wnid in enumerate(manifest.wnids)}
    if split == "test":
        ranks[""] = UNLABELLED
    pairs = index.group_by(["wnid", "label"], use_threads=False).aggregate([])
    for row in pairs.sort_by([("wnid", "ascending"), ("label", "ascending")]).to_pylist():
        if ranks.get(row["wnid"]) != row["label"]:
            said = ranks.get(row["wnid"], "nothing of it")
            yield f"{row['wnid']!r} has label {row['label']}, the manifest says {said}"


def _ordered(index: pa.Table) -> bool:
    shard, offset = (index[name].combine_chunks() for name in ("shard", "offset"))
    same = pc.equal(shard[1:], shard[:-1])
    later = pc.greater(offset[1:], offset[:-1])
    rising = pc.or_(pc.greater(shard[1:], shard[:-1]), pc.and_(same, later))
    return bool(pc.all(rising, min_count=0).as_py())


def against_plan(
    planned: pa.Table, indexes: dict[str, pa.Table], rejected: Rejected
) -> Iterator[Problem]:
    """`planned` is `contents.planned`: it was there before the shards, made from RAW alone."""
    for split in indexes:
        truth = rows_of(planned, "split", split)
        yield from _accounts(split, indexes[split], rejected[split], truth)
        wrong = _relabelled(indexes[split], truth)
        for shard in pc.unique(wrong["shard"]).to_pylist():
            text = _told(rows_of(wrong, "shard", shard), "planned")
            yield Problem(f"{shard}.tar", text)


def _accounts(
    split: str, index: pa.Table, rejected: Collection[str], truth: pa.Table
) -> Iterator[Problem]:
    """In = out + quarantined."""
    stored, planned = (table["key"].combine_chunks() for table in (index, truth))
    refused = pa.array(list(rejected), pa.string())
    fates = pa.chunked_array([stored, refused]).combine_chunks()
    for keys, others, file, text in (
        (planned, fates, index_name(split), "planned, but neither stored nor in quarantine"),
        (stored, planned, index_name(split), "stored, but not planned"),
        (refused, planned, quarantine_name(split), "in quarantine, but not planned"),
    ):
        missing = keys.filter(pc.invert(pc.is_in(keys, value_set=others)))
        if len(missing):
            yield Problem(file, f"{_keys(missing)} {text}")
    both = refused.filter(pc.is_in(refused, value_set=stored))
    if len(both):
        yield Problem(quarantine_name(split), f"{_keys(both)} stored as well")


def _relabelled(index: pa.Table, truth: pa.Table) -> pa.Table:
    """Columns shard, key, here, there: rows of `index` whose key has another WNID in `truth`."""
    place = pc.index_in(index["key"], value_set=truth["key"].combine_chunks())
    table = pa.table(
        {
            "shard": index["shard"],
            "key": index["key"],
            "here": index["wnid"],
            "there": truth["wnid"].combine_chunks().take(place.combine_chunks()),
        }
    )
    return table.filter(pc.not_equal(table["here"], table["there"]))  # null, so no, if not there


def _told(wrong: pa.Table, where: str) -> str:
    """ "3 samples …, first KEY: n1 here, n2 planned"."""
    key, here, there = (wrong[name][0].as_py() or "unlabelled" for name in ("key", "here", "there"))
    plural = "s" * (wrong.num_rows > 1)
    return (
        f"{wrong.num_rows:,} sample{plural} with another class, first {key}: {here} here, "
        f"{there} {where}"
    )


def against_raw(
    raw: str,
    out: str,
    indexes: dict[str, pa.Table],
    rejected: Rejected,
    left_out: Collection[str],
) -> Iterator[Problem]:
    """Looks into RAW again, and counts it by other code. left_out: names that the manifest tells.
    Raises UserError when RAW cannot be read."""
    whole, fresh = _scan(raw, out, [split for split in SPLITS if split in indexes])
    for split, text in recount.unaccounted(whole, list(indexes), left_out):
        yield Problem(index_name(split), f"{text} in {raw}")
    for split, index in indexes.items():
        truth = rows_of(fresh, "split", split)
        stored, present = (table["key"].combine_chunks() for table in (index, truth))
        refused = pa.array(list(rejected[split]), pa.string())
        fates = pa.chunked_array([stored, refused]).combine_chunks()
        gone = fates.filter(pc.invert(pc.is_in(fates, value_set=present)))
        new = present.filter(pc.invert(pc.is_in(present, value_set=fates)))
        if len(gone):
            yield Problem(index_name(split), f"{_keys(gone)} not in {raw}")
        if len(new):
            yield Problem(index_name(split), f"{_keys(new)} in {raw} alone")
        wrong = _relabelled(index, truth)
        if wrong.num_rows:
            yield Problem(index_name(split), _told(wrong, f"in {raw}"))


def _scan(raw: str, out: str, splits: list[str]) -> tuple[Source, pa.Table]:
    """RAW, and the rows of it that the set was built from."""
    from pipelines import sources
    from pipelines.sources import subset

    wnids, per_class = selection(out)
    source = sources.scan(storage.absolute(raw), splits, partial=True)
    if wnids or per_class is not None:
        return source, subset.select(source, wnids, per_class).table
    return source, source.table


def _keys(keys: pa.Array) -> str:
    return f"{len(keys):,} picture{'s' * (len(keys) > 1)} (first {pc.min(keys).as_py()})"
