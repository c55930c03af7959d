"""Raw images of one shard, fetched by threads ahead of whoever decodes them.

Images that are neighbours in a container come with one range read, small files of a disk several at
a time. Images in a parquet file come row group by row group, each streamed page by page up to its
last wanted row.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alexnet.errors import UserError
from pipelines import storage
from pipelines.sources.table import PARQUET, image_names

_MAX_GAP = 16 << 10  # bytes between two images that are cheaper to read than to skip
_MAX_READ = 8 << 20  # bytes per request, unless one image is larger
_TOGETHER = 1 << 20  # bytes of small local files that one thread reads before anybody is woken
_MAX_AHEAD = 64 << 20  # bytes that are being read or wait to be taken, unless one read is larger
_THREADS_S3, _THREADS_LOCAL = 16, 4
_PLACE_BITS = 42  # enough for a container of 4 TiB, and for two million containers

_Numbers = np.ndarray[Any, np.dtype[np.int64]]
_Flags = np.ndarray[Any, np.dtype[np.bool_]]
_Images = list[tuple[int, bytes]]  # with their positions
_Range = tuple[str, list[int], int]  # of this container, images that one read fetches, its bytes


@dataclass(frozen=True)
class _Fetch:
    num_bytes: int  # that it holds at most, from its start until its last image was taken
    parts: Iterator[_Images]  # a request each, or more
    one: bool  # part, so that nobody need ask for the next


class Reader:
    """Iterating, once, gives (position in `rows`, bytes) of every image, in the source's order.

    Raises UserError while iterating when a container can't be read or has changed. The threads end
    with the iterator, or with `with` where the loop is left early.
    """

    def __init__(self, raw: str, rows: Sequence[dict[str, Any]]) -> None:
        self.requests = 0
        self.read_bytes = 0  # with the gaps between images
        self.wait_seconds = 0.0  # that the consumer waited for bytes, those of footers included
        self._raw = raw
        self._rows = rows
        threads = _THREADS_S3 if storage.is_s3(raw) else _THREADS_LOCAL
        self._together = 0 if storage.is_s3(raw) else _TOGETHER
        self._pool = ThreadPoolExecutor(threads, "ahead")
        self._counting = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with self:
            fetches = deque(self._fetches())
            begun: deque[tuple[_Fetch, Future[_Images | None]]] = deque()
            held = 0
            while fetches or begun:
                while fetches and (not begun or held + fetches[0].num_bytes <= _MAX_AHEAD):
                    fetch = fetches.popleft()
                    held += fetch.num_bytes
                    begun.append((fetch, self._pool.submit(next, fetch.parts, None)))
                fetch, part = begun.popleft()
                with self._waiting():
                    images = part.result()
                if images is None or fetch.one:
                    held -= fetch.num_bytes
                else:
                    begun.appendleft((fetch, self._pool.submit(next, fetch.parts, None)))
                yield from images or ()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.wait_seconds += time.perf_counter() - started

    def _fetches(self) -> Iterator[_Fetch]:
        if not self._rows:
            return
        order, starts = _runs(pa.Table.from_pylist(list(self._rows), schema=_PLACES))
        runs = [run.tolist() for run in np.split(order, np.flatnonzero(starts)[1:])]
        by_source = {
            source: list(of_source)
            for source, of_source in groupby(runs, lambda run: self._rows[run[0]]["source"])
        }
        in_parquet = [source for source in by_source if source.endswith(PARQUET)]
        with self._waiting():
            footers = dict(zip(in_parquet, self._pool.map(self._footer, in_parquet), strict=True))
        for source in in_parquet:
            uri, (footer, file_bytes) = storage.join(self._raw, source), footers[source]
            positions = list(chain(*by_source.pop(source)))
            yield from self._row_groups(uri, footer, file_bytes, positions)
        ranges, num_bytes = list[_Range](), 0
        for source, of_source in by_source.items():
            for positions in of_source:
                rows = [self._rows[position] for position in positions]
                length = max(row["offset"] + row["size"] for row in rows) - rows[0]["offset"]
                if ranges and num_bytes + length > self._together:
                    yield _Fetch(num_bytes, self._ranges(ranges), one=True)
                    ranges, num_bytes = [], 0
                ranges.append((storage.join(self._raw, source), positions, length))
                num_bytes += length
        if ranges:
            yield _Fetch(num_bytes, self._ranges(ranges), one=True)

    def _ranges(self, ranges: list[_Range]) -> Iterator[_Images]:
        images: _Images = []
        for uri, positions, length in ranges:
            start = self._rows[positions[0]]["offset"]
            data = _read(uri, start, length)
            self._count(len(data))
            rows = [(position, self._rows[position]) for position in positions]
            places = [(position, row["offset"] - start, row["size"]) for position, row in rows]
            images += [(position, data[first : first + size]) for position, first, size in places]
        yield images

    def _footer(self, source: str) -> tuple[pq.FileMetaData, int]:
        """With the bytes of the file."""
        with _reported(uri := storage.join(self._raw, source)):
            size = storage.size(uri)
            return pq.read_metadata(_Counted(uri, size, self._count)), size

    def _row_groups(
        self, uri: str, footer: pq.FileMetaData, file_bytes: int, positions: list[int]
    ) -> Iterator[_Fetch]:
        counts = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        ends = np.cumsum(counts, dtype=np.int64)
        wanted = np.array([self._rows[position]["offset"] for position in positions], np.int64)
        if wanted[-1] >= footer.num_rows:
            raise UserError(
                f"{uri} has changed: row {wanted[-1]:,} is gone, it has {footer.num_rows:,} rows "
                "now; build anew"
            )
        groups = np.searchsorted(ends, wanted, "right")
        for number in np.unique(groups).tolist():
            here = [positions[i] for i in np.flatnonzero(groups == number)]
            file = _Counted(uri, file_bytes, self._count)
            first_row = int(ends[number]) - counts[number]
            # A page, and with it a batch, may be as large as its row group.
            num_bytes = min(footer.row_group(number).total_byte_size, _MAX_AHEAD)
            parts = self._row_group(uri, _batches(file, footer, number), here, first_row)
            yield _Fetch(num_bytes, parts, one=False)

    def _row_group(
        self, uri: str, batches: Iterator[pa.StructArray], positions: list[int], row: int
    ) -> Iterator[_Images]:
        wanted = deque(positions)
        while wanted:
            with _reported(uri):
                images = next(batches, None)
            if images is None:
                raise UserError(f"{uri} is damaged: row {row:,} is not there; fetch it again")
            found = []
            while wanted and (place := self._rows[wanted[0]]["offset"] - row) < len(images):
                position = wanted.popleft()
                found.append((position, self._checked(uri, position, images[place])))
            row += len(images)
            yield found

    def _checked(self, uri: str, position: int, image: pa.StructScalar) -> bytes:
        """Its bytes; b"" where the file has none, to be rejected like any empty image."""
        row = self._rows[position]
        path = image["path"].as_py() if "path" in image else None
        number = pa.array([row["offset"]], pa.int64())
        found = image_names(pa.array([path], pa.string()), row["source"], number)[0].as_py()
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
    end = np.maximum.accumulate(offset + size)  # of the images so far: they may overlap
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


class _Counted(storage.RangeFile):
    def __init__(self, uri: str, size: int, count: Callable[[int], None]) -> None:
        super().__init__(uri, 0, size)
        self._count = count

    def readinto(self, buffer: Any) -> int:
        num_bytes = super().readinto(buffer)
        self._count(num_bytes)
        return num_bytes


def _batches(file: storage.RangeFile, footer: pq.FileMetaData, number: int) -> Iterator[Any]:
    """The images of a row group, some MiB at a time, without Arrow's threads."""
    about = footer.row_group(number)
    rows = _MAX_READ * about.num_rows // max(1, about.total_byte_size)
    parquet = pq.ParquetFile(file, metadata=footer, pre_buffer=False, buffer_size=_MAX_READ)
    batches = parquet.iter_batches(
        batch_size=max(1, min(rows, about.num_rows)),
        row_groups=[number],
        columns=["image"],
        use_threads=False,
    )
    for batch in batches:
        yield batch.column("image")


def _read(uri: str, start: int, length: int) -> bytes:
    with _reported(uri):
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
def _reported(uri: str) -> Iterator[None]:
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
