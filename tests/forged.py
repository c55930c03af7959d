"""Images that no encoder at hand writes, made of bytes: odd headers, absurd claims, odd PNGs."""

import struct
import zlib

import numpy as np
from drawn import encoded, image
from PIL import Image


def segment(raw: bytes, marker: int) -> slice:
    """Of a JPEG: marker, length and body, or of SOS its header alone."""
    position = 2
    while raw[position + 1] != marker:
        position += 2 + int.from_bytes(raw[position + 2 : position + 4])
    return slice(position, position + 2 + int.from_bytes(raw[position + 2 : position + 4]))


def without(raw: bytes, marker: int) -> bytes:
    place = segment(raw, marker)
    return raw[: place.start] + raw[place.stop :]


def patched(raw: bytes, position: int, data: bytes) -> bytes:
    return raw[:position] + data + raw[position + len(data) :]


def resized_jpeg(raw: bytes, width: int, height: int, marker: int = 0xC0) -> bytes:
    """Claims another size; the data stays."""
    return patched(raw, segment(raw, marker).start + 5, struct.pack(">2H", height, width))


def ycck(image: Image.Image) -> bytes:
    """Adobe's YCCK: 255 − RGB as luma and chroma, then black, all stored inverted (here: none)."""
    inverted = Image.fromarray(255 - np.asarray(image)).convert("YCbCr")
    inks = np.full((*inverted.size[::-1], 4), 255, np.uint8)
    inks[..., :3] = np.asarray(inverted)
    raw = encoded(Image.fromarray(255 - inks, "CMYK"), quality=95)
    return patched(raw, segment(raw, 0xEE).stop - 1, b"\x02")


def unusual_sampling() -> bytes:
    """4:2:0's six blocks, dealt out again: two each for three components of 1×2, 2×1 and 2×1."""
    grain = np.random.default_rng(0).integers(100, 150, (64, 96, 3)).astype(np.uint8)
    raw = encoded(Image.fromarray(grain), quality=90, subsampling="4:2:0")
    frame, scan = segment(raw, 0xC0).start, segment(raw, 0xDA).start
    for position, value in ((11, 0x12), (14, 0x21), (17, 0x21)):
        raw = patched(raw, frame + position, bytes([value]))
    return patched(raw, scan + 8, b"\0")  # the second component's tables: luma's now


def png(
    rows: bytes, width: int, height: int, depth: int, colour: int, interlaced: int = 0
) -> bytes:
    """`rows`: each led by its filter's number, not yet packed."""
    head = struct.pack(">2I5B", width, height, depth, colour, 0, 0, interlaced)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def png16(pixels: np.ndarray) -> bytes:
    """uint16 (H, W, 3)."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2").reshape(height, -1)
    return png(b"".join(b"\0" + row.tobytes() for row in rows), width, height, 16, 2)


def interlaced_rows(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) in the seven passes of Adam7, by the table in the PNG specification."""
    passes = "1 6 4 6 2 6 4 6|7|5 6 5 6 5 6 5 6|7|3 6 4 6 3 6 4 6|7|5 6 5 6 5 6 5 6|7"
    table = [(line.split() * 8)[:8] for line in passes.split("|")]
    rows = b""
    for number in "1234567":
        for y, row in enumerate(pixels):
            chosen = [x for x in range(len(row)) if table[y % 8][x % 8] == number]
            rows += b"\0" + row[chosen].tobytes() if chosen else b""
    return rows


def absurd() -> dict[str, bytes]:
    """A few hundred bytes each, with a claim of more than 89 million pixels."""
    small = image(16, 16)
    lossless, lossy = encoded(small, "WEBP", lossless=True), encoded(small, "WEBP")
    animated = encoded(small, "WEBP", save_all=True, append_images=[image(16, 16, seed=2)])
    gif, bmp = encoded(small.quantize(16), "GIF"), encoded(small, "BMP")
    frame = next(k for k in range(13, len(gif)) if gif[k : k + 5] == b",\0\0\0\0")
    many = encoded(small, "MPO", save_all=True, append_images=[small])
    return {
        "jpeg": resized_jpeg(encoded(small), 65535, 65535),
        "jpeg just above": resized_jpeg(encoded(small), 12000, 8000),
        "progressive": resized_jpeg(encoded(small, progressive=True), 65535, 65535, 0xC2),
        "mpo": resized_jpeg(many, 65535, 65535),
        "png": png(b"", 2**31 - 1, 2**31 - 1, 8, 2),
        "gif screen": patched(gif, 6, b"\xff\xff\xff\xff"),
        "gif frame": patched(gif, frame + 5, b"\xff\xff\xff\xff"),
        "webp lossy": patched(lossy, 26, b"\xff\x3f\xff\x3f"),
        "webp lossless": patched(lossless, 21, b"\xff\xff\xff\x0f"),
        "webp animated": patched(animated, 24, b"\xff" * 6),
        "bmp": patched(bmp, 18, struct.pack("<2i", 2**31 - 1, -(2**31 - 1))),
    }
