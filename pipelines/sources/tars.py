"""Where the members of a tar lie, found by reading its headers only: nothing is extracted.

A member of a tar inside a tar lies at the outer member's data offset plus its own, so one byte
range of the outer file is the image. Headers are read here, not by `tarfile`, which ends quietly
at a cut or overwritten archive and needs a tenth of a millisecond for each: every archive must be
whole up to its end mark, or it is refused with the place of the damage.

The format is POSIX.1-2001 ustar and pax, with GNU's long names and big numbers; a name as it
stands in the archive, with its folders, is never used as a path of this machine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from alexnet.errors import UserError
from pipelines import storage

MEMBERS = pa.schema(
    [
        ("name", pa.string()),  # with its folders
        ("offset", pa.int64()),  # of the first data byte, from the start of the file
        ("size", pa.int64()),
    ]
)
_BLOCK = 512
_MAX_PADDING = 1 << 20  # tar pads to 10 KiB; more than this after the end mark is lost data
_MAX_EXTENSION = 1 << 20  # bytes of a long name, a pax record or a member that is read
_LOCAL_READ = 4096  # bytes per read: one header, not the image behind it
# On S3 a request takes as long as reading a few hundred kB: where headers lie closer together
# than that, what lies between is read too, in ever larger pieces.
_S3_READ, _S3_LARGEST_READ, _S3_NEAR = 1 << 16, 1 << 22, 1 << 18
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_REGULAR, _FOLDER, _SPARSE = (b"0", b"\0", b"7"), b"5", b"S"
_OCTAL = re.compile(rb"[ 0-7]*")
_MAX_DIGITS = 20  # of a number in a pax record; 2**64 has as many
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", (b"x", b"X"), b"g"
Passed = Callable[[int, int], None]  # takes members and bytes got past


def members(
    uri: str,
    label: str,
    start: int = 0,
    length: int | None = None,
    passed: Passed = lambda members, num_bytes: None,
    read: str | None = None,
) -> pa.Table:
    """The regular files of the tar at bytes [start, start + length) of `uri`, in its order.

    A table of `MEMBERS`; with `read`, a regex of names, also a column `data`: the bytes of those
    members that it finds, of at most 1 MiB each, else null. `label` names the archive in errors.
    Raises UserError for anything that
    is no whole, uncompressed tar, for links, devices and sparse files, for names that are
    absolute, hold ".." or appear twice; folders are passed over.
    """
    length = storage.size(uri) - start if length is None else length
    window = _Window(uri, start, length)
    _check_beginning(window, label)
    found, contents = [], []
    for header in _walk(window, label, length, passed):
        found.append(header)
        if read is not None:
            wanted = header.size <= _MAX_EXTENSION and re.search(read, header.name)
            contents.append(window.get(header.data, header.size) if wanted else None)
    names = [header.name for header in found]
    if not names:
        raise _unsound(f"{label} holds no file")
    if len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise _unsound(f"{label} holds {twice} twice")
    columns = [names, [start + header.data for header in found], [header.size for header in found]]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, MEMBERS, strict=True)], MEMBERS)
    return table if read is None else table.append_column("data", pa.array(contents, pa.binary()))


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    size: int
    kind: bytes
    data: int  # where the member's bytes begin


def _walk(window: _Window, label: str, length: int, passed: Passed) -> Iterator[_Header]:
    position, common, extra = 0, dict[str, str](), dict[str, str]()
    while (block := window.get(position, _BLOCK)).count(0) != len(block):
        header = _parse(block, label, position, length)
        kind, data = header.kind, header.data
        if kind == _PAX_GLOBAL:
            common |= _extension(window, label, header, length)
        elif kind in (_LONG_NAME, _LONG_LINK, *_PAX):
            extra |= _extension(window, label, header, length)
        else:
            header = _extended(header, common | extra, label)
            extra = {}
            _check(header, label, length)
            if kind in _REGULAR and not header.name.endswith("/"):
                yield header
        after = data + -(-header.size // _BLOCK) * _BLOCK
        passed(int(kind in _REGULAR), after - position)
        position = after
    _check_end(window, label, position, length)


def _check_beginning(window: _Window, label: str) -> None:
    block = window.get(0, _BLOCK)
    if not block:
        raise _unsound(f"{label} is empty (0 bytes)")
    for magic, (form, command) in _COMPRESSED.items():
        if block.startswith(magic):
            raise UserError(
                f"{label} is {form}-compressed; {command} it first: byte ranges need it plain"
            )
    if block.lstrip()[:1] == b"<" and b"\0" not in block:
        raise UserError(f"{label} is an HTML or XML page, not a tar; log in and fetch it again")
    if len(block) < _BLOCK:
        raise _unsound(f"{label} is truncated: it has {len(block)} bytes")
    if not _sums_up(block) and block.count(0) != _BLOCK:
        raise _unsound(f"{label} is not an uncompressed tar")


def _parse(block: bytes, label: str, position: int, length: int) -> _Header:
    try:
        if len(block) < _BLOCK:
            raise _unsound(f"{label} is truncated: it ends at byte {length:,} without an end mark")
        if not _sums_up(block):
            raise ValueError("checksum")
        size = _number(block[124:136])
    except ValueError as error:
        raise _unsound(
            f"{label} is damaged: no valid member at byte {position:,} ({error}), but "
            f"{length - position:,} bytes follow"
        ) from error
    if block[156:157] == _FOLDER:
        size = 0  # no data follows, whatever the field says (POSIX.1-2001, pax, typeflag 5)
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    kind = block[156:157]
    return _Header(name.decode("utf-8", "replace"), size, kind, position + _BLOCK)


def _sums_up(block: bytes) -> bool:
    field = block[148:156]
    try:
        wanted = _number(field)
    except ValueError:
        return False
    total = sum(block) - sum(field) + len(field) * ord(" ")
    if total == wanted:
        return True
    # Some old tars added the bytes as signed numbers.
    return total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]) == wanted


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: binary, for what octal digits can't hold
        if field[0] != 0x80:
            raise ValueError("a negative number")
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0]
    if not _OCTAL.fullmatch(digits):  # int() would take a sign, and walk backwards for ever
        raise ValueError("a number that is not octal")
    return int(digits.strip() or b"0", 8)


def _extension(window: _Window, label: str, header: _Header, length: int) -> dict[str, str]:
    """What a long name or pax record says about the next member."""
    if header.size > _MAX_EXTENSION or header.data + header.size > length:
        raise _unsound(
            f"{label} is damaged or truncated: a name of {header.size:,} bytes at {header.data:,}"
        )
    data = window.get(header.data, header.size)
    if header.kind in (_LONG_NAME, _LONG_LINK):
        text = data.partition(b"\0")[0].decode("utf-8", "replace")
        return {"path": text} if header.kind == _LONG_NAME else {}
    records = {}
    position, last = 0, len(data.rstrip(b"\0"))
    while position < last:
        blank = data.find(b" ", position, position + _MAX_DIGITS)
        digits = data[position : max(blank, position)]
        end = position + (int(digits) if digits.isdigit() else 0)
        key, equals, value = data[blank + 1 : end - 1].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            raise _unsound(f"{label} is damaged: a pax record at byte {header.data:,}")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        position = end
    return records


def _extended(header: _Header, said: dict[str, str], label: str) -> _Header:
    if not said:
        return header
    sparse = any(key.startswith("GNU.sparse.") for key in said)
    size = said.get("size", "")
    known = size.isascii() and size.isdecimal() and len(size) <= _MAX_DIGITS
    if size and not known:
        raise _unsound(f"{label} is damaged: a pax record says size {size[:40]}")
    return _Header(
        said.get("path", header.name),
        int(size) if known else header.size,
        _SPARSE if sparse else header.kind,
        header.data,
    )


def _check(header: _Header, label: str, length: int) -> None:
    name = header.name if header.name.isprintable() else repr(header.name)
    end = header.data + header.size
    if header.kind == _SPARSE:
        raise UserError(f"{label}: {name} is stored sparse; pack it again without --sparse")
    if header.kind not in (*_REGULAR, _FOLDER):
        raise UserError(f"{label}: {name} is a link or device, not an image")
    if header.name.startswith("/") or ".." in header.name.split("/"):
        raise _unsound(f"{label}: {name} is an absolute path or holds '..'")
    if header.kind in _REGULAR and header.name.endswith("/") and header.size:
        raise _unsound(f"{label} is damaged: {name} is a folder with data")
    if end > length:
        raise _unsound(
            f"{label} is truncated: {name} ends at byte {end:,}, the archive at {length:,}"
        )


def _check_end(window: _Window, label: str, end: int, length: int) -> None:
    """After the last member there must be zeros, at least one block and little more."""
    rest = length - end
    if rest < _BLOCK:
        raise _unsound(f"{label} is truncated: it ends at byte {length:,} without an end mark")
    if rest > _MAX_PADDING or window.get(end, rest).count(0) != rest:
        raise _unsound(
            f"{label} is damaged: no valid member at byte {end:,} but an end mark, and {rest:,} "
            "bytes follow"
        )


def _unsound(text: str) -> UserError:
    return UserError(f"{text}; fetch it again")


class _Window:
    """Bytes of a part of a stored file, read in pieces that suit the distance between headers."""

    def __init__(self, uri: str, start: int, length: int) -> None:
        self._uri, self._start, self._length = uri, start, length
        remote = storage.is_s3(uri)
        self._least, self._most, self._near = (
            (_S3_READ, _S3_LARGEST_READ, _S3_NEAR) if remote else (_LOCAL_READ, _LOCAL_READ, -1)
        )
        self._piece = self._least
        self._begin, self._data = 0, b""

    def get(self, position: int, size: int) -> bytes:
        """Fewer bytes only where the part ends."""
        size = min(size, self._length - position)
        if size <= 0:
            return b""
        offset = position - self._begin
        if offset < 0 or offset + size > len(self._data):
            near = 0 <= offset - len(self._data) <= self._near and self._data
            self._piece = min(2 * self._piece, self._most) if near else self._least
            wanted = min(max(size, self._piece), self._length - position)
            self._data = storage.read(self._uri, self._start + position, wanted)
            self._begin, offset = position, 0
        return self._data[offset : offset + size]
