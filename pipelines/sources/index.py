"""The members of raw archives, found once.

ImageNet has 1.28 million headers, so what was found stays under $ALEXNET_HOME/index for as long as
the archive is the same: equal size and modification time, or ETag on S3. Everything is held by
columns: a kept index is loaded in a second.

The first time takes about a minute for ImageNet on a local disk. On S3 most of the archive is read
through, in pieces of 4 MiB: some 50 thousand requests, not 1.28 million.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import shards, storage
from pipelines.sources import tars

logger = logging.getLogger(__name__)

_S3_THREADS = 16
_METER_SECONDS = 5
_FORM = "members-2"  # change it when the columns below or their meaning change
_SCHEMA = pa.schema(
    [("outer", pa.string()), *tars.MEMBERS]  # outer: base name of the inner tar; else empty
)
# What desktop systems leave in archives and folders: never an image.
_LITTER = r"(^|/)(\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini|__MACOSX(/.*)?)$"


def flat(uri: str) -> pa.Table:
    """The files of a tar, in its order: outer "", name with its folders, offset, size.

    Raises UserError as `tars.members` does.
    """
    return once(uri, "flat", _SCHEMA, _read_flat)


def nested(uri: str) -> pa.Table:
    """The files of each tar inside a tar: outer (base name of the inner tar), name, offset in the
    outer tar, size. Litter beside the inner tars has the outer "".

    Raises UserError as `tars.members` does, for a member that is no .tar, and for an inner tar
    that holds no image or is there twice.
    """
    return once(uri, "nested", _SCHEMA, _read_nested)


def litter(names: Any) -> Any:
    """bool array: which names (string array, with folders) desktop systems left behind."""
    return pc.match_substring_regex(names, _LITTER)


def base_names(names: Any) -> Any:
    return pc.replace_substring_regex(names, r"^.*/", "")


def without_litter(
    name: str, found: pa.Table, notes: list[str], ignored: dict[str, int]
) -> pa.Table:
    """The members of archive `name` but those that desktop systems left, which are counted in
    `ignored` and told in `notes`."""
    found = found.combine_chunks()
    is_litter = litter(found["name"])
    left = found.filter(is_litter)
    if left.num_rows:
        ignored[name] = ignored.get(name, 0) + left.num_rows
        notes.append(
            f"{name}: ignored {left.num_rows:,} files that desktop systems leave behind, "
            f"first {left['name'][0].as_py()}"
        )
        found = found.filter(pc.invert(is_litter))
    return found


def first_but(values: pa.Array, good: pa.Array) -> str | None:
    """The first value that is not good."""
    bad = values.filter(pc.invert(good))
    return str(bad[0].as_py()) if len(bad) else None


def _read_flat(uri: str) -> pa.Table:
    with Meter(f"indexing {uri}", storage.size(uri)) as meter:
        return _with_outer("", tars.members(uri, uri, passed=meter.add))


def _read_nested(uri: str) -> pa.Table:
    found = tars.members(uri, uri)
    left = litter(found["name"])
    outer = found.filter(pc.invert(left)).to_pylist()
    names = [member["name"].rsplit("/", 1)[-1] for member in outer]
    if strange := [name for name in names if not name.endswith(".tar")]:
        raise UserError(f"{uri} holds {strange[0]}; expected only nXXXXXXXX.tar, one a class")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{uri} holds {twice} twice; fetch it again")

    def read(passed: tars.Passed, name: str, member: dict[str, int]) -> pa.Table:
        label = f"{uri}: {name}"
        inner = tars.members(uri, label, member["offset"], member["size"], passed)
        if pc.all(litter(inner["name"])).as_py():
            raise UserError(f"{label} holds no image; fetch {uri} again")
        return _with_outer(name, inner)

    parts = read_each(uri, sum(member["size"] for member in outer), read, names, outer)
    return pa.concat_tables([_with_outer("", found.filter(left)), *parts]).combine_chunks()


def read_each(
    uri: str, num_bytes: int, read: Callable[..., pa.Table], *of_each: Iterable[Any]
) -> list[pa.Table]:
    """`read` of each tar in `uri`, which are of `num_bytes` together: their headers don't depend
    on each other, and S3 answers many at once. Its first argument takes what it got past."""
    threads = _S3_THREADS if storage.is_s3(uri) else 1
    with Meter(f"indexing {uri}", num_bytes) as meter, ThreadPoolExecutor(threads) as pool:
        try:
            return list(pool.map(partial(read, meter.add), *of_each))
        finally:
            pool.shutdown(cancel_futures=True)  # the first damage ends it, not the last


def _with_outer(outer: str, members: pa.Table) -> pa.Table:
    return pa.table([pa.repeat(outer, len(members)), *members.columns], schema=_SCHEMA)


def once(uri: str, kind: str, schema: pa.Schema, read: Callable[[str], pa.Table]) -> pa.Table:
    """`read(uri)`, a table of `schema` without nulls, kept for as long as the archive is the
    same. Another reading of an archive, or other columns, need another `kind`."""
    identity = repr((_FORM, kind, uri, storage.size(uri), storage.version(uri)))
    name = f"{hashlib.sha256(identity.encode()).hexdigest()}.parquet"
    kept = storage.join(str(storage.home()), "index", name)
    if storage.exists(kept):
        try:
            return _kept(storage.read(kept), schema)
        except (pa.ArrowException, OSError, ValueError) as error:
            logger.warning(f"{kept} is damaged ({error}); reading {uri} again")
    found = read(uri)
    try:
        storage.sweep(storage.join(str(storage.home()), "index"))
        storage.write(kept, shards.parquet_bytes(found))
    except UserError as error:  # a read-only home costs time, not the build
        logger.warning(f"the index of {uri} is not kept: {error}")
    return found


def _kept(data: bytes, schema: pa.Schema) -> pa.Table:
    """Raises ValueError for what `once` has not written."""
    table = shards.read_parquet(data)
    if not table.schema.equals(schema) or any(column.null_count for column in table.columns):
        raise ValueError(f"columns {table.schema.names}")
    table.validate(full=True)
    return table


class Meter:
    """Says every few seconds how far a long reading is. Any thread may `add`."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._what, self._total = what, total_bytes
        self._lock = threading.Lock()
        self._members = self._bytes = 0

    def __enter__(self) -> Meter:
        self._started = self._said = time.monotonic()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None and self._said > self._started:
            self._say(time.monotonic())

    def add(self, members: int, num_bytes: int) -> None:
        with self._lock:
            self._members += members
            self._bytes += num_bytes
            if (now := time.monotonic()) - self._said >= _METER_SECONDS:
                self._say(now)

    def _say(self, now: float) -> None:
        self._said, seconds = now, max(now - self._started, 1e-9)
        share = min(self._bytes / max(self._total, 1), 1.0)
        rate = f"{self._bytes / seconds / 1e6:,.0f} MB/s"
        if self._members:
            rate = f"{self._members:,} members, {self._members / seconds:,.0f}/s"
        eta = f"ETA {seconds / share - seconds:,.0f} s" if share else "ETA ?"
        line = f"{self._what}: {rate}, {share:.0%} of {self._total / 1e9:,.1f} GB, {eta}"
        print(line, file=sys.stderr, flush=True)  # stdout may be JSON for a program
