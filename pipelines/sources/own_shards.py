"""A finished shard set of this program as the source of another: other shards or another size."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alexnet.errors import UserError
from pipelines import entries, shards, storage, tars
from pipelines.sources.table import SPLITS, Source, StoredAs, fewer, labelled, part

_COLUMNS = ["key", "label", "wnid", "shard", "offset", "size"]
_SHARD = re.compile(r"(train|val|test)-\d{6}\.tar")


LISTS = (
    r"^(manifest\.json|SHA256SUMS|_info\.json|shardindex-\w+\.json|\w+-\d+\.idx"
    r"|(index|quarantine|report|_meta)/.*)$"
)


def recognises(found: entries.Listing) -> bool:
    """Also a set that is not finished, which `scan` refuses with a better reason."""
    known = {"manifest.json", "_meta/plan.json"} & found.files.keys()
    return bool(known) and any(_SHARD.fullmatch(name) for name in found.files)


def places(found: entries.Listing) -> dict[str, str]:
    return {split: rf"^{split}-\d{{6}}\.tar$" for split in SPLITS}


def scan(raw: str, listing: entries.Listing, splits: Sequence[str], partial: bool) -> Source:
    files = listing.files
    manifest = shards.load_manifest(raw)
    if absent := [split for split in splits if not manifest.split_shards(split)]:
        raise UserError(
            f"{raw}: --splits {','.join(splits)} needs {absent[0]} shards, not there; build them "
            f"there{fewer(splits, absent)}"
        )
    containers = tuple(
        (f"{shard.name}.tar", shard.num_bytes)
        for split in splits
        for shard in manifest.split_shards(split)
    )
    for name, num_bytes in containers:
        if files.get(name) != num_bytes:
            found = f"{files[name]:,} bytes" if name in files else "not there"
            raise UserError(
                f"{raw}/{name} is {found}, its manifest says {num_bytes:,} bytes; run "
                f"`python -m pipelines verify {shlex.quote(raw)} --repair`"
            )
    document = manifest.document
    rejected = sum(document.get("rejected", {}).values())
    told = f"{rejected:,} pictures were rejected when these shards were made and are not in them"
    return Source(
        raw=raw,
        layout="shards",
        table=labelled([_part(raw, manifest, split) for split in splits], manifest.wnids),
        wnids=manifest.wnids,
        class_names=manifest.class_names,
        labels_from={split: _origin(manifest, split) for split in splits},
        containers=containers,
        announced={split: manifest.num_samples(split) for split in splits},
        notes=(told,) if rejected else (),
        shuffle="source",
        stored=StoredAs(manifest.resize, manifest.crop, manifest.quality, manifest.digest),
    )


def _part(raw: str, manifest: shards.Manifest, split: str) -> pa.Table:
    """Raises UserError when the index contradicts the manifest."""
    uri = storage.join(raw, "index", f"{split}.parquet")
    index = _read_columns(uri)
    wnid = index["wnid"].combine_chunks()
    expected = pc.fill_null(pc.index_in(wnid, value_set=pa.array(manifest.wnids)), -1)
    counts = {row["values"]: row["counts"] for row in pc.value_counts(index["shard"]).to_pylist()}
    wrong = pc.not_equal(index["label"].combine_chunks(), expected.cast(pa.int64()))
    if pc.any(wrong).as_py() or counts != {
        shard.name: shard.samples for shard in manifest.split_shards(split) if shard.samples
    }:
        raise UserError(
            f"{uri} contradicts manifest.json; run `python -m pipelines verify {shlex.quote(raw)}`"
        )
    names = pc.binary_join_element_wise(index["key"], "jpg", ".")
    source = pc.binary_join_element_wise(index["shard"], "tar", ".")
    return part(split, names, wnid, source, index["offset"], index["size"])


def _read_columns(uri: str) -> pa.Table:
    """Those needed here: with all, 1.28 million rows take half a gigabyte."""
    try:
        with pq.ParquetFile(tars.RangeFile(uri, 0, storage.size(uri)), pre_buffer=False) as file:
            return file.read(_COLUMNS, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"{uri} is damaged ({line}); run `python -m pipelines verify "
            f"{shlex.quote(uri.rsplit('/', 2)[0])}`"
        ) from error


def _origin(manifest: shards.Manifest, split: str) -> str:
    """Keeps what the first build wrote, so that a label can be traced to its first source."""
    before = manifest.document.get("labels_from", {}).get(split, "not recorded")
    return f"shard set {manifest.digest[:12]}, there: {before}"
