"""Where the members of a tar lie, found by reading its headers only: nothing is extracted.

A member of a tar inside a tar lies at the outer member's data offset plus its own, so one byte
range of the outer file is the picture. `tarfile` ends quietly at a cut or overwritten archive;
here every archive must be whole up to its end mark, or it is refused.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from typing import Any, BinaryIO

from alexnet.errors import UserError
from pipelines import storage

_BLOCK = 512
_MAX_PADDING = 1 << 20  # tar pads to 10 KiB; more than this after the end mark is lost data
_HEADER_READ = 4096  # bytes per request: one header and what precedes it, not the picture


@dataclass(frozen=True)
class Member:
    name: str  # without folders
    offset: int  # of the first data byte, from the start of the file
    size: int


def members(uri: str, label: str, within: Member | None = None) -> list[Member]:
    """The regular files of the tar at `uri`, or of the tar that is its member `within`.

    `label` names the archive in errors. Raises UserError for anything that is no whole,
    uncompressed tar, and for links and devices; folders are passed over.
    """
    start, length = (within.offset, within.size) if within else (0, storage.size(uri))
    file: BinaryIO = io.BufferedReader(RangeFile(uri, start, length), _HEADER_READ)
    found = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                if not info.isreg():
                    raise UserError(f"{label}: {info.name} is a link or device, not a picture")
                if (end := info.offset_data + info.size) > length:
                    raise UserError(
                        f"{label} is cut: {info.name} ends at byte {end:,}, the archive at "
                        f"{length:,}; fetch it again"
                    )
                name = info.name.rsplit("/", 1)[-1]
                found.append(Member(name, start + info.offset_data, info.size))
            _check_end(file, label, tar.offset, length)
    except tarfile.TarError as error:
        raise UserError(f"{label} is no uncompressed tar ({error}); fetch it again") from error
    return found


def _check_end(file: BinaryIO, label: str, end: int, length: int) -> None:
    """After the last member there must be zeros, at least one block and little more."""
    end = min(end, length)
    rest = length - end
    if rest < _BLOCK:
        raise UserError(
            f"{label} is cut: it ends at byte {length:,} without the end mark of a tar; "
            "fetch it again"
        )
    file.seek(end)
    if rest > _MAX_PADDING or file.read(rest).strip(b"\0"):
        raise UserError(
            f"{label} is damaged: no valid member at byte {end:,}, but {rest:,} bytes follow; "
            "fetch it again"
        )


class RangeFile(io.RawIOBase):
    """Bytes [start, start + length) of a stored file as a seekable file."""

    def __init__(self, uri: str, start: int, length: int) -> None:
        self._uri, self._start, self._length = uri, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._length - self._position)
        if wanted <= 0:
            return 0
        data = storage.read(self._uri, self._start + self._position, wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
