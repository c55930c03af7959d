"""What tells the files of a shard set from bytes that nobody wrote like this."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    from pipelines.shards import Manifest

# What JSON, Arrow and Python raise for them.
DAMAGE: tuple[type[Exception], ...] = (
    *(pa.ArrowException, ArithmeticError, AttributeError, LookupError, MemoryError, OSError),
    *(RecursionError, TypeError, ValueError),
)
_SHARD = re.compile(r"(train|val|test)-[0-9]{6,}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def said(error: Exception) -> str:
    """At most 200 characters for the line that tells of it."""
    return f"{type(error).__name__}: {error}"[:200]


def check_manifest(manifest: Manifest) -> None:
    """Raises TypeError, AttributeError or ValueError for values that no build writes."""
    for shard in manifest.shards:
        check_shard_name(shard.name, shard.split)
        check_counts(shard.samples, shard.num_bytes)
        if not _SHA256.fullmatch(shard.sha256):
            raise ValueError(f"{shard.sha256!r} is no sha256")
    check_counts(manifest.resize, manifest.crop, manifest.quality, manifest.seed)
    check_counts(manifest.pixels.count, *manifest.document.get("rejected", {}).values())
    if not 1 <= manifest.crop <= manifest.resize:
        raise ValueError(f"crop {manifest.crop} of {manifest.resize}")
    if not all(isinstance(name, str) for name in (*manifest.wnids, *manifest.class_names)):
        raise TypeError("a class has no text as its name")
    if not isinstance(manifest.plan_id, str):
        raise TypeError("plan_id is no text")
    if not len(manifest.wnids) == len(set(manifest.wnids)) == len(manifest.class_names):
        raise ValueError(f"{len(manifest.wnids)} classes, {len(manifest.class_names)} names")


def check_shard_name(name: Any, split: Any) -> None:
    """Raises ValueError for anything but SPLIT-000000: it becomes the name of a file, so that a
    path in it would lead out of the set."""
    if not _SHARD.fullmatch(str(name)) or str(name).rpartition("-")[0] != split:
        raise ValueError(f"{name!r} is no shard of {split!r}")


def check_counts(*counts: Any) -> None:
    """Raises ValueError for anything but whole numbers from 0 up."""
    if bad := [count for count in counts if type(count) is not int or count < 0]:
        raise ValueError(f"{bad[0]!r} where a number is expected")


def check_sha256(data: bytes, digest: bytes | None) -> None:
    """Raises ValueError where `digest`, in hex, is another; sidecars of old had none."""
    if digest is not None and hashlib.sha256(data).hexdigest().encode() != digest:
        raise ValueError("its status has another sha256")


def check_table(table: pa.Table, schema: pa.Schema) -> None:
    """Raises TypeError or ValueError for other columns, and for a row without a value."""
    if not table.schema.equals(schema):
        raise TypeError(f"its columns are {table.schema.names}")
    table.validate(full=True)  # Arrow looks at neither text nor offsets while it reads
    if nulls := [name for name in schema.names if table[name].null_count]:
        raise ValueError(f"no value in some rows of {', '.join(nulls)}")
