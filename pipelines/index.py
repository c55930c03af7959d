"""The members of raw archives, found once.

ImageNet has 1.28 million headers, each a small read (on S3 a request), so the result stays under
$ALEXNET_HOME/index for as long as the archive is the same: equal size and modification time, or
ETag on S3.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from alexnet.errors import UserError
from pipelines import shards, storage, tars

logger = logging.getLogger(__name__)

_S3_THREADS = 16
_SCHEMA = pa.schema(
    [
        ("outer", pa.string()),  # name of the inner tar; empty for a member of the archive itself
        ("name", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)

Members = dict[str, list[tars.Member]]


def flat(uri: str) -> list[tars.Member]:
    """The files of a tar, in its order. Raises UserError as `tars.members` does."""
    return _once(uri, "flat", lambda: {"": tars.members(uri, uri)}).get("", [])


def nested(uri: str) -> Members:
    """The files of each tar inside a tar, with offsets in the outer one, by the inner tar's name.

    Raises UserError as `tars.members` does, and for an inner tar that is empty or there twice.
    """
    return _once(uri, "nested", lambda: _read_nested(uri))


def _read_nested(uri: str) -> Members:
    outer = tars.members(uri, uri)
    counts = Counter(member.name for member in outer)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{uri} holds {twice[0]} twice; fetch it again")

    if strange := [name for name in counts if not name.endswith(".tar")]:
        raise UserError(f"{uri} holds {strange[0]}; expected only nXXXXXXXX.tar, one a class")

    def read(member: tars.Member) -> list[tars.Member]:
        label = f"{uri}: {member.name}"
        inner = tars.members(uri, label, within=member)
        if not inner:
            raise UserError(f"{label} holds no picture; fetch {uri} again")
        return inner

    # Headers of different inner tars don't depend on each other; S3 answers many at once.
    with ThreadPoolExecutor(_S3_THREADS if storage.is_s3(uri) else 1) as pool:
        return dict(zip((member.name for member in outer), pool.map(read, outer), strict=True))


def _once(uri: str, kind: str, read: Callable[[], Members]) -> Members:
    identity = repr((kind, uri, storage.size(uri), storage.version(uri)))
    name = f"{hashlib.sha256(identity.encode()).hexdigest()}.parquet"
    kept = storage.join(str(storage.home()), "index", name)
    if storage.exists(kept):
        return _from_table(shards.read_parquet(storage.read(kept)))
    found = read()
    try:
        storage.write(kept, shards.parquet_bytes(_to_table(found)))
    except UserError as error:  # a read-only home costs time, not the build
        logger.warning(f"the index of {uri} is not kept: {error}")
    return found


def _to_table(found: Members) -> pa.Table:
    rows = [(outer, member) for outer, members in found.items() for member in members]
    columns = [
        [outer for outer, _ in rows],
        [member.name for _, member in rows],
        [member.offset for _, member in rows],
        [member.size for _, member in rows],
    ]
    return pa.table(columns, schema=_SCHEMA)


def _from_table(table: pa.Table) -> Members:
    found: Members = {}
    for outer, *member in zip(
        *(table[name].to_pylist() for name in table.column_names), strict=True
    ):
        found.setdefault(outer, []).append(tars.Member(*member))
    return found
