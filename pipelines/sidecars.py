"""OUT/_meta/SHARD.parquet: what a finished shard holds. Its rows of the index, and in the metadata
at its end its status: plan, samples, bytes, sha256, what was rejected and fixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import shards, storage

_TAIL = 1 << 15  # bytes: a status, and what parquet says of the columns before it
_STATUS, _STATUS_SHA256 = b"alexnet.status", b"alexnet.status_sha256"


def place(uri: str, shard: str) -> str:
    return storage.join(uri, "_meta", f"{shard}.parquet")


def pack(rows: pa.Table, status: dict[str, Any]) -> bytes:
    """A shard's index rows with its status (plan_id, samples, bytes, sha256, …) in the metadata."""
    text = shards.canonical_json(status)
    metadata = {_STATUS: text, _STATUS_SHA256: hashlib.sha256(text).hexdigest()}
    return shards.parquet_bytes(rows.replace_schema_metadata(metadata))


def unpack(data: bytes) -> tuple[pa.Table, dict[str, Any]]:
    """Rows and status. Raises ValueError for anything that `pack` did not write."""
    try:
        table = shards.read_parquet(data)
        status = _status_in(table.schema, table.num_rows)
        rows = table.replace_schema_metadata(None)
        shards.check_table(rows, shards.INDEX)
    except shards.DAMAGE as error:
        raise ValueError(f"no sidecar ({shards.said(error)})") from error
    return rows, status


def load_statuses(uri: str, lengths: dict[str, int]) -> Iterator[dict[str, Any] | None]:
    """Of each shard the status alone, from the end of its sidecar, which has so many bytes; None
    for one that is damaged there. Rows are counted, not looked at."""
    places = [place(uri, shard) for shard in lengths]
    tails = storage.read_each(places, [max(length - _TAIL, 0) for length in lengths.values()])
    for where, tail in zip(places, tails, strict=True):
        try:
            yield _status_at_end(where, tail)
        except ValueError:
            yield None


def _status_at_end(where: str, tail: bytes) -> dict[str, Any]:
    """Raises ValueError as `unpack`."""
    try:
        if int.from_bytes(tail[-8:-4], "little") > len(tail) - 8:  # many images were rejected
            tail = storage.read(where)
        about = pq.read_metadata(pa.BufferReader(tail))
        return _status_in(about.schema.to_arrow_schema(), about.num_rows)
    except shards.DAMAGE as error:
        raise ValueError(f"no sidecar ({shards.said(error)})") from error


def _status_in(schema: pa.Schema, rows: int) -> dict[str, Any]:
    metadata = schema.metadata or {}
    digest = metadata.get(_STATUS_SHA256)  # sidecars of old had none
    if digest not in (None, hashlib.sha256(metadata[_STATUS]).hexdigest().encode()):
        raise ValueError("its status has another sha256")
    status: dict[str, Any] = json.loads(metadata[_STATUS])
    shards.check_types(status, str, "shard", "split", "sha256", "md5", "dali_index_sha256")
    shards.check_types(status, dict, "pixels", "fixes", "versions")
    shards.check_counts(status["samples"], status["bytes"], *status["fixes"].values())
    if rows != status["samples"]:
        raise ValueError(f"{rows:,} rows for {status['samples']:,} samples")
    for entry in status["rejected"]:
        shards.check_types(entry, str, "key", "reason", "source_sha256")
    return status
