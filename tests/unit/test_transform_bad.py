"""pipelines/transform/: nothing cut, forged or damaged passes, crashes or takes memory."""

import gzip
import random
import re
import resource
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
from drawn import encoded, image
from forged import absurd, interlaced_rows, patched, png, resized_jpeg, segment, unusual_sampling
from PIL import Image

from pipelines.transform import FIXES, MAX_UNPACKED, REASONS, Rejected, Stored, to_stored

GEOMETRY = (256, 227, 90)


def verdict(raw: bytes) -> str:
    """The reason, or "" for an image that passes."""
    made = to_stored(raw, *GEOMETRY)
    assert not isinstance(made, Rejected) or made.reason in REASONS
    return made.reason if isinstance(made, Rejected) else ""


@contextmanager
def memory_limit(megabytes: int) -> Iterator[None]:
    """More than this beyond what the process has now is a MemoryError."""
    before, now = resource.getrlimit(resource.RLIMIT_AS), psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + (megabytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


PLAIN, OTHER = image(48, 64, seed=1), image(48, 64, seed=2)
GRAIN = np.random.default_rng(0).normal(0, 20, (48, 64, 3))
PHOTO = Image.fromarray((np.asarray(PLAIN) + GRAIN).clip(0, 255).astype(np.uint8))
PALETTE = PHOTO.quantize(64)
MPO = encoded(PHOTO, "MPO", save_all=True, append_images=[OTHER])
JPEGS = {
    "baseline": encoded(PHOTO),
    "progressive": encoded(PHOTO, progressive=True),
    "grey": encoded(PHOTO.convert("L")),
    "cmyk": encoded(PHOTO.convert("CMYK")),
    "cmyk, progressive": encoded(PHOTO.convert("CMYK"), progressive=True),
    "restart marks": encoded(PHOTO, restart_marker_rows=1),
    "unusual sampling": unusual_sampling(),
}
BASE = JPEGS["baseline"]
OTHERS = {
    "png": encoded(PHOTO, "PNG"),
    "interlaced": png(interlaced_rows(np.asarray(PHOTO)), 64, 48, 8, 2, 1),
    "animated png": encoded(PHOTO, "PNG", save_all=True, append_images=[OTHER]),
    "gif": encoded(PALETTE, "GIF"),
    "animated gif": encoded(PALETTE, "GIF", save_all=True, append_images=[OTHER.quantize(64)]),
    "webp": encoded(PHOTO, "WEBP"),
    "lossless webp": encoded(PHOTO, "WEBP", lossless=True),
    "animated webp": encoded(PHOTO, "WEBP", save_all=True, append_images=[OTHER]),
    "bmp": encoded(PHOTO, "BMP"),
    "tiff": encoded(PHOTO, "TIFF"),
    "ppm": encoded(PHOTO, "PPM"),
    "bitmap": encoded(PHOTO.convert("1"), "PPM"),
    "gzip": gzip.compress(encoded(PHOTO), mtime=0),
}
WHOLE = JPEGS | OTHERS | {"mpo": MPO}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_cut_anywhere_never_passes(name):
    raw = MPO[: MPO.index(b"\xff\xd9") + 2] if name == "mpo" else WHOLE[name]
    assert verdict(raw) == ""
    for end in {*range(0, len(raw), 1 + len(raw) // 300), *range(len(raw) - 20, len(raw))}:
        reason = verdict(raw[:end])
        assert reason in ("zero_bytes", "not_an_image", "truncated"), end
        assert end <= 17 or reason == "truncated"


@pytest.mark.parametrize("name", JPEGS)
def test_a_cut_jpeg_never_passes_not_even_with_an_end_mark(name):
    raw = JPEGS[name]
    start = segment(raw, 0xDA).stop
    for end in range(start, len(raw) - 2, 1 + len(raw) // 500):
        assert verdict(raw[:end] + b"\xff\xd9") in ("truncated", "corrupt"), end


def test_a_jpeg_without_its_last_scans_never_passes():
    raw = JPEGS["progressive"]
    marks = [found.start() for found in re.finditer(rb"\xff[\xc4\xda]", raw)]
    for end in marks[marks.index(segment(raw, 0xDA).start) + 1 :]:
        assert verdict(raw[:end] + b"\xff\xd9") == "truncated"


def test_a_missing_restart_interval_is_noticed():
    raw = JPEGS["restart marks"]
    first, second = raw.index(b"\xff\xd0"), raw.index(b"\xff\xd1")
    assert verdict(raw[:first] + raw[second:]) == "corrupt"


@pytest.mark.parametrize("interlaced", [0, 1])
def test_a_png_that_lacks_rows_behind_good_checksums_never_passes(interlaced):
    pixels = np.asarray(PLAIN)
    plain = b"".join(b"\0" + row.tobytes() for row in pixels)
    rows = interlaced_rows(pixels) if interlaced else plain
    assert verdict(png(rows, 64, 48, 8, 2, interlaced)) == ""
    for lost in (1, 193, 20 * 193):
        assert verdict(png(rows[:-lost], 64, 48, 8, 2, interlaced)) == "truncated"


@pytest.mark.parametrize("picture", [PLAIN, PLAIN.quantize(64)], ids=["RGB", "palette"])
def test_one_flipped_bit_anywhere_in_a_png_is_noticed(picture):
    """Many of them leave a stream that can be unpacked, to other pixels or colours."""
    clear = {"transparency": bytes(range(64))} if picture.mode == "P" else {}
    raw = encoded(picture, "PNG", **clear)
    assert verdict(raw) == ""
    passed = [n for n, b in enumerate(raw) if verdict(patched(raw, n, bytes([b ^ 4]))) == ""]
    assert passed == []


def test_a_tiff_whose_strips_lack_rows_never_passes():
    raw, tag = OTHERS["tiff"], struct.pack("<HHI", 279, 4, 1)  # StripByteCounts
    assert raw.count(tag + struct.pack("<I", 64 * 48 * 3)) == 1
    fewer = raw.replace(tag + struct.pack("<I", 64 * 48 * 3), tag + struct.pack("<I", 64 * 47 * 3))
    assert (verdict(raw), verdict(fewer)) == ("", "truncated")


ABSURD = absurd()


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_are_refused_before_anything_is_allocated(name):
    with memory_limit(32):
        assert verdict(ABSURD[name]) == "too_many_pixels"
        assert verdict(gzip.compress(ABSURD[name])) == "too_many_pixels"


def test_more_pixels_than_the_bytes_can_hold_are_refused_before_allocation():
    with memory_limit(32):
        assert verdict(resized_jpeg(BASE, 9000, 9000)) == "truncated"
        assert verdict(resized_jpeg(JPEGS["progressive"], 9000, 9000, 0xC2)) == "truncated"
        bmp = patched(OTHERS["bmp"], 18, (9000).to_bytes(4, "little") * 2)
        assert verdict(bmp) == "truncated"
        assert verdict(png(b"\0" * 100, 9000, 9000, 8, 2)) == "truncated"


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (3000, 3), (1, 1), (2, 2), (20, 17)])
def test_extreme_shapes_are_enlarged_and_cropped_and_take_little_memory(size):
    raw = encoded(image(*size))
    with memory_limit(64):
        made = to_stored(raw, *GEOMETRY)
    assert isinstance(made, Stored) and (made.height, made.width) == size
    assert made.pixels.shape == (3, 227, 227)


def test_a_gzip_bomb_is_refused_within_its_limit():
    bomb = gzip.compress(encoded(PLAIN) + bytes(MAX_UNPACKED), compresslevel=1)
    assert len(bomb) < MAX_UNPACKED / 200
    with memory_limit(4 * MAX_UNPACKED >> 20):
        assert verdict(bomb) == "too_many_bytes"


PACKED = OTHERS["gzip"]
START, SCAN = segment(BASE, 0xC0).start, segment(BASE, 0xDA).start
TWO = encoded(PLAIN.copy(), "TIFF", save_all=True, append_images=[OTHER.copy()])


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "zero_bytes"),
        (gzip.compress(b"", mtime=0), "zero_bytes"),
        (b"<!DOCTYPE html><title>404</title>", "not_an_image"),
        (b"BMW is no bitmap, whatever it begins with", "not_an_image"),
        (b"\xff\xd8", "not_an_image"),
        (bytes(5000), "not_an_image"),
        (gzip.compress(PACKED, mtime=0), "not_an_image"),
        (encoded(PLAIN.convert("CMYK"), "TIFF"), "unsupported"),
        (encoded(PLAIN.convert("F"), "TIFF"), "unsupported"),
        (encoded(PLAIN, "TIFF", compression="tiff_lzw"), "unsupported"),
        (TWO[:-900], "truncated"),
        (b"P3 1 1 255 1 2 3 ", "unsupported"),
        (b"P6 1 1 70000 abc", "corrupt"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported"),
        (patched(PACKED, len(PACKED) // 2, b"\xff\0\xff\0\xff"), "corrupt"),
        (patched(PACKED, len(PACKED) - 8, b"\0\0\0\0"), "corrupt"),  # its checksum
        (patched(BASE, START + 4, b"\x0c"), "unsupported"),  # 12 bits
        (patched(BASE, START + 1, b"\xc3"), "unsupported"),  # lossless
        (patched(BASE, START + 1, b"\xc9"), "unsupported"),  # arithmetic
        (patched(BASE, START + 9, b"\x02"), "unsupported"),  # 2 components
        (patched(BASE, START + 5, b"\0\0"), "corrupt"),  # no height
        (patched(BASE, SCAN + 5, b"\x77"), "corrupt"),  # a scan of no component
        (BASE[:2] + BASE, "corrupt"),
        (b"\xff\xd8\xff\xd9", "corrupt"),
        (patched(OTHERS["bmp"], 30, b"\x01"), "unsupported"),  # run lengths
        (patched(OTHERS["gif"], 13 + 3 * 64, b"\x77"), "corrupt"),
        (b"GIF89a" + bytes(7) + b";", "corrupt"),
        (patched(OTHERS["webp"], 12, b"ABCD"), "corrupt"),
    ],
)
def test_what_is_no_usable_image_is_rejected(raw, reason):
    assert verdict(raw) == reason


def mutated(rng: random.Random, raws: list[bytes]) -> bytes:
    """One of `raws` with a few bytes flipped, cut out, put in or taken from another."""
    data = bytearray(rng.choice(raws))
    for _ in range(rng.choice((1, 1, 2, 5))):
        position = rng.randrange(len(data) if rng.random() < 0.6 else min(len(data), 200))
        flipped, some = bytes([data[position] ^ 1 << rng.randrange(8)]), rng.randrange(1, 30)
        other = rng.choice(raws)[rng.randrange(200) :][:some]
        edits = [(1, flipped), (1, b"\xff"), (some, b""), (0, rng.randbytes(some)), (some, other)]
        gone, put = rng.choice(edits)
        data[position : position + gone] = put
    return bytes(data)


def test_no_damage_is_ever_more_than_a_verdict(capfd):
    rng, raws = random.Random(0), [*WHOLE.values()]
    passed = 0
    with warnings.catch_warnings(action="error"):
        for _ in range(2000):
            made = to_stored(mutated(rng, raws), *GEOMETRY, exif_orientation="apply")
            if isinstance(made, Rejected):
                assert made.reason in REASONS and "\n" not in made.detail
            else:
                assert set(made.fixes) <= set(FIXES) and made.pixels.shape == (3, 227, 227)
                passed += 1
    assert 200 < passed < 1000
    assert capfd.readouterr() == ("", "")  # nothing from the C libraries either
