"""Raw pictures of one shard, fetched by threads ahead of whoever decodes them.

Pictures that are neighbours in a container come with one range read. Pictures in a parquet file
come row group by row group, each streamed page by page up to its last wanted row.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alexnet.errors import UserError
from pipelines import storage, tars
from pipelines.ahead import Ahead, Room

PARQUET = ".parquet"
_MAX_GAP = 16 << 10  # bytes between two pictures that are cheaper to read than to skip
_MAX_READ = 8 << 20  # bytes per request, unless one picture is larger
_MAX_AHEAD = 64 << 20  # bytes that are being read or wait to be taken
_THREADS_S3, _THREADS_LOCAL = 16, 4
_PLACE_BITS = 42  # enough for a container of 4 TiB, and for two million containers

_Numbers = np.ndarray[Any, np.dtype[np.int64]]
_Flags = np.ndarray[Any, np.dtype[np.bool_]]
_Picture = tuple[int, bytes]


@dataclass(frozen=True)
class _RowGroup:
    footer: pq.FileMetaData
    file_bytes: int
    number: int
    first_row: int


@dataclass(frozen=True)
class _Fetch:
    """What one thread fetches at a time."""

    source: str
    positions: list[int]  # of its pictures, in the order of their offsets
    group: _RowGroup | None = None  # of a parquet file; else all come with one range read


class Reader:
    """Iterating gives (position in `rows`, bytes) of every picture, in the source's order.

    Raises UserError while iterating when a container can't be read or has changed. `with` ends
    the threads at once when the loop is left early; else they end with the iterator.
    """

    def __init__(self, raw: str, rows: Sequence[dict[str, Any]]) -> None:
        self.requests = 0
        self.read_bytes = 0  # with the gaps between pictures
        self._raw = raw
        self._rows = rows
        self._threads = _THREADS_S3 if storage.is_s3(raw) else _THREADS_LOCAL
        self._counting = threading.Lock()
        self._footer_seconds = 0.0
        self._ahead: Ahead[_Fetch, _Picture] | None = None

    @property
    def wait_seconds(self) -> float:
        """That the consumer spent waiting for bytes, so far, those of footers included."""
        return self._footer_seconds + (self._ahead.wait_seconds if self._ahead else 0.0)

    def __iter__(self) -> Iterator[_Picture]:
        self._ahead = Ahead(self._fetches(), self._fetch, self._threads, _MAX_AHEAD)
        return iter(self._ahead)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._ahead:
            self._ahead.close()

    def _fetches(self) -> list[_Fetch]:
        order, starts = _runs(pa.Table.from_pylist(list(self._rows), schema=_PLACES))
        runs = [run.tolist() for run in np.split(order, np.flatnonzero(starts)[1:])]
        by_source: dict[str, list[list[int]]] = {}
        for run in runs if self._rows else []:
            by_source.setdefault(self._rows[run[0]]["source"], []).append(run)
        in_parquet = [source for source in by_source if source.endswith(PARQUET)]
        footers = dict(zip(in_parquet, self._footers(in_parquet), strict=True))
        fetches: list[_Fetch] = []
        for source, parts in by_source.items():
            if source in footers:
                fetches += self._by_row_group(source, *footers[source], list(chain(*parts)))
            else:
                fetches += [_Fetch(source, run) for run in parts]
        return fetches

    def _footers(self, sources: list[str]) -> list[tuple[pq.FileMetaData, int]]:
        def read(source: str) -> tuple[pq.FileMetaData, int]:
            with _told(uri := storage.join(self._raw, source)):
                size = storage.size(uri)
                return pq.read_metadata(_Counted(uri, size, self._count)), size

        started = time.perf_counter()
        with ThreadPoolExecutor(self._threads) as pool:
            found = list(pool.map(read, sources))
        self._footer_seconds += time.perf_counter() - started
        return found

    def _by_row_group(
        self, source: str, footer: pq.FileMetaData, file_bytes: int, positions: list[int]
    ) -> list[_Fetch]:
        counts = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        ends = np.cumsum(counts, dtype=np.int64)
        wanted = np.array([self._rows[position]["offset"] for position in positions], np.int64)
        if wanted[-1] >= footer.num_rows:
            raise UserError(
                f"{storage.join(self._raw, source)} has changed: row {wanted[-1]:,} is gone, it "
                f"has {footer.num_rows:,} rows now; build anew"
            )
        groups = np.searchsorted(ends, wanted, "right")
        fetches = []
        for number in np.unique(groups).tolist():
            group = _RowGroup(footer, file_bytes, number, int(ends[number]) - counts[number])
            here = [positions[i] for i in np.flatnonzero(groups == number)]
            fetches.append(_Fetch(source, here, group))
        return fetches

    def _fetch(self, fetch: _Fetch, room: Room) -> Iterator[list[_Picture]]:
        if fetch.group is not None:
            yield from self._row_group(fetch, fetch.group, room)
            return
        rows = [self._rows[position] for position in fetch.positions]
        start = rows[0]["offset"]
        length = max(row["offset"] + row["size"] for row in rows) - start
        if room(length):
            data = _read(storage.join(self._raw, fetch.source), start, length)
            self._count(len(data))
            starts = [row["offset"] - start for row in rows]
            ends = [first + row["size"] for first, row in zip(starts, rows, strict=True)]
            pictures = [data[first:end] for first, end in zip(starts, ends, strict=True)]
            yield list(zip(fetch.positions, pictures, strict=True))

    def _row_group(self, fetch: _Fetch, group: _RowGroup, room: Room) -> Iterator[list[_Picture]]:
        uri = storage.join(self._raw, fetch.source)
        num_bytes = group.footer.row_group(group.number).total_byte_size
        wanted = deque(fetch.positions)
        row = group.first_row
        with _told(uri):
            batches = _batches(_Counted(uri, group.file_bytes, self._count), group)
            held = min(num_bytes, _MAX_AHEAD)  # a page may be as large as its row group
            while wanted and room(held):
                images = next(batches, None)
                if images is None:
                    raise UserError(f"{uri} is damaged: row {row:,} is not there; fetch it again")
                pictures = []
                while wanted and (place := self._rows[wanted[0]]["offset"] - row) < len(images):
                    position = wanted.popleft()
                    pictures.append((position, self._checked(uri, position, images[place])))
                row += len(images)
                held = _MAX_READ
                yield pictures

    def _checked(self, uri: str, position: int, image: pa.StructScalar) -> bytes:
        """Its bytes; b"" where the file has none, to be rejected like any empty picture."""
        row = self._rows[position]
        path = image["path"].as_py() if "path" in image else None
        number = pa.array([row["offset"]], pa.int64())
        found = picture_names(pa.array([path], pa.string()), row["source"], number)[0].as_py()
        if found != row["name"]:
            raise UserError(
                f"{uri} has changed: row {row['offset']:,} was {row['name']} and is {found}; "
                "build anew"
            )
        return image["bytes"].as_py() or b""

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self.requests += 1
            self.read_bytes += num_bytes


def cost(rows: pa.Table) -> tuple[int, int]:
    """Requests and bytes, with gaps, that a Reader of these rows of sources.TABLE needs.

    Nothing is read, so sizes and row groups of parquet files are unknown: there every stretch of
    consecutive rows counts as one request and no bytes, which is less than is really needed.
    """
    order, starts = _runs(rows)
    rows = rows.take(pa.array(order))
    offset, size = _numbers(rows["offset"]), _numbers(rows["size"])
    firsts = np.flatnonzero(starts)
    ends = np.maximum.reduceat(offset + size, firsts) if len(firsts) else offset
    lengths = np.where(_in_parquet(rows)[firsts], 0, ends - offset[firsts])
    return len(firsts), int(lengths.sum())


def picture_names(paths: pa.Array, source: str, rows: pa.Array) -> pa.Array:
    """Names of the raw files from `image.path` in a parquet file, which repeats the WNID in
    Hugging Face's: n01440764_10026_n01440764.JPEG, ILSVRC2012_val_00000293_n01440764.JPEG. Where
    it is null, the name is that of the parquet file with the number of the row."""
    names = pc.replace_substring_regex(paths, r"^.*/", "")
    names = pc.replace_substring_regex(names, r"_n\d{8}(\.[^.]*)$", r"\1")
    stem = source.rpartition("/")[2].removesuffix(PARQUET)
    numbered = pc.binary_join_element_wise(stem, rows.cast(pa.string()), "-")
    return pc.if_else(pc.equal(pc.fill_null(names, ""), ""), numbered, names)


# What one read fetches

_PLACES = pa.schema([("source", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])


def _runs(rows: pa.Table) -> tuple[_Numbers, _Flags]:
    """Row numbers in the source's order, and which of them begin a read."""
    keys = [("source", "ascending"), ("offset", "ascending")]
    order = pc.sort_indices(rows, sort_keys=keys).to_numpy().astype(np.int64)
    rows = rows.take(pa.array(order))
    in_parquet = _in_parquet(rows)
    source = _numbers(rows["source"].combine_chunks().dictionary_encode().indices)
    offset = (source << _PLACE_BITS) + _numbers(rows["offset"])  # one line of all containers
    size = np.where(in_parquet, 1, _numbers(rows["size"]))
    end = np.maximum.accumulate(offset + size)  # of the pictures so far: they may overlap
    starts = np.ones(len(order), np.bool_)
    starts[1:] = offset[1:] - end[:-1] > np.where(in_parquet, 0, _MAX_GAP)[1:]
    bounds = np.append(np.flatnonzero(starts), len(order)).tolist()
    for first, stop in pairwise(bounds):
        while end[stop - 1] - offset[first] > _MAX_READ and first + 1 < stop:  # once per request
            fitting = np.searchsorted(end[first:stop], offset[first] + _MAX_READ, "right")
            first += max(1, int(fitting))
            starts[first] = True
    return order, starts


def _in_parquet(rows: pa.Table) -> _Flags:
    return np.asarray(pc.ends_with(rows["source"], PARQUET), np.bool_)


def _numbers(column: Any) -> _Numbers:
    """0 where it is null."""
    return np.asarray(pc.fill_null(column.cast(pa.int64()), 0), np.int64)


# Reads


class _Counted(tars.RangeFile):
    def __init__(self, uri: str, size: int, count: Callable[[int], None]) -> None:
        super().__init__(uri, 0, size)
        self._tell_count = count

    def readinto(self, buffer: Any) -> int:
        num_bytes = super().readinto(buffer)
        self._tell_count(num_bytes)
        return num_bytes


def _batches(file: tars.RangeFile, group: _RowGroup) -> Iterator[pa.StructArray]:
    """The images of a row group, some MiB at a time, without Arrow's threads."""
    about = group.footer.row_group(group.number)
    rows = _MAX_READ * about.num_rows // max(1, about.total_byte_size)
    parquet = pq.ParquetFile(file, metadata=group.footer, pre_buffer=False, buffer_size=_MAX_READ)
    batches = parquet.iter_batches(
        batch_size=max(1, min(rows, about.num_rows)),
        row_groups=[group.number],
        columns=["image"],
        use_threads=False,
    )
    for batch in batches:
        yield batch.column("image")


def _read(uri: str, start: int, length: int) -> bytes:
    with _told(uri):
        whole = start == 0 < length and not uri.endswith(".tar")  # a file of its own: it may grow
        data = storage.read(uri, start, length + whole)
    if len(data) > length:
        raise UserError(f"{uri} has changed: it is longer than {length:,} bytes; build anew")
    if len(data) != length:
        raise UserError(
            f"{uri} has changed: of bytes {start:,} to {start + length:,} only {len(data):,} are "
            "there; build anew"
        )
    return data


@contextlib.contextmanager
def _told(uri: str) -> Iterator[None]:
    """A container that was there when the build was planned and is not now, or is damaged."""
    try:
        yield
    except UserError as error:
        if storage.exists(uri):
            raise
        raise UserError(f"{uri} has changed: it is gone; put it back or build anew") from error
    except (pa.ArrowException, OSError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{uri} is damaged ({line}); fetch it again") from error
