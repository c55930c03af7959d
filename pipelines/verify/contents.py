"""The files of a finished shard set, read with suspicion: each damage is one line and a file name.

`shards.py` reads sets that are whole; here bytes may have rotted, been cut, or been exchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alexnet.errors import UserError
from pipelines import shards, storage
from pipelines.damage import DAMAGE, check_manifest
from pipelines.sources import SPLITS, TABLE

SUMS = "SHA256SUMS"
MANIFEST = "manifest.json"
PLAN = "_meta/plan.json"
PLANNED = "_meta/plan.parquet"
_SUM = re.compile(r"([0-9a-f]{64})  ([\x21-\x7e]+)")


class Damaged(UserError):
    """One file of the set is missing or says nothing that can be used."""

    def __init__(self, out: str, file: str, text: str) -> None:
        location = storage.join(out, file)
        super().__init__(f"{location}: {text}; run `python -m pipelines verify {shlex.quote(out)}`")
        self.file, self.text = file, text


@dataclass(frozen=True)
class Problem:
    file: str  # relative to OUT
    text: str  # one line


@dataclass(frozen=True)
class Sidecar:
    rows: pa.Table  # of schema shards.INDEX
    samples: int
    num_bytes: int
    sha256: str
    md5: str
    dali_index_sha256: str
    rejected: tuple[str, ...]  # keys


def manifest(out: str) -> shards.Manifest:
    """Raises UserError when no set is finished there, Damaged when its manifest cannot be read."""
    if not storage.exists(storage.join(out, MANIFEST)):
        return shards.load_manifest(out)  # raises, and says how to get a set
    with _damage(out, MANIFEST):
        data = storage.read(storage.join(out, MANIFEST))
        document = json.loads(data)
        if (document["format"], document["format_version"]) != (
            shards.FORMAT,
            shards.FORMAT_VERSION,
        ):
            return shards.load_manifest(out)  # raises, and says which release to take
        found = shards.parse_manifest(document, hashlib.sha256(data).hexdigest())
        check_manifest(found)
        _check_type(found.document, {"plan_id": str, "totals": dict, "rejected": dict})
        _check_type(found.document, {"fixes": dict, "source": dict})
        _check_type(found.document["source"], {"layout": str})
        if strangers := set(found.document["totals"]) - set(SPLITS):
            raise ValueError(f"{strangers} is no split")
        return found


def splits(manifest: shards.Manifest) -> list[str]:
    """Those that the set was built with, train first."""
    return [split for split in SPLITS if split in manifest.document["totals"]]


def sums(data: bytes) -> tuple[dict[str, str], list[str]]:
    """(name → sha256, what is wrong with other lines) from the bytes of SHA256SUMS."""
    found: dict[str, str] = {}
    wrong = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        match = _SUM.fullmatch(line)
        if match is None:
            wrong.append(f"line {number} is no sha256 and file name")
        elif match[2] in found:
            wrong.append(f"line {number} names {match[2]} again")
        else:
            found[match[2]] = match[1]
    return found, wrong


def index_name(split: str) -> str:
    return f"index/{split}.parquet"


def index(out: str, split: str) -> pa.Table:
    """`shards.load_index`, checked. Raises Damaged."""
    return parse_index(out, split, _read(out, index_name(split)))


def parse_index(out: str, split: str, data: bytes) -> pa.Table:
    """Rows of schema shards.INDEX. Raises Damaged."""
    with _damage(out, index_name(split)):
        return _check_rows(shards.read_parquet(data))


def parse_sidecar(out: str, shard: str, data: bytes) -> Sidecar:
    """Raises Damaged."""
    with _damage(out, f"_meta/{shard}.parquet"):
        rows, status = shards.unpack_sidecar(data)
        _check_type(status, {"samples": int, "bytes": int, "rejected": list})
        _check_type(status, {"sha256": str, "md5": str, "dali_index_sha256": str})
        return Sidecar(
            rows=_check_rows(rows),
            samples=status["samples"],
            num_bytes=status["bytes"],
            sha256=status["sha256"],
            md5=status["md5"],
            dali_index_sha256=status["dali_index_sha256"],
            rejected=tuple(str(entry["key"]) for entry in status["rejected"]),
        )


def quarantine_name(split: str) -> str:
    return f"quarantine/{split}.jsonl"


def quarantine(out: str, split: str) -> list[dict[str, Any]]:
    """What is known of each rejected picture of the split. Raises Damaged."""
    return parse_quarantine(out, split, _read(out, quarantine_name(split)))


def parse_quarantine(out: str, split: str, data: bytes) -> list[dict[str, Any]]:
    """One dict per rejected picture, its "key" a string. Raises Damaged."""
    with _damage(out, quarantine_name(split)):
        entries = [json.loads(line) for line in data.splitlines()]
        for entry in entries:
            _check_type(entry, {"key": str, "reason": str, "source": str})
            _check_type(entry, {"source_offset": int, "source_size": int, "source_sha256": str})
        return entries


def wids_name(split: str) -> str:
    return f"shardindex-{split}.json"


def parse_wids(out: str, split: str, data: bytes) -> list[dict[str, Any]]:
    """The entry of each shard. Raises Damaged."""
    with _damage(out, wids_name(split)):
        document = json.loads(data)
        _check_type(document, {"shardlist": list})
        return list(document["shardlist"])


def planned_samples(out: str) -> dict[str, int]:
    """How many pictures were planned for each shard. Raises Damaged."""
    data = _read(out, PLAN)
    with _damage(out, PLAN):
        rows = json.loads(data)["shards"]
        for row in rows:
            _check_type(row, {"name": str, "samples": int})
        return {row["name"]: row["samples"] for row in rows}


def selection(out: str) -> tuple[tuple[str, ...], int | None]:
    """WNIDs (none for all) and cap per class that the set was built with. Raises Damaged."""
    data = _read(out, PLAN)
    with _damage(out, PLAN):
        recipe = json.loads(data)["identity"]["recipe"]
        per_class = recipe.get("per_class")
        return tuple(recipe.get("subset", ())), None if per_class is None else int(per_class)


def planned(out: str) -> pa.Table:
    """The columns split, key, name, label, wnid and source of every planned picture. Raises
    Damaged."""
    columns = ["split", "key", "name", "label", "wnid", "source"]
    data = _read(out, PLANNED)
    with _damage(out, PLANNED):
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        table = file.read(columns, use_threads=False).select(columns)
        return _check_values(table, pa.schema([TABLE.field(name) for name in columns]))


def one_line(text: str) -> str:
    """Damaged names can hold anything, and terminals obey control characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def rows_of(table: pa.Table, column: str, value: str) -> pa.Table:
    return table.filter(pc.equal(table[column], value))


def by_shard(table: pa.Table) -> dict[str, pa.Table]:
    """Rows of each shard in their order: one look at the table, where rows_of takes one for each
    shard."""
    shard = table["shard"].combine_chunks().dictionary_encode()
    numbers = shard.indices.to_numpy()
    order = np.argsort(numbers, kind="stable")
    if (np.diff(numbers) < 0).any():
        table = table.take(order)
    cuts = np.searchsorted(numbers[order], np.arange(len(shard.dictionary) + 1)).tolist()
    return {
        name: table.slice(start, end - start)
        for name, (start, end) in zip(
            shard.dictionary.to_pylist(), itertools.pairwise(cuts), strict=True
        )
    }


def _read(out: str, name: str) -> bytes:
    if not storage.exists(storage.join(out, name)):
        raise Damaged(out, name, "missing")
    return storage.read(storage.join(out, name))


def _check_rows(table: pa.Table) -> pa.Table:
    table = _check_values(table, shards.INDEX)
    if pc.list_flatten(table["fixes"]).null_count:
        raise ValueError("no value in some rows of fixes")
    return table


def _check_values(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Arrow looks at neither text nor offsets while it reads; a damaged page can hold anything."""
    if not table.schema.equals(schema):
        raise TypeError(f"its columns are {table.schema.names}, not {schema.names}")
    table.validate(full=True)
    if nulls := [name for name in schema.names if table[name].null_count]:
        raise ValueError(f"no value in some rows of {', '.join(nulls)}")
    return table


def _check_type(document: Any, fields: dict[str, type]) -> None:
    if not isinstance(document, dict):
        raise TypeError(f"{document!r} where fields were expected")
    for name, kind in fields.items():
        if not isinstance(document[name], kind):
            raise TypeError(f"{name} is {document[name]!r}")


@contextlib.contextmanager
def _damage(out: str, file: str) -> Iterator[None]:
    """What JSON, Arrow and Python say about bytes that nobody wrote like this, in one line."""
    try:
        yield
    except DAMAGE as error:
        said = one_line(f"{type(error).__name__}: {error}")[:160]
        raise Damaged(out, file, f"damaged ({said})") from error
