"""JPEG, strictly: what the markers say, and the pixels only if every one of them was in the file.

simplejpeg (TurboJPEG) decodes, 1.3 times as fast as Pillow, and reports libjpeg's first warning,
which Pillow hides. A few warnings say nothing against the pixels; then a mended copy, in which
their cause is gone, must decode without any. Layouts: ITU-T T.81, annex B; Adobe technical note
5116 for APP14.

Two kinds of loss go without a warning and are looked for here: whole scans that are missing, and
everything in arithmetic-coded data, whose decoder goes on with zeros by design (so: unsupported).
What follows the end mark, such as the later images of an MPO, is not looked at.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from pipelines.transform.headers import Unusable, check_size

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

# A block of 64 samples takes at least one bit, and at least half of them are at full resolution.
MAX_PIXELS_PER_BYTE = 1024
MAX_SCANS = 100  # libjpeg's own progressions have 10; each costs a pass over the whole image
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_APP0, _APP1, _APP2, _APP14 = 0xE0, 0xE1, 0xE2, 0xEE
# The next marker that ends a header segment or a scan: no stuffed zero, no restart.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
_MAX_MENDS = 8
_BAND = 256  # rows
_CONTINUED = bytes(167 * i % 255 for i in range(1, 255))  # no marker among them


@dataclass(frozen=True)
class Frame:
    """components: their ids; adobe_transform: None without an Adobe marker;
    exif: the Exif segment without its name; several: an MPO's list of images is present."""

    progressive: bool
    width: int
    height: int
    components: tuple[int, ...]
    adobe_transform: int | None
    exif: bytes
    several: bool
    whole_scan: bool  # sequential, and the first scan holds all components


def read(raw: bytes) -> Frame:
    """The header up to the first scan of a file that begins like a JPEG. Raises Unusable."""
    frame, transform, exif, several = None, None, b"", False
    for marker, start, end in _segments(raw):
        body = raw[start + 4 : end]
        if marker in _FRAMES and frame is None:
            frame = _frame(marker, body)
        elif marker == _APP1 and body.startswith(b"Exif\0\0"):
            exif += body[6:]
        elif marker == _APP2:
            several |= body.startswith(b"MPF\0")
        elif marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
            transform = body[11]
        elif marker == _END or (marker == _SCAN and frame is None):
            raise Unusable("corrupt", "JPEG without an image")
        elif marker == _SCAN and frame:
            sequential, width, height, ids = frame
            if width * height > MAX_PIXELS_PER_BYTE * len(raw):
                raise Unusable("truncated", f"{len(raw)} bytes cannot hold {width}×{height} pixels")
            whole = sequential and body[:1] == bytes([len(ids)])
            return Frame(not sequential, width, height, ids, transform, exif, several, whole)
    raise Unusable("truncated", f"JPEG ends in its header, after {len(raw)} bytes")


def decode(raw: bytes, frame: Frame) -> tuple[Pixels, set[str]]:
    """uint8 (H, W, 3) RGB, or (H, W, 4) with any fourth, and the fixes. Raises Unusable."""
    if not frame.whole_scan:
        _check_scans(raw, frame)
    fixes = set()
    # RGB with a fourth byte each, as Pillow keeps it and without which both resizing and encoding
    # would unpack and pack; or CMYK as stored.
    wanted = "CMYK" if len(frame.components) == 4 else "RGBX"
    for _ in range(_MAX_MENDS):
        try:
            pixels = np.asarray(simplejpeg.decode_jpeg(raw, colorspace=wanted), dtype=np.uint8)
            break
        except ValueError as error:  # libjpeg's first warning or error
            said = str(error)
            if "subsampling level" in said:
                pixels = _decode_unusual(raw, frame)
                break
            raw = _mended(raw, said, frame)
            fixes.add("jpeg_warning_ignored")
    else:
        raise Unusable("corrupt", said)
    if len(frame.components) == 4:
        fixes.add("ycck" if frame.adobe_transform else "cmyk")
        # Adobe stores inks inverted. Without its marker nothing says whether they are, and Pillow,
        # Chromium and Firefox all take them as inverted too.
        size = (pixels.shape[1], pixels.shape[0])
        pixels = to_rgb(Image.frombytes("CMYK", size, pixels.tobytes(), "raw", "CMYK;I"))
    elif len(frame.components) == 1:
        fixes.add("grey")
    return pixels, fixes


def _segments(raw: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, its first byte's position, the position behind its segment), to the end mark."""
    position = 2
    while found := _MARKER.search(raw, position):
        start, marker = found.start(), raw[found.end() - 1]
        if marker == _END:
            yield marker, start, start + 2
            return
        if marker == _START:
            raise Unusable("corrupt", f"JPEG starts again at byte {start}")
        length = int.from_bytes(raw[start + 2 : start + 4], "big")
        position = start + 2 + length
        if position > len(raw) or start + 4 > len(raw):
            raise Unusable("truncated", f"JPEG ends in a segment, after {len(raw)} bytes")
        if length < 2:
            raise Unusable("corrupt", f"JPEG segment of {length} bytes at byte {start}")
        yield marker, start, position


def _frame(marker: int, body: bytes) -> tuple[bool, int, int, tuple[int, ...]]:
    """(sequential, width, height, ids of the components) from the body of a SOF segment."""
    try:
        depth, height, width, count = struct.unpack_from(">B2HB", body)
    except struct.error as error:
        raise Unusable("corrupt", "JPEG frame header too short") from error
    if marker not in (_BASELINE, _EXTENDED, _PROGRESSIVE):
        raise Unusable("unsupported", f"JPEG of kind SOF{marker - 0xC0}: lossless or arithmetic")
    if depth != 8 or count not in (1, 3, 4):
        raise Unusable("unsupported", f"JPEG with {count} components of {depth} bits")
    check_size(width, height)
    if len(body) != 6 + 3 * count:
        raise Unusable("corrupt", f"JPEG frame header of {len(body)} bytes")
    return marker != _PROGRESSIVE, width, height, tuple(body[6::3])


def _check_scans(raw: bytes, frame: Frame) -> None:
    """Each of the 64 coefficients of each component must have come, down to its last bit."""
    missing = {component: np.full(64, 99) for component in frame.components}  # bits still to come
    scans = [raw[start + 4 : end] for marker, start, end in _segments(raw) if marker == _SCAN]
    if len(scans) > MAX_SCANS:
        raise Unusable("unsupported", f"JPEG with {len(scans)} scans, more than {MAX_SCANS}")
    for body in scans:
        count = body[0] if body else 0
        if len(body) != 4 + 2 * count:
            raise Unusable("corrupt", f"JPEG scan header of {len(body)} bytes")
        first, last, bits = (body[-3], body[-2], body[-1] & 15) if frame.progressive else (0, 63, 0)
        for component in body[1:-3:2]:
            if component in missing:
                missing[component][first : last + 1] = bits
    if late := [component for component, bits in missing.items() if bits.any()]:
        raise Unusable("truncated", f"JPEG lacks scans of component {late[0]}")


def _mended(raw: bytes, said: str, frame: Frame) -> bytes:
    """A copy without what libjpeg complained about, and with the same pixels.

    Raises Unusable where data was missing or wrong, so that a part would have been invented.
    """
    if "premature end" in said.lower():
        raise Unusable("truncated", said)
    if stray := _STRAY.search(said):
        return _without_stray(raw, int(stray[1]), int(stray[2], 16))
    mended = bytearray(raw)
    for marker, start, end in _segments(raw):
        if "JFIF revision" in said and marker == _APP0 and raw[start + 4 : end][:4] == b"JFIF":
            mended[start + 9] = 1
        if "Adobe color transform" in said and marker == _APP14:
            mended[start + 15] = 2 if len(frame.components) == 4 else 1  # as libjpeg assumes
        if "Invalid SOS parameters" in said and marker == _SCAN:
            mended[end - 3 : end] = 0, 63, 0  # what a sequential image has anyway
    if mended == raw:
        raise Unusable("corrupt", said)
    return bytes(mended)


def _without_stray(raw: bytes, count: int, wanted: int) -> bytes:
    """Take the `count` bytes before the marker away, if it is clear which of its kind is meant."""
    places, position, last = [], 2, 0
    for marker, start, end in _segments(raw):
        if marker == wanted and (last == _SCAN or start - position >= count):
            places.append(start)
        position, last = end, marker
    if len(places) != 1:
        raise Unusable("corrupt", f"{count} stray bytes before one of {len(places)} markers")
    stop = places[0]
    while raw[stop - 1] == 0xFF:  # fill bytes, which were not counted
        stop -= 1
    return raw[: stop - count] + raw[stop:]


def _decode_unusual(raw: bytes, frame: Frame) -> Pixels:
    """Sampling factors that TurboJPEG has no name for, such as 3×1: by Pillow, and twice.

    Pillow hides that a scan ended early. So each scan is also given bytes to go on with: a decoder
    that had all it needed does not read them, and only then the pixels are the same.
    """
    parts, position, last = [], 0, 0
    for marker, start, _ in _segments(raw):
        if last == _SCAN:
            parts += [raw[position:start], _CONTINUED]
            position = start
        last = marker
    if last != _END:
        raise Unusable("truncated", "JPEG of unusual sampling without an end mark")
    as_it_is, continued = (_pillow(data) for data in (raw, b"".join(parts) + raw[position:]))
    if not np.array_equal(as_it_is, continued):
        raise Unusable("truncated", "JPEG of unusual sampling: a scan ends early")
    return as_it_is


def _pillow(raw: bytes) -> Pixels:
    """RGB, or CMYK as it was stored."""
    try:
        with Image.open(io.BytesIO(raw), formats=["JPEG"]) as image:
            image.load()
            return 255 - np.asarray(image) if image.mode == "CMYK" else to_rgb(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise Unusable("corrupt", error) from error


def to_rgb(image: Image.Image) -> Pixels:
    """uint8 (H, W, 3), writable, of a loaded image in any mode that `convert` takes.

    By bands of rows: Pillow keeps 4 bytes per pixel, and a whole copy or two would add up.
    """
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _BAND):
        box = (0, top, image.width, min(top + _BAND, image.height))
        pixels[top : top + _BAND] = np.asarray(image.crop(box).convert("RGB"))
    return pixels
