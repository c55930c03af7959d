"""What an image file claims, and whether its bytes are all there, read from its headers alone.

Nothing is decoded or allocated here, so that absurd claims are refused before they cost anything.
A PNG, GIF, WebP, BMP, TIFF or PPM must be whole up to its end, with every frame, even though only
the first is ever used: half a file was half copied, and nobody knows what else that copy lost.
JPEG has more to tell and a module of its own, `jpegs`.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

# Pillow's own threshold for decompression bombs: 268 MB once decoded. The largest image of
# ImageNet is several times smaller.
MAX_PIXELS = 89_478_485
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First column and row, and the steps between them, of each pass of an interlaced PNG.
_ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
_ADAM7 += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
# INFOHEADER and its extensions, by size; and the old CORE header of OS/2.
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_BMP_PLAIN = (0, 3)  # rows as they are; the same with masks that say which bits are which colour
_PPM = re.compile(  # magic number, width, height, and, but for bitmaps, the largest value
    rb"P(?:(?P<bits>4)|[56])(?:\s+|\s*#[^\n]*\n)+(\d+)(?:\s+|\s*#[^\n]*\n)+(\d+)"
    rb"(?(bits)|(?:\s+|\s*#[^\n]*\n)+(\d+))\s"
)
_PPM_HEADER = 40  # bytes; with numbers of nine digits and no comment it has no more
# Of TIFF 6.0: what Pillow decodes as it is meant, and by itself: libtiff, which it asks for other
# compressions, tells damage to stderr.
_TIFF_COMPRESSIONS = {1: "none", 32773: "PackBits"}
_TIFF_COLOURS = {0: "grey", 1: "grey", 2: "RGB", 3: "palette"}
_TIFF_TYPES = {1: "B", 3: "H", 4: "I"}
_MAX_TIFF_FRAMES = 10_000


class Unusable(Exception):
    """No stored image can come of these bytes. `reason` is one of `transform.REASONS`."""

    def __init__(self, reason: str, detail: object) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = " ".join(str(detail).split())[:200]


class Header(NamedTuple):
    """Of a file that is whole, whose first frame's canvas is within MAX_PIXELS."""

    frames: int = 1
    sixteen_bit: bool = False


def form(raw: bytes) -> str:
    """JPEG, PNG, GIF, WEBP, BMP, TIFF, PPM, HEIF or GZIP by the first bytes, or "" for anything
    else."""
    if raw[4:8] == b"ftyp" and raw[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis"):
        return "HEIF"
    if raw[:1] == b"P" and raw[1:2] in b"123456" and raw[2:3].isspace():
        return "PPM"
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        return "WEBP"
    if raw[:2] == b"BM" and int.from_bytes(raw[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    starts = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"\x1f\x8b": "GZIP"}
    starts |= {b"GIF87a": "GIF", b"GIF89a": "GIF"}
    starts |= dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF")
    return next((name for start, name in starts.items() if raw.startswith(start)), "")


def header(raw: bytes, name: str) -> Header:
    """Of anything but a JPEG or GZIP, according to `form`. Raises Unusable."""
    read = {"PNG": _png, "GIF": _gif, "WEBP": _webp, "BMP": _bmp, "TIFF": _tiff, "PPM": _ppm}
    if name not in read:
        raise Unusable("unsupported", f"{name} is not read; save it as JPEG or PNG")
    try:
        return read[name](raw)
    except (struct.error, IndexError) as error:  # a look behind the last byte
        raise Unusable("truncated", f"{name} ends early, after {len(raw)} bytes") from error


def check_size(width: int, height: int) -> None:
    """Raises Unusable."""
    if width < 1 or height < 1:
        raise Unusable("corrupt", f"claims {width}×{height} pixels")
    if width * height > MAX_PIXELS:
        raise Unusable("too_many_pixels", f"{width}×{height} exceeds {MAX_PIXELS} pixels")


def _png(raw: bytes) -> Header:
    """Pillow neither looks at IDAT's checksums nor minds rows that never came: both count here.

    Layout: PNG specification, third edition, section 5.
    """
    width, height, depth, colour, interlaced = struct.unpack_from(">16x2I2B2xB", raw)
    if raw[12:16] != b"IHDR" or colour not in _PNG_CHANNELS:
        raise Unusable("corrupt", f"PNG begins with {raw[12:16]!r}, colour type {colour}")
    check_size(width, height)
    position, kind, frames, packed = 8, b"", 1, []
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", raw, position)
        body = raw[position + 8 : position + 8 + length]
        (claimed,) = struct.unpack_from(">I", raw, position + 8 + length)
        critical = kind[:1].isupper() or kind == b"tRNS"
        if critical and zlib.crc32(body, zlib.crc32(kind)) != claimed:
            raise Unusable("corrupt", f"PNG chunk {kind!r} at byte {position}: wrong checksum")
        if kind == b"acTL":  # animation
            (frames,) = struct.unpack_from(">I", body)
        elif kind == b"IDAT":
            packed.append(body)
        position += 12 + length
    bits = depth * _PNG_CHANNELS[colour]
    _check_rows(b"".join(packed), _png_bytes(width, height, bits, bool(interlaced)))
    return Header(frames, sixteen_bit=depth == 16)


def _png_bytes(width: int, height: int, bits: int, interlaced: bool) -> int:
    """Of the unpacked rows, each led by its filter's number."""
    num_bytes = 0
    for left, top, right, down in _ADAM7 if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 < rows:
            num_bytes += rows * (1 + (columns * bits + 7) // 8)
    return num_bytes


def _check_rows(packed: bytes, expected: int) -> None:
    unpacking, found, part = zlib.decompressobj(), 0, b""
    try:
        while found < expected and not unpacking.eof and (part or packed):
            part = unpacking.decompress(packed, 1 << 20)
            packed = unpacking.unconsumed_tail
            found += len(part)
    except zlib.error as error:
        raise Unusable("corrupt", error) from error
    if found < expected:
        raise Unusable("truncated", f"PNG holds {found} of {expected} bytes of pixels")


def _gif(raw: bytes) -> Header:
    """Layout: GIF89a specification, sections 18 to 27. A frame may reach beyond the screen."""
    width, height, flags = struct.unpack_from("<6x2HB2x", raw)
    position, frames = 13 + _gif_palette(flags), 0
    while (kind := raw[position]) != 0x3B:  # trailer
        if kind == 0x21:  # extension
            position = _after_gif_blocks(raw, position + 2)
        elif kind == 0x2C:  # frame
            left, top, wide, high, flags = struct.unpack_from("<x4HB", raw, position)
            if not frames:
                width, height = max(width, left + wide), max(height, top + high)
                check_size(width, height)
            frames += 1
            position = _after_gif_blocks(raw, position + 11 + _gif_palette(flags))
        elif kind == 0:  # padding, as some writers leave it
            position += 1
        else:
            raise Unusable("corrupt", f"GIF has a block of unknown kind {kind} at byte {position}")
    if not frames:
        raise Unusable("corrupt", "GIF without an image")
    return Header(frames)


def _gif_palette(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_gif_blocks(raw: bytes, position: int) -> int:
    while size := raw[position]:
        position += 1 + size
    return position + 1


def _webp(raw: bytes) -> Header:
    """Layout: RFC 9649, section 2. libwebp would allocate two whole canvases on opening."""
    (size,) = struct.unpack_from("<I", raw, 4)
    if 8 + size > len(raw):
        raise Unusable("truncated", f"WebP of {8 + size} bytes ends early, after {len(raw)}")
    kind = raw[12:16]
    if kind == b"VP8X":
        canvas = struct.unpack_from("24x3s3s", raw)
        width, height = (int.from_bytes(side, "little") + 1 for side in canvas)
    elif kind == b"VP8L":
        (packed,) = struct.unpack_from("<21xI", raw)
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<26x2H", raw))
    else:
        raise Unusable("corrupt", f"WebP begins with {kind!r}")
    check_size(width, height)
    position, frames = 12, 0
    while position + 8 <= 8 + size:
        kind, length = struct.unpack_from("<4sI", raw, position)
        frames += kind == b"ANMF"
        position += 8 + length + length % 2
    return Header(max(frames, 1))


def _bmp(raw: bytes) -> Header:
    """Layout: BITMAPFILEHEADER and BITMAPINFOHEADER, Windows GDI reference.

    Run lengths may leave pixels out on purpose, so that a cut could not be told: unsupported.
    """
    start, size = struct.unpack_from("<10x2I", raw)
    if size == 12:
        width, height, depth, compression = *struct.unpack_from("<18x2H2xH", raw), 0
    else:
        width, height, depth, compression = struct.unpack_from("<18x2i2xHI", raw)
    height = abs(height)  # negative: from top to bottom
    check_size(width, height)
    if depth not in (1, 4, 8, 16, 24, 32) or compression not in _BMP_PLAIN:
        raise Unusable("unsupported", f"BMP of {depth} bits with compression {compression}")
    expected = start + (width * depth + 31) // 32 * 4 * height
    if expected > len(raw):
        raise Unusable("truncated", f"BMP of {expected} bytes ends early, after {len(raw)}")
    return Header()


def _ppm(raw: bytes) -> Header:
    """Layout: ppm(5), pgm(5) and pbm(5) of Netpbm, the binary kinds."""
    if raw[1:2] in b"123":
        raise Unusable("unsupported", "PPM whose pixels are text")
    found = _PPM.match(raw)
    if found is None:
        reason = "truncated" if len(raw) < _PPM_HEADER else "corrupt"
        raise Unusable(reason, f"PPM begins with {raw[:16]!r}")
    if any(len(digits or b"") > 9 for digits in found.group(2, 3, 4)):
        raise Unusable("too_many_pixels", "PPM claims a number of ten digits or more")
    width, height, highest = (int(digits or 1) for digits in found.group(2, 3, 4))
    check_size(width, height)
    if not 1 <= highest < 1 << 16:
        raise Unusable("corrupt", f"PPM claims values up to {highest}")
    row = (width + 7) // 8 if found["bits"] else width * (3 if raw[1:2] == b"6" else 1)
    expected = found.end() + height * row * (2 if highest > 255 else 1)
    if expected > len(raw):
        raise Unusable("truncated", f"PPM of {expected} bytes ends early, after {len(raw)}")
    return Header(sixteen_bit=highest > 255)


def _tiff(raw: bytes) -> Header:
    """Layout: TIFF 6.0, sections 2 and 3; every strip or tile of every frame must be there."""
    if raw[2:3] == b"+" or raw[3:4] == b"+":
        raise Unusable("unsupported", "BigTIFF")
    order = "<" if raw[:1] == b"I" else ">"
    (place,) = struct.unpack_from(f"{order}4xI", raw)
    bits: list[tuple[int, ...]] = []  # of each frame
    while place:
        fields, place = _tiff_fields(raw, order, place)
        _check_tiff(raw, fields)
        bits.append(fields.get(258, (1,)))
        if len(bits) > _MAX_TIFF_FRAMES:
            raise Unusable("corrupt", f"TIFF of more than {_MAX_TIFF_FRAMES} frames")
    if not bits:
        raise Unusable("corrupt", "TIFF without an image")
    return Header(len(bits), sixteen_bit=16 in bits[0])


def _tiff_fields(raw: bytes, order: str, place: int) -> tuple[dict[int, tuple[int, ...]], int]:
    """The whole numbers of a directory by tag, and where the next directory lies, or 0."""
    (count,) = struct.unpack_from(f"{order}H", raw, place)
    fields: dict[int, tuple[int, ...]] = {}
    for at in range(place + 2, place + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", raw, at)
        if kind in _TIFF_TYPES and 1 <= number <= len(raw):
            form = f"{order}{number}{_TIFF_TYPES[kind]}"
            inside = struct.calcsize(form) <= 4
            start = at + 8 if inside else struct.unpack_from(f"{order}I", raw, at + 8)[0]
            fields[tag] = struct.unpack_from(form, raw, start)
    return fields, struct.unpack_from(f"{order}I", raw, place + 2 + 12 * count)[0]


def _check_tiff(raw: bytes, fields: dict[int, tuple[int, ...]]) -> None:
    width, height = fields.get(256, (0,))[0], fields.get(257, (0,))[0]
    check_size(width, height)
    compression, colour = fields.get(259, (1,))[0], fields.get(262, (-1,))[0]
    bits, samples = set(fields.get(258, (1,))), fields.get(277, (1,))[0]
    kinds = set(fields.get(339, (1,)))
    plain = compression in _TIFF_COMPRESSIONS and colour in _TIFF_COLOURS and kinds == {1}
    if not plain or bits not in ({1}, {8}, {16}) or samples > 4:
        told = f"compression {compression}, colour {colour}, {samples} samples of {sorted(bits)}"
        raise Unusable("unsupported", f"TIFF with {told} bits, kind {sorted(kinds)}")
    starts = fields.get(273, fields.get(324, ()))
    sizes = fields.get(279, fields.get(325, ()))
    if not starts or len(starts) != len(sizes):
        raise Unusable("corrupt", f"TIFF of {len(starts)} strips with {len(sizes)} sizes")
    end = max(start + size for start, size in zip(starts, sizes, strict=True))
    expected = height * ((width * samples * max(bits) + 7) // 8)
    if end > len(raw) or (compression == 1 and sum(sizes) < expected):
        raise Unusable("truncated", f"TIFF of {max(end, expected)} bytes has {len(raw)}")
