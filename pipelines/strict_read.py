"""Every byte of tars and quarantined images, read the way a stranger would: tars are taken apart
with Python's tar header and images decoded by libjpeg-turbo with its warnings as errors; neither
wrote them. In threads of this process, or as Ray Data over the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import simplejpeg

from alexnet.errors import UserError
from pipelines import sidecars, storage

_CHUNK = 8 << 20  # bytes per read
_SUFFIXES = ("cls", "jpg", "json")  # of a sample's members, in their order
_SHOWN = 5  # problems of one shard: a wrong index would give one per sample


class Job(NamedTuple):
    """One file to read whole."""

    file: str
    size: int
    sha256: str  # that it should have
    rows: pa.Table | None = None  # of the index, where the file is a shard to be taken apart


Answers = Generator[tuple[Job, list[str]]]  # in order of completion, with what is wrong
ReadAll = Callable[[str, list[Job], int], Answers]  # with OUT and the side of its images


def in_threads(out: str, jobs: list[Job], crop: int, workers: int | None = None) -> Answers:
    """`workers` files at the same time, by default as many as this machine has CPUs."""
    stop = threading.Event()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        futures = {pool.submit(_read, out, job, crop, stop): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def on_ray(out: str, jobs: list[Job], crop: int, workers: int | None = None) -> Answers:
    """One task a file, `workers` at most at once. Tasks take the rows from the sidecars, which
    agree with the index, or else it was said."""
    from pipelines import cluster

    rows = [
        {"number": n, "file": job.file, "size": job.size, "sha256": job.sha256}
        | {"shard": job.file.removesuffix(".tar") if job.rows is not None else ""}
        for n, job in enumerate(jobs)
    ]
    with closing(cluster.each(rows, partial(_task, out, crop), workers)) as answers:
        for answer in answers:
            if answer["error"]:
                raise UserError(answer["error"])
            yield jobs[answer["number"]], list(answer["problems"])


def _task(out: str, crop: int, row: dict[str, Any]) -> dict[str, Any]:
    rows, problems, error = None, list[str](), ""
    try:
        # One that is damaged or missing was said, when all sidecars were looked at.
        with suppress(ValueError):
            rows = _rows(out, row["shard"]) if row["shard"] else None
        job = Job(row["file"], row["size"], row["sha256"], rows)
        problems = _read(out, job, crop, threading.Event())
    except UserError as refused:  # raised by the driver: here it would be a page of Ray's
        error = str(refused)
    return {"number": row["number"], "problems": problems, "error": error}


def _rows(out: str, shard: str) -> pa.Table | None:
    uri = sidecars.place(out, shard)
    return sidecars.unpack(storage.read(uri))[0] if storage.exists(uri) else None


def _read(out: str, job: Job, crop: int, stop: threading.Event) -> list[str]:
    file = _Hashed(storage.join(out, job.file), job.size, stop)
    problems: list[str] = []
    if job.rows is not None:
        try:
            problems += _shard_problems(file, job.rows.to_pylist(), crop)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            problems.append(f"no tar that can be read ({error})")
    while file.read(_CHUNK):
        pass
    if file.digest.hexdigest() != job.sha256:
        problems.insert(0, f"its {job.size:,} bytes have another sha256")
    if len(problems) > _SHOWN:
        return [*problems[:_SHOWN], f"and {len(problems) - _SHOWN:,} problems more"]
    return problems


class _Hashed:
    """A file that is read once from its start to its end, and hashed on the way."""

    def __init__(self, uri: str, size: int, stop: threading.Event) -> None:
        self.digest = hashlib.sha256()
        self._uri, self._left, self._stop = uri, size, stop
        self._position = 0

    def read(self, length: int) -> bytes:
        if self._stop.is_set():
            raise RuntimeError("another thread failed, or the user pressed Ctrl-C")
        data = storage.read(self._uri, self._position, min(length, self._left))
        self._position += len(data)
        self._left -= len(data)
        self.digest.update(data)
        return data


def _shard_problems(file: Any, rows: Iterable[dict[str, Any]], crop: int) -> Iterator[str]:
    """Raises TarError, ValueError or OverflowError where the tar cannot be read on."""
    with tarfile.open(
        fileobj=file, mode="r|", bufsize=_CHUNK, encoding="ascii", errors="backslashreplace"
    ) as tar:
        members = _members(tar)
        for row in rows:
            found = [next(members, ("its end", b"", 0)) for _ in _SUFFIXES]
            names = [name for name, _, _ in found]
            if names != (wanted := [f"{row['key']}.{suffix}" for suffix in _SUFFIXES]):
                yield f"{' '.join(names)} where the index has {' '.join(wanted)}"
                return
            label, jpeg, text = (data for _, data, _ in found)
            for problem in _sample_problems(row, label, jpeg, text, found[1][2], crop):
                yield f"{row['key']}: {problem}"
        if (extra := next(members, None)) is not None:
            yield f"{extra[0]} follows the last sample of the index"


def _members(tar: Any) -> Iterator[tuple[str, bytes, int]]:
    """(name, data, offset of the data) up to the end mark. Raises TarError at anything else."""
    for info in tar:
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise tarfile.ReadError(f"{info.name} at byte {info.offset:,} is no plain file")
        yield info.name, tar.extractfile(info).read(), info.offset_data
    while block := tar.fileobj.read(_CHUNK):
        if block.strip(b"\0"):
            raise tarfile.ReadError("something follows the end mark")


def _sample_problems(
    row: dict[str, Any], label: bytes, jpeg: bytes, text: bytes, offset: int, crop: int
) -> Iterator[str]:
    """offset: of the JPEG in the tar."""
    if label != str(row["label"]).encode():
        yield f"label {label[:20]!r}, the index says {row['label']}"
    if (offset, len(jpeg)) != (row["offset"], row["size"]):
        yield f"lies at {offset} with {len(jpeg)} bytes, the index says otherwise"
    if hashlib.sha256(jpeg).hexdigest() != row["sha256"]:
        yield "another sha256 than in the index"
    if not _agree(text, row):
        yield "its JSON and the index disagree"
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(jpeg)
        if (width, height) != (crop, crop) or colours not in ("YCbCr", "RGB"):
            yield f"is {width}×{height} {colours}, not {crop}×{crop} in colour"
        else:  # not an image of any size that a damaged header claims
            simplejpeg.decode_jpeg(jpeg, strict=True)
    except ValueError as error:
        yield f"cannot be decoded ({error})"


def _agree(text: bytes, row: dict[str, Any]) -> bool:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(document, dict) or not {"key", "label", "wnid"} <= document.keys():
        return False
    row = row | {"fixes": " ".join(row["fixes"])}
    return all(document[name] == row[name] for name in document.keys() & row.keys())
