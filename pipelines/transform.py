"""One raw picture to its stored JPEG, or the reason why not. Pure: no files, no ray.

Plain JPEGs are decoded by simplejpeg, 1.3 times as fast as Pillow; everything else that ImageNet
is known to hold goes through Pillow, and each departure from "plain RGB JPEG" is named in `fixes`.
Orientation in EXIF is ignored, as torchvision, Caffe, TensorFlow and so every published result do.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError

from alexnet.preprocess import resize_and_crop

# Pillow's own threshold for decompression bombs: 268 MB once decoded. The largest picture of
# ImageNet is several times smaller.
MAX_PIXELS = 89_478_485
CODEC = "jpeg-pillow-420"  # Pillow's encoder: 0.06 dB better than simplejpeg's at the same size
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")  # MPO is found under JPEG
_EXIF_ORIENTATION = 0x0112
# What libjpeg says when picture data is missing or wrong, so that a part of it would be invented.
_TRUNCATED = ("premature end",)
_CORRUPT = ("bad huffman code", "restart marker", "arithmetic")

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(frozen=True)
class Stored:
    jpeg: bytes
    width: int  # of the raw picture
    height: int
    fixes: tuple[str, ...]  # sorted
    pixels: Pixels  # uint8 (3, crop, crop), what the encoder was given


@dataclass(frozen=True)
class Rejected:
    reason: str  # zero_bytes, not_an_image, too_many_pixels, truncated, corrupt
    detail: str


class _Unusable(Exception):
    def __init__(self, reason: str, detail: object) -> None:
        self.rejected = Rejected(reason, " ".join(str(detail).split())[:200])


def to_stored(raw: bytes, resize: int, crop: int, quality: int) -> Stored | Rejected:
    """Decode strictly to RGB, shorter side to `resize`, centre `crop`, encode at `quality`, 4:2:0.

    The JPEG carries no EXIF, profile or comment.
    """
    try:
        image, fixes = decode(raw)
    except _Unusable as unusable:
        return unusable.rejected
    height, width = image.shape[:2]
    pixels = resize_and_crop(torch.from_numpy(image).permute(2, 0, 1), resize, crop).numpy()
    buffer = io.BytesIO()
    rgb = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return Stored(buffer.getvalue(), width, height, tuple(sorted(fixes)), pixels)


def decode(raw: bytes) -> tuple[Pixels, set[str]]:
    """Whole picture as uint8 (H, W, 3) RGB, and what had to be mended. Raises _Unusable."""
    if not raw:
        raise _Unusable("zero_bytes", "file of 0 bytes")
    with warnings.catch_warnings():  # a damaged EXIF block is no news about the pixels
        warnings.simplefilter("ignore")
        with _open(raw) as picture:
            fixes = _facts(picture, raw)
            if picture.format in ("JPEG", "MPO"):
                pixels = _decode_jpeg(raw, picture, fixes)
            else:
                pixels = _decode_with_pillow(picture, raw, fixes)
    return pixels, fixes


def _open(raw: bytes) -> Image.Image:
    """Header only: nothing is decoded or allocated yet."""
    try:
        picture = Image.open(io.BytesIO(raw), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise _Unusable("too_many_pixels", error) from error
    except UnidentifiedImageError as error:
        start = raw[:16].decode("ascii", "backslashreplace")
        raise _Unusable("not_an_image", f"{len(raw)} bytes beginning {start!r}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise _Unusable("corrupt", error) from error
    if picture.width * picture.height > MAX_PIXELS:
        size = f"{picture.width}×{picture.height} exceeds {MAX_PIXELS} pixels"
        raise _Unusable("too_many_pixels", size)
    return picture


def _facts(picture: Image.Image, raw: bytes) -> set[str]:
    fixes = set()
    if picture.format == "MPO":
        fixes.add("mpo_first_frame")
    elif picture.format != "JPEG":
        fixes.add(str(picture.format).lower())
        if getattr(picture, "n_frames", 1) > 1:
            fixes.add("first_frame")
    try:
        orientation = picture.getexif().get(_EXIF_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError):  # EXIF that cannot be parsed
        orientation = 1
    if orientation != 1:
        fixes.add("exif_orientation_ignored")
    return fixes


def _decode_jpeg(raw: bytes, picture: Image.Image, fixes: set[str]) -> Pixels:
    """Pillow passes JPEGs whose data ends early but correctly marked; libjpeg's warnings don't."""
    four_colours = picture.mode == "CMYK"
    try:
        pixels = simplejpeg.decode_jpeg(raw, colorspace="CMYK" if four_colours else "RGB")
    except ValueError as error:
        said = str(error).lower()
        if any(words in said for words in _TRUNCATED):
            raise _Unusable("truncated", error) from error
        if any(words in said for words in _CORRUPT):
            raise _Unusable("corrupt", error) from error
        fixes.add("jpeg_warning_ignored")  # such as stray bytes between markers
        return _decode_with_pillow(picture, raw, fixes)
    if four_colours:
        return _decode_with_pillow(picture, raw, fixes)  # knows that Adobe stores it inverted
    if picture.mode == "L":
        fixes.add("grey")
    return np.asarray(pixels, dtype=np.uint8)


def _decode_with_pillow(picture: Image.Image, raw: bytes, fixes: set[str]) -> Pixels:
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        reason = "truncated" if "truncated" in str(error) else "corrupt"
        raise _Unusable(reason, error) from error
    if picture.format == "PNG" and raw[24] == 16:  # IHDR's bit depth; Pillow keeps the high byte
        fixes.add("16bit")
    if picture.mode.startswith("I"):
        grey = (np.asarray(picture, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8)
        picture = Image.fromarray(grey)
    if picture.mode == "CMYK":
        fixes.add("cmyk")
    if picture.mode in ("P", "PA"):
        fixes.add("palette")
    if picture.has_transparency_data:
        fixes.add("alpha_dropped")  # as `convert("RGB")` does in every loader
    if picture.mode in ("1", "L", "LA"):
        fixes.add("grey")
    return np.array(picture.convert("RGB"))  # a copy: torch wants writable memory
