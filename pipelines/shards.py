"""The shard format: its names, how a shard is packed, and how each file is read back and checked.

    OUT/train-000000.tar          members KEY.cls KEY.jpg KEY.json; `webdataset` reads it as it is
    OUT/index/train.parquet       one row per sample (`INDEX`), in (shard, position) order; what is
                                  beyond INDEX_ROWS follows in index/train-1.parquet and so on
    OUT/manifest.json             written last: where it is, the set is complete
    OUT/SHA256SUMS                for `sha256sum -c`, of everything above and below but _meta/
    OUT/shardindex-train.json     the same shards for `wids`, derived
    OUT/_info.json, README.md     the same for timm; a card for people and the Hugging Face Hub
    OUT/train-000000.idx          where the members of that tar lie, for NVIDIA DALI, derived
    OUT/quarantine/train.jsonl    the rejected images, their raw bytes in quarantine/train/KEY.bin
    OUT/_meta/plan.json, plan.parquet    the plan, and one row per planned image; those of more than
                                  256 shards go on in plan-1.parquet and so on
    OUT/_meta/SHARD.parquet       the sidecar of each finished shard
    OUT/_meta/raw.json            where RAW was, for repairs; no part of the set's identity

Needs no ray, and no part of the builder: training reads shards through this module alone. Bytes may
have rotted, been truncated or been exchanged: whatever is read is checked, and raises `Damaged`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shlex
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alexnet.errors import UserError
from pipelines import storage

FORMAT = "alexnet-shards"
FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")

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
        ("width", pa.int64()),  # of the raw image, pixels
        ("height", pa.int64()),
        ("fixes", pa.list_(pa.string())),
    ]
)
INDEX_ROWS = 1 << 23  # most of one file: about 1.5 GB, of the 5 GiB that one upload may have
_FILES = b"alexnet.files"  # in the first of several: how many there are
_RANGE_WORTH = 1 << 18  # bytes that are read on the way rather than asked for around
# What JSON, Arrow and Python raise for bytes that nobody wrote like this.
DAMAGE: tuple[type[Exception], ...] = (
    *(pa.ArrowException, ArithmeticError, AttributeError, LookupError, MemoryError, OSError),
    *(RecursionError, TypeError, ValueError),
)


class Damaged(UserError):
    """A file of a set that is missing or says nothing that can be used; its name is relative to the
    set. The defaults are for pickle, which restores the attributes afterwards."""

    def __init__(self, message: str, file: str = "", text: str = "") -> None:
        super().__init__(message)
        self.file, self.text = file, text


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

    @property
    def splits(self) -> list[str]:
        """Those that the set was built with, train first."""
        return [split for split in SPLITS if split in self.document["totals"]]

    def split_shards(self, split: str) -> tuple[ShardInfo, ...]:
        """In number order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def num_samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.split_shards(split))


@dataclass(frozen=True)
class Sample:
    """One image on its way into a shard."""

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


def index_name(split: str, number: int = 0) -> str:
    return f"index/{split}{f'-{number}' if number else ''}.parquet"


def quarantine_name(split: str) -> str:
    return f"quarantine/{split}.jsonl"


def rejected_name(split: str, key: str) -> str:
    """The raw bytes of a rejected image."""
    return f"quarantine/{split}/{key}.bin"


def load_manifest(uri: str) -> Manifest:
    """Raises UserError where no set of this format was finished, Damaged for one that cannot be
    read."""
    location = storage.join(uri, "manifest.json")
    if not storage.exists(location):
        raise UserError(
            f"{uri}: no finished shard set (no manifest.json); build one with "
            f"`python -m pipelines build --raw RAW --out {shlex.quote(uri)}`"
        )
    return parse_manifest(uri, storage.read(location))


def parse_manifest(uri: str, data: bytes) -> Manifest:
    """Raises as `load_manifest`."""
    with _reading(uri, "manifest.json"):
        document = json.loads(data)
        found = (document.get("format"), document.get("format_version"))
        if found != (FORMAT, FORMAT_VERSION):
            raise UserError(
                f"{uri}/manifest.json has format {found[0]!r:.40} version {found[1]!r:.40}; this "
                f"reads {FORMAT!r} version {FORMAT_VERSION}: rebuild the shards, or use the "
                "release that wrote them"
            )
        manifest = Manifest(
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
            digest=hashlib.sha256(data).hexdigest(),
        )
        _check_manifest(manifest)
        return manifest


def load_index(uri: str, split: str, columns: Sequence[str] = tuple(INDEX.names)) -> pa.Table:
    """All samples of a split, in rows of `INDEX` or of some of its columns, of which alone the
    bytes are read; the row number is the sample id."""
    location = storage.join(uri, index_name(split))
    if not storage.exists(location):
        raise UserError(
            f"{location} is missing; was this set built with --splits {split}? Then run "
            f"`{_verify(uri)}`"
        )
    parts: list[pa.Table] = []
    count = 1
    while len(parts) < count:
        name = index_name(split, len(parts))
        if parts and not storage.exists(storage.join(uri, name)):
            raise _damaged(uri, name, "missing")
        with _reading(uri, name), storage.open_ranges(storage.join(uri, name)) as file:
            part = _columns_of(file, columns)
            count = max(count, files_of(part.schema))
            parts.append(_index_part(part, columns))
    return pa.concat_tables(parts)


def parse_index(uri: str, name: str, data: bytes) -> tuple[pa.Table, int]:
    """Rows of one file of an index, and of how many it is the first; 1 for the others."""
    with _reading(uri, name):
        table = read_parquet(data)
        return _index_part(table, INDEX.names), files_of(table.schema)


def files_of(schema: pa.Schema) -> int:
    """Of how many files this is the first, as `in_files` has noted."""
    return int((schema.metadata or {}).get(_FILES, b"1"))


def in_files(schema: pa.Schema, count: int) -> pa.Schema:
    """For the first of several files, which have to be read one after the other."""
    return (
        schema.with_metadata({**(schema.metadata or {}), _FILES: str(count)})
        if count > 1
        else schema
    )


def _index_part(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    table = table.replace_schema_metadata(None)
    check_table(table, pa.schema([INDEX.field(name) for name in columns]))
    return table


def _columns_of(file: Any, columns: Sequence[str]) -> pa.Table:
    """Read by ranges, or whole where these would be many and short."""
    with pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as parquet:
        about = parquet.metadata
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        chunks = [group.column(at) for group in groups for at in range(about.num_columns)]
        wanted = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
        ranges = sum(chunk.total_compressed_size + _RANGE_WORTH for chunk in wanted)
        if ranges < sum(chunk.total_compressed_size for chunk in chunks):
            return parquet.read(list(columns), use_threads=False)
        file.seek(0)
        return read_parquet(file.read(), columns)


def load_quarantine(uri: str, split: str) -> list[dict[str, Any]]:
    """What is known of each rejected image of the split, in the order of their keys."""
    file = quarantine_name(split)
    if not storage.exists(storage.join(uri, file)):
        raise _damaged(uri, file, "missing")
    return parse_quarantine(uri, split, storage.read(storage.join(uri, file)))


def parse_quarantine(uri: str, split: str, data: bytes) -> list[dict[str, Any]]:
    with _reading(uri, quarantine_name(split)):
        entries = [json.loads(line) for line in data.splitlines()]
        for entry in entries:
            check_types(entry, str, "key", "reason", "source", "source_sha256")
            check_types(entry, int, "source_offset", "source_size")
        return entries


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


def check_shard_name(name: Any, split: Any) -> None:
    """Raises ValueError for anything but SPLIT-000000: it becomes the name of a file, so that a
    path in it would lead out of the set."""
    if split not in SPLITS or not re.fullmatch(rf"{split}-[0-9]{{6,}}", str(name)):
        raise ValueError(f"{name!r} is no shard of {split!r}")


def check_counts(*counts: Any) -> None:
    """Raises ValueError for anything but whole numbers from 0 up."""
    if bad := [count for count in counts if type(count) is not int or count < 0]:
        raise ValueError(f"{bad[0]!r} where a number is expected")


def _check_manifest(manifest: Manifest) -> None:
    """Raises TypeError, AttributeError or ValueError for values that no build writes."""
    document = manifest.document
    check_types(document, str, "plan_id")
    check_types(document, dict, "totals", "rejected", "fixes", "source")
    check_types(document["source"], str, "layout")
    if strangers := set(document["totals"]) - set(SPLITS):
        raise ValueError(f"{strangers} is no split")
    for shard in manifest.shards:
        check_shard_name(shard.name, shard.split)
        check_counts(shard.samples, shard.num_bytes)
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise ValueError(f"{shard.sha256!r} is no sha256")
    check_counts(manifest.resize, manifest.crop, manifest.quality, manifest.seed)
    check_counts(manifest.pixels.count, *document["rejected"].values())
    if not 1 <= manifest.crop <= manifest.resize:
        raise ValueError(f"crop {manifest.crop} of {manifest.resize}")
    if not all(isinstance(name, str) for name in (*manifest.wnids, *manifest.class_names)):
        raise TypeError("a class has no text as its name")
    if not len(manifest.wnids) == len(set(manifest.wnids)) == len(manifest.class_names):
        raise ValueError(f"{len(manifest.wnids)} classes, {len(manifest.class_names)} names")


def check_table(table: pa.Table, schema: pa.Schema) -> None:
    """Raises TypeError or ValueError for other columns, and for a row without a value."""
    if not table.schema.equals(schema):
        raise TypeError(f"its columns are {table.schema.names}")
    table.validate(full=True)  # Arrow looks at neither text nor offsets while it reads
    lists = [name for name in schema.names if pa.types.is_list(schema.field(name).type)]
    nulls = [name for name in schema.names if table[name].null_count]
    nulls += [name for name in lists if pc.list_flatten(table[name]).null_count]
    if nulls:
        raise ValueError(f"no value in some rows of {', '.join(nulls)}")


def check_types(document: Any, kind: type, *names: str) -> None:
    if not isinstance(document, dict):
        raise TypeError(f"{document!r} where fields were expected")
    for name in names:
        if not isinstance(document[name], kind):
            raise TypeError(f"{name} is {document[name]!r}")


@contextlib.contextmanager
def _reading(uri: str, file: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise _damaged(uri, file, f"damaged ({said(error)})") from error


def _damaged(uri: str, file: str, text: str) -> Damaged:
    return Damaged(f"{storage.join(uri, file)} is {text}; run `{_verify(uri)}`", file, text)


def _verify(uri: str) -> str:
    return f"python -m pipelines verify {shlex.quote(uri)}"


def said(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:160]


def one_line(text: str) -> str:
    """Damaged names can hold anything, and terminals obey control characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
