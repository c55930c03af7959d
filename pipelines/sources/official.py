"""The published ILSVRC archives: names, bytes, MD5 sums and numbers of images.

Sources. MD5 sums of 2012: torchvision's datasets/imagenet.py (train, val, devkit) and the download
page of image-net.org as many repositories quote it (test). Bytes: train and val as several
downloaders check them, and as the server's Content-Length. Numbers of images of 2012:
torchvision's prototype builder; of 2010: readme.txt of its devkit. What no two sources agree on
is left out: the bytes of the test archive and of the devkits, bytes and sums of 2010.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import storage
from pipelines.sources import devkit
from pipelines.sources.index import Meter

_PIECE = 8 << 20  # bytes per read while hashing
_AHEAD = 4  # reads under way


@dataclass(frozen=True)
class Published:
    md5: str
    size: int | None = None  # bytes


ARCHIVES = {
    "ILSVRC2012_img_train.tar": Published("1d675b47d978889d74fa0da5fadfb00e", 147_897_477_120),
    "ILSVRC2012_img_val.tar": Published("29b22e2961454d5413ddabcf34fc5622", 6_744_924_160),
    "ILSVRC2012_img_test_v10102019.tar": Published("e1b8681fff3d63731c599df9b4b6fc02"),
    "ILSVRC2012_devkit_t12.tar.gz": Published("fa75699e90414af021442c21a62c3abf"),
}
IMAGES = {
    2012: {"train": 1_281_167, "val": 50_000, "test": 100_000},
    2010: {"train": 1_261_406, "val": 50_000, "test": 150_000},
}
_MEND = "fetch it again, or pass --partial when it is meant to be another set"


def announces_published(kit: devkit.Devkit) -> bool:
    """Whether a devkit describes the published set, not one that was drawn or cut."""
    counts = IMAGES[kit.year]
    return (sum(kit.train_images.values()), len(kit.val_wnids)) == (counts["train"], counts["val"])


def check_sizes(raw: str, files: dict[str, int], used: Sequence[str]) -> None:
    """Raises UserError for an archive that has not the bytes of the published one."""
    for name in used:
        published = ARCHIVES.get(name)
        if published and published.size not in (None, files[name]):
            raise UserError(
                f"{storage.join(raw, name)} has {files[name]:,} bytes, the published one "
                f"{published.size:,}; {_MEND}"
            )


def check_counts(raw: str, year: int, table: pa.Table, used: dict[str, str]) -> None:
    """Raises UserError for a split (key of `used`; value: its archive) of another length."""
    for split, name in used.items():
        found = int(pc.sum(pc.equal(table["split"], split)).as_py() or 0)
        if found != (expected := IMAGES[year][split]):
            raise UserError(
                f"{storage.join(raw, name)} holds {found:,} images, the published one "
                f"{expected:,}; {_MEND}"
            )


def is_official(files: dict[str, int], used: Sequence[str], kit: devkit.Devkit | None) -> bool:
    """True when each archive's published size is known and met; no devkit contradicts it."""
    sizes = all(name in ARCHIVES and ARCHIVES[name].size == files[name] for name in used)
    return sizes and (kit is None or announces_published(kit))


def verify_md5(raw: str, files: dict[str, int]) -> list[str]:
    """Read every archive in `files` (name relative to RAW to bytes) whose MD5 sum is known.

    Prints how far it is; returns one line per archive. Raises UserError for another sum, and when
    there is no archive with a known one.
    """
    known = [name for name in ARCHIVES if name in files]
    if not known:
        raise UserError(
            f"--verify-md5: {raw} holds no archive with a published MD5 sum (those of "
            f"{', '.join(ARCHIVES)} are known); leave the flag out"
        )
    lines = []
    for name in known:
        uri, expected = storage.join(raw, name), ARCHIVES[name].md5
        found = _md5(uri, files[name])
        if found != expected:
            raise UserError(
                f"{uri} has MD5 {found}, the published one {expected}; fetch it again or leave "
                "out --verify-md5"
            )
        lines.append(f"{name}: MD5 {found} as published ({files[name]:,} bytes)")
    return lines


def _md5(uri: str, size: int) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with Meter(f"MD5 of {uri}", size) as meter:
        for piece in _pieces(uri, size):
            digest.update(piece)
            meter.add(0, len(piece))
    return digest.hexdigest()


def _pieces(uri: str, size: int) -> Iterator[bytes]:
    """All bytes in order, the next reads under way while one is hashed."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        reads: list[Future[bytes]] = []
        for offset in range(0, size, _PIECE):
            reads.append(pool.submit(storage.read, uri, offset, min(_PIECE, size - offset)))
            if len(reads) > _AHEAD:
                yield reads.pop(0).result()
        for read in reads:
            yield read.result()
