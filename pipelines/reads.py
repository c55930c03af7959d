"""Raw pictures of one shard, fetched by threads ahead of whoever decodes them.

Pictures that are neighbours in a container come with one range read. Pictures in a parquet file
come row group by row group: a row group is streamed, so that even one as large as its file takes
little memory, but it is always read from its start to the last wanted row.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alexnet.errors import UserError
from pipelines import storage, tars

PARQUET = ".parquet"
_MAX_GAP = 16 << 10  # bytes between two pictures that are cheaper to read than to skip
_MAX_READ = 8 << 20  # bytes per request, unless one picture is larger
_MAX_AHEAD = 64 << 20  # bytes read, or being read, that nobody has taken yet
_THREADS_S3, _THREADS_LOCAL = 16, 4
_JOIN_SECONDS = 2.0  # for a request under way when the reader is closed; threads are daemons

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Reader:
    """Iterating gives (position in `rows`, bytes) of every picture, in the source's order, once.

    Raises UserError while iterating when a container has changed or can't be read. `with` ends
    the threads at once when the loop is left early; without it they end with the iterator.
    """

    def __init__(self, raw: str, rows: Sequence[dict[str, Any]]) -> None:
        self.read_bytes = 0  # fetched, with the gaps between pictures
        self.requests = 0
        self.wait_seconds = 0.0  # that the consumer spent waiting for bytes
        self._raw = raw
        self._rows = rows
        self._threads = _THREADS_S3 if storage.is_s3(raw) else _THREADS_LOCAL
        self._counting = threading.Lock()
        self._ahead: _Ahead | None = None

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        started = time.perf_counter()
        fetches = self._fetches()
        self._ahead = ahead = _Ahead(fetches, self._fetch, self._threads)
        try:
            for fetch in fetches:
                while (batch := ahead.next_of(fetch)) is not None:
                    self.wait_seconds += time.perf_counter() - started
                    yield from batch.pictures
                    ahead.release(batch)
                    started = time.perf_counter()
        finally:
            ahead.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def _fetches(self) -> list[_Fetch]:
        columns = {name: [row[name] for row in self._rows] for name in ("source", "offset", "size")}
        order, starts = _runs(pa.table(columns, schema=_PLACES))
        runs = [run.tolist() for run in np.split(order, np.flatnonzero(starts)[1:])]
        by_source: dict[str, list[list[int]]] = {}
        for run in runs:
            if run:
                by_source.setdefault(self._rows[run[0]]["source"], []).append(run)
        footers = self._footers([source for source in by_source if source.endswith(PARQUET)])
        fetches = []
        for source, positions in by_source.items():
            if source in footers:
                fetches += self._by_row_group(source, footers[source], sum(positions, []))
            else:
                fetches += [_Fetch(source, run) for run in positions]
        return fetches

    def _footers(self, sources: list[str]) -> dict[str, pq.FileMetaData]:
        def read(source: str) -> pq.FileMetaData:
            with _told(uri := storage.join(self._raw, source)):
                return pq.read_metadata(_Counted(uri, self._count))

        with ThreadPoolExecutor(self._threads) as pool:
            return dict(zip(sources, pool.map(read, sources), strict=True))

    def _by_row_group(
        self, source: str, footer: pq.FileMetaData, positions: list[int]
    ) -> list[_Fetch]:
        counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        first_after = np.cumsum(counts, dtype=np.int64)
        wanted = np.array([self._rows[position]["offset"] for position in positions], np.int64)
        if wanted[-1] >= footer.num_rows:
            uri = storage.join(self._raw, source)
            raise UserError(
                f"{uri} has changed: row {wanted[-1]} is gone, it has {footer.num_rows}; build anew"
            )
        groups = np.searchsorted(first_after, wanted, "right")
        return [
            _Fetch(
                source,
                [positions[i] for i in np.flatnonzero(groups == group)],
                _RowGroup(footer, int(group), int(first_after[group]) - counts[group]),
            )
            for group in np.unique(groups)
        ]

    def _fetch(self, fetch: _Fetch, room: _Room) -> Iterator[_Batch]:
        return (self._range if fetch.group is None else self._row_group)(fetch, room)

    def _range(self, fetch: _Fetch, room: _Room) -> Iterator[_Batch]:
        """One range read for all its pictures."""
        first, last = self._rows[fetch.positions[0]], self._rows[fetch.positions[-1]]
        start = first["offset"]
        length = last["offset"] + last["size"] - start
        if not room(length):
            return
        uri = storage.join(self._raw, fetch.source)
        data = _read(uri, start, length)
        self._count(len(data))
        places = [(i, self._rows[i]["offset"] - start) for i in fetch.positions]
        pictures = [(i, data[place : place + self._rows[i]["size"]]) for i, place in places]
        yield _Batch(length, pictures)

    def _row_group(self, fetch: _Fetch, room: _Room) -> Iterator[_Batch]:
        """Its wanted rows, some 8 MiB at a time."""
        assert fetch.group is not None
        uri = storage.join(self._raw, fetch.source)
        wanted = deque(fetch.positions)
        row = fetch.group.first_row
        with _told(uri):
            batches = fetch.group.batches(_Counted(uri, self._count))
            while wanted and room(_MAX_READ):
                images = next(batches).column("image")
                taken = []
                while wanted and self._rows[wanted[0]]["offset"] < row + len(images):
                    position = wanted.popleft()
                    image = images[self._rows[position]["offset"] - row]
                    taken.append((position, self._checked(uri, position, image)))
                row += len(images)
                yield _Batch(_MAX_READ, taken)

    def _checked(self, uri: str, position: int, image: pa.StructScalar) -> bytes:
        """The picture; b"" where the file has none, to be rejected as any empty picture is."""
        row = self._rows[position]
        found = picture_names(pa.array([image["path"].as_py()], pa.string()))[0].as_py()
        if found != row["name"]:
            raise UserError(
                f"{uri} has changed: row {row['offset']} was {row['name']} and is {found}; "
                "build anew"
            )
        return image["bytes"].as_py() or b""

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self.read_bytes += num_bytes
            self.requests += 1


def cost(rows: pa.Table) -> tuple[int, int]:
    """Requests and bytes (with gaps) that a Reader of these rows of sources.TABLE would need.

    Nothing is read, so of a parquet file neither sizes nor row groups are known: every stretch of
    consecutive rows counts as one request and no bytes. The real number of requests is that of
    the row groups touched, times one or more.
    """
    order, starts = _runs(rows)
    firsts = np.flatnonzero(starts)
    lasts = np.append(firsts[1:], len(order)) - 1
    rows = rows.take(pa.array(order))
    offset, size = _numbers(rows["offset"]), _numbers(rows["size"])
    lengths = offset[lasts] + size[lasts] - offset[firsts]
    return len(firsts), int(lengths[~_in_parquet(rows)[firsts]].sum())


def picture_names(paths: pa.Array) -> pa.Array:
    """Names of the raw files from `image.path` of Hugging Face's parquet files, which puts the
    WNID at the end: n01440764_10026_n01440764.JPEG, ILSVRC2012_val_00000293_n01440764.JPEG."""
    names = pc.replace_substring_regex(paths, r"^.*/", "")
    return pc.replace_substring_regex(names, r"_n\d{8}(\.[^.]*)$", r"\1")


# Which pictures one read fetches

_PLACES = pa.schema([("source", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])


def _runs(rows: pa.Table) -> tuple[Numbers, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Row numbers in the source's order, and which of them begin a read."""
    keys = [("source", "ascending"), ("offset", "ascending")]
    order = pc.sort_indices(rows, sort_keys=keys).to_numpy().astype(np.int64)
    rows = rows.take(pa.array(order)).combine_chunks()
    in_parquet = _in_parquet(rows)
    source = _numbers(rows["source"].combine_chunks().dictionary_encode().indices)
    offset = _numbers(rows["offset"])
    end = offset + np.where(in_parquet, 1, _numbers(rows["size"]))
    starts = np.ones(len(order), np.bool_)
    gap = np.where(in_parquet, 0, _MAX_GAP)
    starts[1:] = (source[1:] != source[:-1]) | (offset[1:] - end[:-1] > gap[1:])
    bounds = np.append(np.flatnonzero(starts), len(order))
    for first, stop in zip(bounds[:-1], bounds[1:], strict=True):
        while end[stop - 1] - offset[first] > _MAX_READ:  # once per read, not per picture
            fitting = np.searchsorted(end[first:stop], offset[first] + _MAX_READ, "right")
            first += max(1, int(fitting))
            if first >= stop:
                break
            starts[first] = True
    return order, starts


def _in_parquet(rows: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.asarray(pc.ends_with(rows["source"], PARQUET), np.bool_)


def _numbers(column: Any) -> Numbers:
    """int64; 0 where it is null."""
    return np.asarray(pc.fill_null(column, 0).cast(pa.int64()), np.int64)
