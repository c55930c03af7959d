"""Decoded images on a node's disk: each is decoded once, by whichever worker is the first to need
it, and read by all of them from then on, in the next run too.

home()/cache/decoded/SPLIT is of one shard set:

    header  a page of JSON: whose images these are, in which boot they were written, "clean"
    marks   a byte for each sample: 1 once its pixels are whole
    pixels  a row for each sample by its id, uint8 (H,W,3); the file takes disk as rows are written

What is believed. A mark is written after the pixels, and both go to the page cache, which outlives
the process that wrote them, SIGKILL or not, and shows all processes of a machine the same bytes: as
long as it runs, marked pixels are whole. At a power cut it does not: pages reach the disk in any
order. So after another boot marks count only where the last process to leave had synced the file
and then called it clean; the next to enter takes that word back, synced too, before it writes.

Rows begin at pages, so that no two writers share one and a read fetches no neighbour's bytes. They
are read with `pread` for the reasons in shard_files.py; a full disk, too, is then an error and no
signal, and no process maps 200 GB. A claim is a flock: shared by whoever uses the file, alone to
prepare it or to call it clean.
"""

import fcntl
import json
import logging
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import Manifest
from training.order import Ids
from training.shard_cache import lock_alone

logger = logging.getLogger("training")

_PAGE = 4096  # bytes: of the header too


class Decoded:
    """The open file of one split; its methods may be called from any thread. See `open_decoded`."""

    def __init__(
        self, path: Path, handle: int, header: dict[str, Any], layout: "_Layout", places: int
    ) -> None:
        """places: images are kept of the samples below this id."""
        self._path, self._handle, self._header = path, handle, header
        self._layout, self._places = layout, places
        marks = np.frombuffer(mmap.mmap(handle, layout.pixels, prot=mmap.PROT_READ), np.uint8)
        self._marks = marks[_PAGE : _PAGE + layout.samples]

    def holds(self, ids: Ids) -> NDArray[np.bool_]:
        """bool (B,): whose pixels are whole. True stays True."""
        return np.equal(self._marks[ids], 1)

    def read(self, ids: Ids, out: np.ndarray) -> Ids:
        """Fills `out`, uint8 (B,H,W,3), with the images of `ids` that are here; the places of the
        others in it. Raises UserError where the file was cut short under the run."""
        here = self.holds(ids)
        for place in np.flatnonzero(here).tolist():
            pixels = out[place]
            if os.preadv(self._handle, [pixels], self._offset(int(ids[place]))) != pixels.nbytes:
                raise UserError(f"{self._path} was cut short under the run; start it again")
        return np.flatnonzero(~here)

    def keep(self, sample: int, pixels: np.ndarray) -> None:
        """pixels: uint8 (H,W,3), C-contiguous. A disk that is full meanwhile ends the keeping."""
        if sample >= self._places:
            return
        try:
            written = os.pwrite(self._handle, pixels.data, self._offset(sample))
            if written == pixels.nbytes:  # or the disk became full within them
                os.pwrite(self._handle, b"\1", _PAGE + sample)
        except OSError as error:
            places, self._places = self._places, 0
            if places:  # once, though all threads meet it
                logger.warning(f"{self._path}: {error.strerror}; the rest is decoded every epoch")

    def _offset(self, sample: int) -> int:
        return self._layout.pixels + sample * self._layout.row

    def close(self) -> None:
        """The last to leave syncs the file and calls it clean."""
        if lock_alone(self._handle):
            try:
                os.fsync(self._handle)
                _write_header(self._handle, self._header | {"clean": True})
            except OSError as error:  # pixels that the disk did not take may be marked
                logger.warning(f"{self._path}: {error.strerror}; it is emptied")
                os.ftruncate(self._handle, 0)
        fcntl.flock(self._handle, fcntl.LOCK_UN)  # which the map's own descriptor would keep
        os.close(self._handle)


def open_decoded(manifest: Manifest, split: str, limit_gb: float | None) -> Decoded | None:
    """The node's file of this split, made, or rebuilt where it is not of this set; None, with a
    line, while another run uses it for other images. limit_gb: of both splits, in proportion.

    Raises UserError for a place that cannot be used.
    """
    path, layout = folder() / split, _Layout(manifest.num_samples(split), manifest.crop)
    header = {"of": _identity(manifest, split), "boot": _boot(), "clean": False}
    share = needed_bytes(manifest, limit_gb) / needed_bytes(manifest, None)
    try:
        handle = _open_own(path)
        if _claimed(handle, header, layout.size, path):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # rows are read in no order
            return Decoded(path, handle, header, layout, int(layout.samples * share))
        os.close(handle)
    except OSError as error:
        raise UserError(
            f"decoded images: {path}: {error.strerror}; set ALEXNET_HOME to a local disk of your "
            "own, or pass --cache none"
        ) from error
    logger.warning(f"{path} is in use for other images, or by another machine: it is not used")
    return None


def folder() -> Path:
    return storage.home() / "cache" / "decoded"


def needed_bytes(manifest: Manifest, limit_gb: float | None) -> int:
    """Of disk, for the images of all splits within the limit."""
    counts = (manifest.num_samples(split) for split in ("train", "val"))
    wanted = sum(_Layout(count, manifest.crop).size for count in counts)
    return wanted if limit_gb is None else min(wanted, round(limit_gb * 1e9))


def kept_bytes() -> int:
    """Of disk that the files here take already."""
    return sum(path.lstat().st_blocks * 512 for path in folder().glob("*"))


@dataclass(frozen=True)
class _Layout:
    samples: int
    side: int

    @property
    def row(self) -> int:
        """Bytes from one image to the next."""
        return _pages(3 * self.side**2)

    @property
    def pixels(self) -> int:
        """Bytes before the first image."""
        return _PAGE + _pages(self.samples)

    @property
    def size(self) -> int:
        return self.pixels + self.samples * self.row


def _identity(manifest: Manifest, split: str) -> dict[str, Any]:
    """What decides every byte of the pixels."""
    return {
        "manifest": manifest.digest,
        "split": split,
        "crop": manifest.crop,
        "samples": manifest.num_samples(split),
        "decoder": simplejpeg.__version__,
    }


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE


def _open_own(path: Path) -> int:
    """A descriptor of a file that nobody else can have written, made where there is none."""
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    inside = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        handle = os.open(path.name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=inside)
        for opened in (inside, handle):
            status = os.fstat(opened)
            if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
                os.close(handle)
                raise PermissionError(1, "others can write it")
        return handle
    finally:
        os.close(inside)


def _claimed(handle: int, header: dict[str, Any], size: int, path: Path) -> bool:
    """True when the file is what `header` says, and locked; False where others use it."""
    while True:
        if lock_alone(handle):
            _prepare(handle, header, size, path)
        fcntl.flock(handle, fcntl.LOCK_SH)  # waits for one who prepares it
        found = _read_header(handle)
        if found is not None and not found["clean"]:
            return found == header
        fcntl.flock(handle, fcntl.LOCK_UN)  # it died at that, or the last user left just now


def _prepare(handle: int, header: dict[str, Any], size: int, path: Path) -> None:
    found, there = _read_header(handle), os.fstat(handle).st_size
    why = _unusable(found, header) or (f"has {there} bytes of {size}" if there != size else "")
    if why:
        if there:
            logger.warning(f"decoded images: {path} {why}; it is rebuilt")
        os.ftruncate(handle, 0)
        os.ftruncate(handle, size)
    _write_header(handle, header)


def _unusable(found: dict[str, Any] | None, header: dict[str, Any]) -> str:
    """Why; "" where it can be used."""
    if found is None:
        return "has no valid header"
    was, now = found["of"], header["of"]
    for key in ("crop", *now):
        if was.get(key) != now[key]:
            return f"is of another shard set ({key} {was.get(key)}, now {now[key]})"
    if not found["clean"] and (found["boot"] != header["boot"] or not header["boot"]):
        return "was not closed before the machine started anew"
    return ""


def _read_header(handle: int) -> dict[str, Any] | None:
    try:
        found = json.loads(os.pread(handle, _PAGE, 0).rstrip(b"\0"))
    except ValueError:
        return None
    whole = isinstance(found, dict) and found.keys() == {"of", "boot", "clean"}
    return found if whole and isinstance(found["of"], dict) else None


def _write_header(handle: int, header: dict[str, Any]) -> None:
    """Synced: what is written after it reaches the disk after it."""
    os.pwrite(handle, json.dumps(header).encode().ljust(_PAGE, b"\0"), 0)
    os.fsync(handle)


def _boot() -> str:
    """The machine's present boot; "" where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
