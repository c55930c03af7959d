"""Reads shards the way a stranger would: every byte hashed, every member and picture looked at.

One pass over each file in chunks. The tar is taken apart with Python's tar header and the pictures
are decoded by libjpeg-turbo with its warnings as errors; neither wrote the shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.shards import Manifest
from pipelines.verify.contents import Problem, rows_of

Say = Callable[[str], None]

_MEMBERS = ("cls", "jpg", "json")
_BLOCK = 512
_CHUNK = 8 << 20  # bytes per read
_SAY_EVERY = 5.0  # seconds
_SHOWN = 5  # problems of one shard; a wrong index would give one per sample


@dataclass(frozen=True)
class Job:
    """One file to read whole."""

    file: str  # relative to OUT
    size: int
    sha256: str  # that it should have
    index: pa.Table | None = None  # of its split if the file is a shard and is to be taken apart
    dali_index: str | None = None  # sha256 of its .idx


class Stopped(Exception):
    """Another thread failed, or the user pressed Ctrl-C."""


def audit(out: str, jobs: Sequence[Job], manifest: Manifest | None, say: Say) -> list[Problem]:
    """What is wrong with the files, in the order of `jobs`; several are read at the same time."""
    meter = _Meter(len(jobs), sum(job.size for job in jobs))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(_check, out, job, manifest, meter) for job in jobs]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, _SAY_EVERY, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if waiting:
                    say(meter.line())
        except BaseException:
            meter.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    found = zip(jobs, futures, strict=True)
    return [Problem(job.file, text) for job, future in found for text in future.result()]


class _Meter:
    """How far the threads are."""

    def __init__(self, files: int, num_bytes: int) -> None:
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._files, self._bytes = files, num_bytes
        self._files_done = self._bytes_done = 0
        self._started = time.monotonic()

    def count(self, num_bytes: int, files: int = 0) -> None:
        """Raises Stopped where nobody waits for more."""
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            self._bytes_done += num_bytes
            self._files_done += files

    def line(self) -> str:
        rate = self._bytes_done / max(time.monotonic() - self._started, 1e-9)
        left = int((self._bytes - self._bytes_done) / rate) if rate else None
        eta = "unknown" if left is None else f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        megabytes = f"{self._bytes_done / 1e6:,.0f} of {self._bytes / 1e6:,.0f} MB"
        return (
            f"verified {self._files_done:,} of {self._files:,} files, {megabytes}, "
            f"{rate / 1e6:,.1f} MB/s, ETA {eta}"
        )


def _check(out: str, job: Job, manifest: Manifest | None, meter: _Meter) -> list[str]:
    reader = _Reader(storage.join(out, job.file), job.size, meter)
    problems: list[str] = []
    if job.index is not None and manifest is not None:
        rows = rows_of(job.index, "shard", job.file.removesuffix(".tar")).to_pylist()
        problems = list(_shard_problems(reader, rows, manifest.crop, job.dali_index))
    if reader.finish() != job.sha256:
        problems.insert(0, f"its {job.size:,} bytes have another sha256")
    meter.count(0, files=1)
    if len(problems) > _SHOWN:
        return [*problems[:_SHOWN], f"and {len(problems) - _SHOWN:,} problems more"]
    return problems


class _Reader:
    """The bytes of a file in order, hashed on their way."""

    def __init__(self, uri: str, size: int, meter: _Meter) -> None:
        self.position = 0  # of the next byte that `take` gives
        self._uri, self._size, self._meter = uri, size, meter
        self._digest = hashlib.sha256()
        self._read = 0
        self._chunk = memoryview(b"")

    def take(self, length: int) -> bytes:
        """`length` bytes; fewer where the file ends."""
        parts = []
        while length > 0 and (self._chunk or self._fill()):
            part, self._chunk = self._chunk[:length], self._chunk[length:]
            parts.append(part)
            length -= len(part)
            self.position += len(part)
        return b"".join(parts)

    def finish(self) -> str:
        """sha256 of the whole file."""
        while self._fill():
            pass
        return self._digest.hexdigest()

    def _fill(self) -> bool:
        data = storage.read(self._uri, self._read, min(_CHUNK, self._size - self._read))
        self._read += len(data)
        self._digest.update(data)
        self._meter.count(len(data))
        self._chunk = memoryview(data)
        return bool(data)


def _shard_problems(
    reader: _Reader, rows: list[dict[str, Any]], crop: int, dali_index: str | None
) -> Iterator[str]:
    members = _members(reader)
    places = hashlib.sha256(f"v1.2 {len(rows)}\n".encode())
    try:
        for row in rows:
            found = [(suffix, next(members, None)) for suffix in _MEMBERS]
            wanted = [f"{row['key']}.{suffix}" for suffix in _MEMBERS]
            names = [member[0] if member else "its end" for _, member in found]
            if names != wanted:
                yield f"{' '.join(names)} where the index has {' '.join(wanted)}"
                return
            parts = {suffix: member for suffix, member in found if member}
            words = [
                f"{suffix} {at} {len(data)} {name}" for suffix, (name, data, at) in parts.items()
            ]
            places.update((" ".join(words) + "\n").encode())
            for problem in _sample_problems(row, parts, crop):
                yield f"{row['key']}: {problem}"
        if (extra := next(members, None)) is not None:
            yield f"{extra[0]} follows the last sample of the index"
        elif places.hexdigest() != (dali_index or places.hexdigest()):
            yield "its members do not lie where its .idx says"
    except (tarfile.TarError, ValueError, OverflowError) as error:
        yield f"no tar that can be read ({error})"


def _members(reader: _Reader) -> Iterator[tuple[str, bytes, int]]:
    """(name, data, offset of the data) up to the end mark. Raises TarError at anything else."""
    while True:
        offset = reader.position
        block = reader.take(_BLOCK)
        if len(block) == _BLOCK and not any(block):
            break
        info = tarfile.TarInfo.frombuf(block, "ascii", "backslashreplace")
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise tarfile.ReadError(f"{info.name} at byte {offset:,} is no plain file")
        if info.size < 0:
            raise tarfile.ReadError(f"{info.name} at byte {offset:,} has {info.size:,} bytes")
        data = reader.take(info.size)
        padding = -info.size % _BLOCK
        if len(data) != info.size or len(reader.take(padding)) != padding:
            raise tarfile.ReadError(f"{info.name} at byte {offset:,} is cut")
        yield info.name, data, offset + _BLOCK
    while block := reader.take(_CHUNK):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"something follows the end mark at byte {offset:,}")


def _sample_problems(
    row: dict[str, Any], members: dict[str, tuple[str, bytes, int]], crop: int
) -> Iterator[str]:
    label, jpeg, text = (members[suffix][1] for suffix in _MEMBERS)
    if label != str(row["label"]).encode():
        yield f"label {label[:20]!r}, the index says {row['label']}"
    if (members["jpg"][2], len(jpeg)) != (row["offset"], row["size"]):
        yield f"lies at {members['jpg'][2]} with {len(jpeg)} bytes, the index says otherwise"
    if hashlib.sha256(jpeg).hexdigest() != row["sha256"]:
        yield "another sha256 than in the index"
    if not _agree(text, row):
        yield "its JSON and the index disagree"
    yield from _picture_problems(jpeg, crop)


def _agree(text: bytes, row: dict[str, Any]) -> bool:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(document, dict) or not {"key", "label", "wnid"} <= document.keys():
        return False
    row = row | {"fixes": " ".join(row["fixes"])}
    return all(document[name] == row[name] for name in document.keys() & row.keys())


def _picture_problems(jpeg: bytes, crop: int) -> Iterator[str]:
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(jpeg)
        if (width, height) != (crop, crop) or colours not in ("YCbCr", "RGB"):
            yield f"is {width}×{height} {colours}, not {crop}×{crop} in colour"
        else:  # not a picture of any size that a damaged header claims
            simplejpeg.decode_jpeg(jpeg, strict=True)
    except ValueError as error:
        yield f"cannot be decoded ({error})"
