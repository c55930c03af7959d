"""One raw image to its stored JPEG, or the reason why not. Pure: no files, no ray.

Every image has a fate. What ImageNet's copies are known to hold besides plain RGB JPEGs is
converted, and each departure is named in `fixes` and explained in FIXES; everything else is
rejected for one of REASONS. Rules that are choices:

- A file that lacks bytes is rejected, wherever the cut lies: in a later frame of an animation, or
  when only the end mark is gone. ImageNet loses nothing by it: no loader by Pillow, such as
  torchvision's, takes a JPEG without an end mark. What follows a JPEG's end mark is not looked at.
- Claimed sizes are checked before anything is allocated, in every format. At the limit of
  MAX_PIXELS decoding takes, as measured, 0.4 GB for a plain JPEG, 0.9 GB for a progressive one
  without subsampling, 1.0 GB for four inks, 0.6 GB for PNG and BMP and 1.4 GB for WebP.
- There is no smallest size: an image of 1×1 becomes a stored image of one colour. Long strips
  are cut to their centre (see `resize_and_crop`).
- Orientation in EXIF is ignored unless asked for, as torchvision, Caffe, TensorFlow and so every
  published result do.
- Transparent pixels show the colour that lies under them, 16-bit samples keep their high byte, and
  an embedded colour profile is ignored: as `Image.convert("RGB")` does in every loader.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from alexnet.preprocess import resize_and_crop
from pipelines.transform import headers, jpegs
from pipelines.transform.headers import MAX_PIXELS, Unusable
from pipelines.transform.jpegs import Pixels

__all__ = ["FIXES", "MAX_PIXELS", "REASONS", "Pixels", "Rejected", "Stored"]
__all__ += ["decode", "keep_stored", "to_stored"]

Orientation = Literal["ignore", "apply"]
MAX_UNPACKED = 64 << 20  # bytes inside a gzip; the largest image file of ImageNet has a quarter

REASONS = {
    "zero_bytes": "The file is empty.",
    "not_an_image": "The bytes begin like no image that is read: JPEG, PNG, GIF, WebP, "
    "BMP, TIFF or PPM.",
    "unsupported": "A real image of a kind whose wholeness cannot be judged or that cannot be "
    "decoded: arithmetic-coded, lossless or 12-bit JPEG, run-length BMP, HEIF, TIFF "
    "in LZW, Deflate or JPEG, with inks or with fractions, PPM of text.",
    "too_many_bytes": f"A gzip that unpacks to more than {MAX_UNPACKED >> 20} MiB.",
    "too_many_pixels": f"The header claims more than {MAX_PIXELS} pixels; nothing was decoded.",
    "truncated": "Image data is missing, so that a part would have to be invented.",
    "corrupt": "The data contradicts itself: wrong checksums, impossible codes or headers.",
    "not_as_stored": "Asked to be kept as it is, but no RGB JPEG of exactly the stored side.",
}
FIXES = {
    "grey": "One channel of grey was repeated for red, green and blue.",
    "cmyk": "Four inks, stored inverted as Adobe does, were converted to RGB.",
    "ycck": "Four inks, stored as luma and chroma with black, were converted to RGB.",
    "palette": "Indices into a table of colours were looked up.",
    "alpha_dropped": "Transparency was dropped; the colour under it shows.",
    "16bit": "Samples of 16 bits were cut to their high byte.",
    "png": "The file is a PNG, whatever its name says.",
    "gif": "The file is a GIF, whatever its name says.",
    "webp": "The file is a WebP, whatever its name says.",
    "bmp": "The file is a BMP, whatever its name says.",
    "tiff": "The file is a TIFF, whatever its name says.",
    "ppm": "The file is a PPM, PGM or PBM, whatever its name says.",
    "mpo_first_frame": "A JPEG followed by others (MPO, as of 3D cameras): the first was taken.",
    "first_frame": "The file is animated: the first frame was taken.",
    "jpeg_warning_ignored": "Stray bytes or odd header values that cannot touch the pixels.",
    "gzip": "The image was packed with gzip and has been unpacked.",
    "exif_orientation_ignored": "EXIF asks for a turn; the pixels were taken as they lie.",
    "exif_orientation_applied": "The image was turned upright, as EXIF asks.",
}

_EXIF_ORIENTATION = 0x0112
_BROKEN_EXIF = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error)
# libjpeg's, Pillow's and zlib's words (the last has a number only).
_NO_MEMORY = re.compile(r"(?i)(insufficient|out of|allocate) memory|error -4\b")
# What Pillow's readers raise on bytes that contradict themselves.
_BROKEN = (*_BROKEN_EXIF, EOFError, OverflowError, zlib.error)


@dataclass(frozen=True)
class Stored:
    jpeg: bytes
    width: int  # of the whole image, after turning it upright if that was asked for
    height: int
    fixes: tuple[str, ...]  # sorted, of FIXES
    pixels: Pixels  # uint8 (3, crop, crop), a view of what the encoder was given


@dataclass(frozen=True)
class Rejected:
    reason: str  # one of REASONS
    detail: str


def to_stored(
    raw: bytes, resize: int, crop: int, quality: int, exif_orientation: Orientation = "ignore"
) -> Stored | Rejected:
    """Decode strictly to RGB, shorter side to `resize`, centre `crop`, encode at `quality`, 4:2:0,
    without EXIF, profile or comment.

    Measured on 200 photos of ImageNet against Lanczos in floating point: 56.5 dB before encoding,
    and the JPEG is 0.015 dB worse than one of the exact pixels (0.30 dB at worst, where hard edges
    between black and white make the 8-bit step between rows and columns clip).
    """
    try:
        whole, fixes = decode(raw, exif_orientation)
    except Unusable as unusable:
        return _rejected(unusable)
    height, width = whole.shape[:2]
    pixels = resize_and_crop(torch.from_numpy(whole).permute(2, 0, 1), resize, crop)
    stored = pixels.permute(1, 2, 0).contiguous().numpy()
    if stored.shape[2] == 3:
        image = Image.fromarray(stored)
    else:  # with any fourth, as Pillow itself keeps RGB: shared with it, and nothing to unpack
        image = Image.frombuffer("RGBX", (crop, crop), stored, "raw", "RGBX", 0, 1)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    rgb = stored.transpose(2, 0, 1)[:3]
    return Stored(buffer.getvalue(), width, height, tuple(sorted(fixes)), rgb)


def keep_stored(raw: bytes, crop: int) -> Stored | Rejected:
    """`raw` itself as the stored JPEG, so that sharding anew costs no generation of quality.

    It must be a clean RGB JPEG of crop × crop; `pixels` are its decoded ones.
    """
    try:
        if not raw or headers.form(raw) != "JPEG":
            raise Unusable("not_as_stored" if raw else "zero_bytes", _beginning(raw))
        frame = jpegs.read(raw)
        if (frame.width, frame.height, len(frame.components)) != (crop, crop, 3):
            found = f"{frame.width}×{frame.height} in {len(frame.components)} components"
            raise Unusable("not_as_stored", f"{found}, not {crop}×{crop} in 3")
        pixels, fixes = jpegs.decode(raw, frame)
        if fixes:
            raise Unusable("corrupt", f"JPEG needs {' and '.join(sorted(fixes))}")
    except Unusable as unusable:
        return _rejected(unusable)
    planes = np.ascontiguousarray(pixels[..., :3].transpose(2, 0, 1))
    return Stored(raw, crop, crop, (), planes)


def _rejected(unusable: Unusable) -> Rejected:
    """Decoders tell a lack of memory like any damage; that is no fault of the image, which must
    not be lost by it. Raises MemoryError."""
    if _NO_MEMORY.search(unusable.detail):
        raise MemoryError(unusable.detail)
    return Rejected(unusable.reason, unusable.detail)


def decode(raw: bytes, exif_orientation: Orientation = "ignore") -> tuple[Pixels, set[str]]:
    """Whole image as uint8 (H, W, 3) RGB, or (H, W, 4) with any fourth, and what had to be
    mended. Raises Unusable."""
    fixes: set[str] = set()
    if (form := headers.form(raw)) == "GZIP":
        fixes.add("gzip")
        raw = _unpacked(raw)
        form = headers.form(raw)
    if not raw:
        raise Unusable("zero_bytes", "file of 0 bytes")
    if form in ("", "GZIP"):
        raise Unusable("not_an_image", _beginning(raw))
    with warnings.catch_warnings():  # a damaged EXIF block is no news about the pixels
        warnings.simplefilter("ignore")
        decoded = _decode_jpeg(raw) if form == "JPEG" else _decode_other(raw, form)
    pixels, found, orientation = decoded
    fixes |= found
    if isinstance(orientation, int) and 2 <= orientation <= 8:  # EXIF may hold anything there
        if exif_orientation == "apply":
            pixels = _upright(pixels, orientation)
        fixes.add(f"exif_orientation_{'applied' if exif_orientation == 'apply' else 'ignored'}")
    return pixels, fixes


def _beginning(raw: bytes) -> str:
    return f"{len(raw)} bytes beginning {raw[:16].decode('ascii', 'backslashreplace')!r}"


def _unpacked(raw: bytes) -> bytes:
    """At most MAX_UNPACKED bytes are ever made. What follows the first member is not looked at."""
    unpacking = zlib.decompressobj(wbits=31)
    try:
        data = unpacking.decompress(raw, MAX_UNPACKED)
    except zlib.error as error:
        raise Unusable("corrupt", f"gzip: {error}") from error
    if unpacking.eof:
        return data
    if unpacking.unconsumed_tail:
        raise Unusable("too_many_bytes", f"gzip of more than {MAX_UNPACKED} bytes")
    raise Unusable("truncated", f"gzip ends early, after {len(raw)} bytes")


def _decode_jpeg(raw: bytes) -> tuple[Pixels, set[str], Any]:
    """Pixels, fixes, and what EXIF says of the orientation."""
    frame = jpegs.read(raw)
    pixels, fixes = jpegs.decode(raw, frame)
    if frame.several:
        fixes.add("mpo_first_frame")
    exif, orientation = Image.Exif(), 1
    with contextlib.suppress(*_BROKEN_EXIF):
        exif.load(frame.exif)
        orientation = exif.get(_EXIF_ORIENTATION, 1)
    return pixels, fixes, orientation


def _decode_other(raw: bytes, form: str) -> tuple[Pixels, set[str], Any]:
    """PNG, GIF, WebP, BMP, TIFF or PPM, by Pillow once the file is known to be whole."""
    header = headers.header(raw, form)
    fixes = {form.lower()}
    if header.frames > 1:
        fixes.add("first_frame")
    if header.sixteen_bit:
        fixes.add("16bit")
    try:
        with Image.open(io.BytesIO(raw), formats=[form]) as image:
            image.load()
            orientation = 1
            if form != "TIFF":  # there it is no EXIF, and Pillow has turned the image
                with contextlib.suppress(*_BROKEN_EXIF):
                    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
            return _colours(image, fixes), fixes, orientation
    except Image.DecompressionBombError as error:
        raise Unusable("too_many_pixels", error) from error
    except _BROKEN as error:
        raise Unusable("truncated" if "truncated" in str(error) else "corrupt", error) from error


def _colours(image: Image.Image, fixes: set[str]) -> Pixels:
    if image.mode in ("P", "PA"):
        fixes.add("palette")
    if image.has_transparency_data:
        fixes.add("alpha_dropped")
    if image.mode in ("1", "L", "LA", "I", "I;16"):
        fixes.add("grey")
    if image.mode.startswith("I"):
        high = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(high[..., None], 3, axis=2)
    return jpegs.to_rgb(image)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Values 2 to 8 of the tag, Exif 2.32 section 4.6.4: where row 0 and column 0 shall be."""
    if orientation >= 5:  # rows are columns
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
