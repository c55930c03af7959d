"""The shard format: its names, how a tar is packed, what the manifest and the index say.

    OUT/train-000000.tar          members KEY.cls KEY.jpg KEY.json; `webdataset` reads it as it is
    OUT/index/train.parquet       one row per sample (`INDEX`), in (shard, position) order
    OUT/manifest.json             written last: where it is, the set is complete
    OUT/SHA256SUMS                for `sha256sum -c`, of everything above and below but _meta/
    OUT/shardindex-train.json     the same shards for `wids`, derived
    OUT/train-000000.idx          where the members of that tar lie, for NVIDIA DALI, derived
    OUT/quarantine/train.jsonl    the rejected images, their raw bytes in quarantine/train/KEY.bin
    OUT/_meta/plan.json, plan.parquet    the plan, and one row per planned picture
    OUT/_meta/SHARD.parquet       the sidecar of each finished shard
    OUT/_meta/raw.json            where RAW was, for repairs; no part of the set's identity
    OUT/_meta/progress/           one journal for each time that somebody built

Needs no ray, and no part of the builder: training reads shards through this module alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alexnet.errors import UserError
from pipelines import storage
from pipelines.damage import DAMAGE, check_manifest, check_sha256, check_table, said

FORMAT = "alexnet-shards"
FORMAT_VERSION = 1

INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int64()),
        ("wnid", pa.string()),
        ("shard", pa.string()),  # file name without .tar
        ("offset", pa.int64()),  # of the JPEG's first byte inside the tar
        ("size", pa.int64()),  # of the JPEG, bytes
        ("sha256", pa.string()),  # of the JPEG
        ("source", pa.string()),  # container, relative to RAW
        ("source_offset", pa.int64()),
        ("source_size", pa.int64()),
        ("source_sha256", pa.string()),
        ("width", pa.int64()),  # of the raw picture, pixels
        ("height", pa.int64()),
        ("fixes", pa.list_(pa.string())),
    ]
)
STATUS, STATUS_SHA256 = b"alexnet.status", b"alexnet.status_sha256"


@dataclass(frozen=True)
class ShardInfo:
    name: str  # "train-000000", without .tar
    split: str
    samples: int
    num_bytes: int
    sha256: str


Triple = tuple[float, float, float]


@dataclass(frozen=True)
class PixelStats:
    """RGB over every stored pixel, units 0..255; the covariance is the population's."""

    count: int
    mean: Triple
    covariance: tuple[Triple, Triple, Triple]

    @classmethod
    def from_sums(cls, count: int, sums: list[int], products: list[list[int]]) -> PixelStats:
        """From integers Σx (3) and Σxxᵀ (3, 3): exact until the one division per number."""
        if count == 0:
            return cls.from_json({"count": 0, "mean": [0.0] * 3, "covariance": [[0.0] * 3] * 3})
        covariance = [
            [(count * products[i][j] - sums[i] * sums[j]) / count**2 for j in range(3)]
            for i in range(3)
        ]
        mean = [total / count for total in sums]
        return cls.from_json({"count": count, "mean": mean, "covariance": covariance})

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> PixelStats:
        first, second, third = (_triple(row) for row in document["covariance"])
        return cls(document["count"], _triple(document["mean"]), (first, second, third))


def _triple(values: list[float]) -> Triple:
    first, second, third = values
    return first, second, third


@dataclass(frozen=True)
class Manifest:
    plan_id: str
    resize: int
    crop: int
    quality: int
    seed: int
    wnids: tuple[str, ...]  # label k is wnids[k]; sorted
    class_names: tuple[str, ...]
    pixels: PixelStats
    shards: tuple[ShardInfo, ...]
    partial: bool
    document: dict[str, Any]  # manifest.json as it was read
    digest: str  # sha256 of manifest.json: the identity of the data set

    @property
    def num_classes(self) -> int:
        return len(self.wnids)

    def split_shards(self, split: str) -> tuple[ShardInfo, ...]:
        """In number order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def num_samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.split_shards(split))


@dataclass(frozen=True)
class Sample:
    """One picture on its way into a shard."""

    key: str
    label: int
    wnid: str
    jpeg: bytes
    name: str  # of the raw file
    source: str
    source_offset: int
    source_size: int
    source_sha256: str
    width: int
    height: int
    fixes: tuple[str, ...]


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}"


def load_manifest(uri: str) -> Manifest:
    """Raises UserError when no finished shard set of this format is there."""
    location = storage.join(uri, "manifest.json")
    if not storage.exists(location):
        raise UserError(
            f"{uri}: no finished shard set (no manifest.json); build one with "
            f"`python -m pipelines build --raw RAW --out {shlex.quote(uri)}`"
        )
    data = storage.read(location)
    try:
        document = json.loads(data)
        found = (document.get("format"), document.get("format_version"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{location} is not JSON ({error}); rebuild the shard set") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise UserError(
            f"{location} has format {found[0]!r:.40} version {found[1]!r:.40}; this reads "
            f"{FORMAT!r} version {FORMAT_VERSION}: rebuild the shards, or use the release that "
            "wrote them"
        )
    try:
        manifest = parse_manifest(document, hashlib.sha256(data).hexdigest())
        check_manifest(manifest)
    except DAMAGE as error:
        raise UserError(f"{location} is damaged ({said(error)}); rebuild the shard set") from error
    return manifest


def parse_manifest(document: dict[str, Any], digest: str) -> Manifest:
    return Manifest(
        plan_id=document["plan_id"],
        resize=document["geometry"]["resize"],
        crop=document["geometry"]["crop"],
        quality=document["codec"]["quality"],
        seed=document["seed"],
        wnids=tuple(document["classes"]["wnids"]),
        class_names=tuple(document["classes"]["names"]),
        pixels=PixelStats.from_json(document["pixels"]),
        shards=tuple(
            ShardInfo(row["name"], row["split"], row["samples"], row["bytes"], row["sha256"])
            for row in document["shards"]
        ),
        partial=document["partial"],
        document=document,
        digest=digest,
    )


def load_index(uri: str, split: str, columns: Sequence[str] = tuple(INDEX.names)) -> pa.Table:
    """All samples of a split, in rows of `INDEX` or of some of its columns; the row number is the
    sample id."""
    location = storage.join(uri, "index", f"{split}.parquet")
    if not storage.exists(location):
        raise UserError(f"{location}: not there; was this set built with --splits {split}?")
    try:
        wanted = pa.schema([INDEX.field(name) for name in columns])
        check_table(table := read_parquet(storage.read(location), columns), wanted)
    except DAMAGE as error:
        raise UserError(
            f"{location} is damaged ({said(error)}); run `python -m pipelines verify "
            f"{shlex.quote(uri)}`"
        ) from error
    return table


@dataclass(frozen=True)
class Packed:
    tar: bytes
    index: pa.Table  # its `INDEX` rows
    dali_index: bytes


def pack(name: str, samples: Iterable[Sample]) -> Packed:
    """The shard's files, with the samples in the order given.

    The bytes depend on the samples alone: USTAR, no clock, no user, canonical JSON.
    """
    from webdataset import TarWriter  # with it comes torch, which no reader of shards needs

    buffer = io.BytesIO()
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    with TarWriter(buffer, encoder=False, mtime=0, user="", group="") as writer:
        # By themselves names that are long or not ASCII take pax headers, on some hosts in latin-1.
        writer.tarstream.format, writer.tarstream.encoding = tarfile.USTAR_FORMAT, "utf-8"
        for sample in samples:
            row = {field: getattr(sample, field) for field in INDEX.names if hasattr(sample, field)}
            # Text, not a list: readers that guess types from the first samples (Hugging Face's)
            # take an empty list for one of nulls, and fail at the first image with a fix.
            text = {**row, "name": sample.name, "fixes": " ".join(sample.fixes)}
            members = {
                "cls": str(sample.label).encode(),
                "jpg": sample.jpeg,
                "json": canonical_json(text),
            }
            end = writer.tarstream.offset
            writer.write({"__key__": sample.key, **members})  # sorted by extension
            entries = []
            for suffix, data in members.items():
                start = end + tarfile.BLOCKSIZE  # behind its header
                end = start + -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                entries.append(f"{suffix} {start} {len(data)} {sample.key}.{suffix}")
                if suffix == "jpg":
                    row |= {"shard": name, "offset": start, "size": len(data)}
            assert end == writer.tarstream.offset, f"{sample.key}: not one header for each member"
            lines.append(" ".join(entries))
            sha256 = hashlib.sha256(sample.jpeg).hexdigest()
            rows.append({**row, "fixes": list(sample.fixes), "sha256": sha256})
    # "v1.2", then per sample: extension, offset of the data, bytes, name (DALI's wds2idx.py)
    dali = "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"
    return Packed(buffer.getvalue(), pa.Table.from_pylist(rows, schema=INDEX), dali.encode())


def canonical_json(value: Any, indent: int | None = None) -> bytes:
    """The one spelling of a JSON value, so that equal values have equal hashes."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(
        value, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False
    )
    # A name that is no text: as JSON writes it, and the same again when it is read.
    return text.encode(errors="backslashreplace") + b"\n"


def sidecar_uri(uri: str, shard: str) -> str:
    return storage.join(uri, "_meta", f"{shard}.parquet")


def pack_sidecar(rows: pa.Table, status: dict[str, Any]) -> bytes:
    """A shard's index rows with its status (plan_id, samples, bytes, sha256, …) in the metadata."""
    text = canonical_json(status)
    metadata = {STATUS: text, STATUS_SHA256: hashlib.sha256(text).hexdigest()}
    return parquet_bytes(rows.replace_schema_metadata(metadata))


def unpack_sidecar(data: bytes) -> tuple[pa.Table, dict[str, Any]]:
    """Rows and status. Raises ValueError when the bytes are not a sidecar."""
    try:
        table = read_parquet(data)
        metadata = table.schema.metadata or {}
        check_sha256(metadata[STATUS], metadata.get(STATUS_SHA256))
        status = json.loads(metadata[STATUS])
        rows = table.replace_schema_metadata(None)
        check_table(rows, INDEX)
    except DAMAGE as error:
        raise ValueError(f"no sidecar ({said(error)})") from error
    return rows, status


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True, **options)
    return buffer.getvalue()


def read_json(uri: str) -> Any:
    """Raises UserError when it is missing or no JSON."""
    try:
        return json.loads(storage.read(uri))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{uri} is not JSON ({error}); delete the folder and build again"
        ) from error


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """A parquet file, or some columns of it, read without Arrow's threads: with them a short-lived
    process sometimes aborts at its end (apache/arrow#34314)."""
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=True)
    return file.read(None if columns is None else list(columns), use_threads=False)
