"""pipelines/transform/: every good image is converted right, with Pillow as the oracle."""

import csv
import gzip
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from drawn import encoded, image
from forged import (
    interlaced_rows,
    patched,
    png,
    png16,
    segment,
    unusual_sampling,
    without,
    ycck,
)
from PIL import Image, ImageOps

from pipelines import transform
from pipelines.transform import FIXES, Rejected, Stored, to_stored

GEOMETRY = (256, 227, 90)


def mean(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(-1, 3).mean(axis=0)


def stored(raw: bytes) -> Stored:
    made = to_stored(raw, *GEOMETRY)
    assert isinstance(made, Stored), made
    assert set(made.fixes) <= set(FIXES)
    return made


def decode(raw: bytes, exif_orientation: str = "ignore") -> tuple[np.ndarray, set[str]]:
    pixels, fixes = transform.decode(raw, exif_orientation)
    return pixels[..., :3], fixes


def opened(raw: bytes) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(raw)) as image:
        return np.asarray(image.convert("RGB"))


def turned(value: int, form: str = "JPEG", **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(PLAIN, form, exif=exif, **options)


PLAIN = image(120, 160, seed=1)
OTHER = image(120, 160, seed=2)
GREY = PLAIN.convert("L")
RGBA = PLAIN.copy()
RGBA.putalpha(128)
CMYK = encoded(PLAIN.convert("CMYK"), quality=95)
PALETTE = PLAIN.quantize(64)

COLOUR = {
    "baseline": (encoded(PLAIN, quality=95), ""),
    "progressive": (encoded(PLAIN, quality=95, progressive=True), ""),
    "restart marks": (encoded(PLAIN, quality=95, restart_marker_rows=1), ""),
    "extended": (patched(raw := encoded(PLAIN), segment(raw, 0xC0).start + 1, b"\xc1"), ""),
    "Adobe RGB": (encoded(PLAIN, quality=95, keep_rgb=True, subsampling=0), ""),
    "RGB by component ids": (without(encoded(PLAIN, keep_rgb=True, subsampling=0), 0xEE), ""),
    "bytes behind the end": (encoded(PLAIN) + b"junk", ""),
    "cmyk": (CMYK, "cmyk"),
    "cmyk without Adobe": (without(CMYK, 0xEE), "cmyk"),
    "ycck": (ycck(PLAIN), "ycck"),
    "mpo": (encoded(PLAIN, "MPO", save_all=True, append_images=[OTHER]), "mpo_first_frame"),
    "gzip": (gzip.compress(encoded(PLAIN)), "gzip"),
    "gzip around png": (gzip.compress(encoded(PLAIN, "PNG")), "gzip png"),
    "png": (encoded(PLAIN, "PNG"), "png"),
    "png of 16 bits": (png16(np.asarray(PLAIN).astype(np.uint16) * 256 + 255), "16bit png"),
    "interlaced": (png(interlaced_rows(np.asarray(PLAIN)), 160, 120, 8, 2, 1), "png"),
    "animated png": (
        encoded(PLAIN, "PNG", save_all=True, append_images=[OTHER]),
        "first_frame png",
    ),
    "palette": (encoded(PALETTE, "PNG"), "palette png"),
    "palette, transparent": (
        encoded(PALETTE, "PNG", transparency=bytes(range(64))),
        "alpha_dropped palette png",
    ),
    "rgba": (encoded(RGBA, "PNG"), "alpha_dropped png"),
    "bmp": (encoded(PLAIN, "BMP"), "bmp"),
    "bmp of 32 bits": (encoded(RGBA, "BMP"), "bmp"),
    "bmp with palette": (encoded(PALETTE, "BMP"), "bmp palette"),
    "webp": (encoded(PLAIN, "WEBP"), "webp"),
    "webp, transparent": (
        encoded(RGBA, "WEBP", lossless=True, exact=True),
        "alpha_dropped webp",
    ),
    "animated webp": (
        encoded(PLAIN, "WEBP", save_all=True, append_images=[OTHER]),
        "first_frame webp",
    ),
    "tiff": (encoded(PLAIN, "TIFF"), "tiff"),
    "tiff, packed": (encoded(PLAIN, "TIFF", compression="packbits"), "tiff"),
    "tiff of two": (
        encoded(PLAIN.copy(), "TIFF", save_all=True, append_images=[OTHER.copy()]),
        "first_frame tiff",
    ),
    "tiff with palette": (encoded(PALETTE, "TIFF"), "palette tiff"),
    "ppm": (encoded(PLAIN, "PPM"), "ppm"),
    "gif": (encoded(PALETTE, "GIF"), "gif palette"),
    "gif, transparent": (encoded(PALETTE, "GIF", transparency=3), "alpha_dropped gif palette"),
    "animated gif": (
        encoded(PALETTE, "GIF", save_all=True, append_images=[OTHER.quantize(64)]),
        "first_frame gif palette",
    ),
}
GREYS = {
    "jpeg": (encoded(GREY, quality=95), "grey"),
    "png": (encoded(GREY, "PNG"), "grey png"),
    "with alpha": (encoded(GREY.convert("LA"), "PNG"), "alpha_dropped grey png"),
    "16 bits": (
        encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"),
        "16bit grey png",
    ),
    "gif": (encoded(GREY, "GIF"), "gif palette"),
    "bmp": (encoded(GREY, "BMP"), "bmp grey"),
}


@pytest.mark.parametrize("name", COLOUR)
def test_every_way_to_write_a_colour_image_gives_its_colours(name: str) -> None:
    raw, fixes = COLOUR[name]
    made = stored(raw)
    assert " ".join(made.fixes) == fixes
    pixels = decode(raw)[0]
    assert np.abs(mean(pixels) - mean(np.asarray(PLAIN))).max() < 1.5
    plain = raw if "gzip" not in fixes else gzip.decompress(raw)
    if name != "png of 16 bits":  # which Pillow reads too, but whose oracle is the image itself
        assert np.abs(pixels.astype(int) - opened(plain)).max() <= 1
    assert (made.height, made.width) == pixels.shape[:2] == (120, 160)


@pytest.mark.parametrize("name", GREYS)
def test_a_grey_image_becomes_rgb_with_equal_channels(name: str) -> None:
    raw, fixes = GREYS[name]
    made, pixels = stored(raw), decode(raw)[0]
    assert " ".join(made.fixes) == fixes
    assert (pixels == pixels[..., :1]).all()
    assert np.abs(pixels[..., 0].astype(int) - np.asarray(GREY)).mean() < 1


def test_16_bits_keep_their_high_byte() -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, 3)).astype(np.uint16)
    np.testing.assert_array_equal(decode(png16(pixels))[0], pixels >> 8)


def test_black_and_white_becomes_rgb() -> None:
    pixels, found = decode(encoded(PLAIN.convert("1"), "PNG"))
    assert found == {"png", "grey"}
    assert set(np.unique(pixels)) == {0, 255}


def test_inks_that_differ_from_each_other_keep_their_colours() -> None:
    inks = np.zeros((32, 32, 4), np.uint8)
    inks[:] = (200, 30, 90, 60)
    raw = encoded(Image.fromarray(inks, "CMYK"), quality=95)
    expected = (255 - np.array([200, 30, 90.0])) * (255 - 60) / 255
    assert np.abs(mean(decode(raw)[0]) - expected).max() < 2


def test_sampling_that_the_fast_decoder_lacks_is_decoded_by_pillow() -> None:
    raw = unusual_sampling()
    pixels, fixes = decode(raw)
    assert fixes == set()
    np.testing.assert_array_equal(pixels, opened(raw))


CLEAN = encoded(PLAIN, quality=90)
END = len(CLEAN) - 2
HARMLESS = {
    "stray bytes before the end": CLEAN[:END] + bytes(50) + CLEAN[END:],
    "fill bytes as well": CLEAN[:END] + bytes(50) + b"\xff\xff" + CLEAN[END:],
    "stray bytes in the header": CLEAN[: (k := segment(CLEAN, 0xDB).start)] + b"abc" + CLEAN[k:],
    "JFIF of the future": patched(CLEAN, segment(CLEAN, 0xE0).start + 9, b"\x07"),
    "odd scan parameters": patched(CLEAN, segment(CLEAN, 0xDA).stop - 3, b"\x01\x3e\x00"),
    "unknown Adobe transform": CLEAN[:2]
    + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x09"
    + without(CLEAN, 0xE0)[2:],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_oddities_that_touch_no_pixel_are_no_reason_to_lose_a_image(name: str) -> None:
    pixels, fixes = decode(HARMLESS[name])
    assert fixes == {"jpeg_warning_ignored"}
    np.testing.assert_array_equal(pixels, decode(CLEAN)[0])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(10))
def test_orientation_is_ignored_or_applied_as_asked(form: str, value: int) -> None:
    raw = turned(value, form)
    meant = 2 <= value <= 8
    lying, ignored = decode(raw)
    upright, applied = decode(raw, "apply")
    assert ("exif_orientation_ignored" in ignored) == ("exif_orientation_applied" in applied)
    assert ("exif_orientation_ignored" in ignored) == meant
    with Image.open(io.BytesIO(raw)) as image:
        oracle = np.asarray(ImageOps.exif_transpose(image).convert("RGB")) if meant else lying
    assert upright.shape == oracle.shape
    assert np.abs(upright.astype(int) - oracle).max() <= 1
    assert np.abs(lying.astype(int) - opened(raw)).max() <= 1
    made = to_stored(raw, *GEOMETRY, exif_orientation="apply")
    assert isinstance(made, Stored) and (made.height, made.width) == upright.shape[:2]


def test_damaged_exif_is_no_news_about_the_pixels() -> None:
    raw = encoded(PLAIN, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xee" * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stored(raw).fixes == ()


def test_the_jpeg_is_strict_rgb_420_of_the_crop_and_carries_nothing_else() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret place"
    raw = encoded(PLAIN, quality=95, exif=exif, comment=b"hello", icc_profile=b"x" * 300)
    made = stored(raw)
    assert made.fixes == ("exif_orientation_ignored",)
    assert made.jpeg == stored(raw).jpeg
    with Image.open(io.BytesIO(made.jpeg)) as image:
        image.load()
        assert (image.size, image.mode, image.format) == ((227, 227), "RGB", "JPEG")
        assert image.layer[0][1:3] == (2, 2) and image.layer[1][1:3] == (1, 1)
        assert not image.getexif() and not {"comment", "icc_profile"} & image.info.keys()
        assert np.abs(mean(np.asarray(image)) - mean(made.pixels.transpose(1, 2, 0))).max() < 1


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 4000), (3000, 3), (20, 17)])
def test_tiny_and_extreme_shapes_are_enlarged_and_cropped(size: tuple[int, int]) -> None:
    made = stored(encoded(image(*size)))
    assert made.pixels.shape == (3, 227, 227)
    assert (made.height, made.width) == size


def test_a_turned_tiff_is_stored_as_pillow_shows_it() -> None:
    raw = turned(6, "TIFF")
    pixels, fixes = decode(raw)
    assert pixels.shape == (160, 120, 3) and fixes == {"tiff"}
    assert (pixels == opened(raw)).all()


def test_every_fix_can_happen_and_is_explained() -> None:
    raws = [raw for raw, _ in [*COLOUR.values(), *GREYS.values()]] + [*HARMLESS.values()]
    found = set().union(*(decode(raw)[1] for raw in [*raws, turned(3)]))
    assert found | decode(turned(3), "apply")[1] == set(FIXES)
    assert all(text.endswith(".") for text in FIXES.values())


NASTY = {  # verdict's reason or fix, by file
    "progressive_650x470": "",
    "adobe_rgb_no_jfif": "",
    "one_pixel": "",
    "gray_128": "grey",
    "cmyk_adobe": "cmyk ycck",
    "exif_orientation6": "exif_orientation_ignored",
    "mpo_two_frames": "mpo_first_frame",
    "png_rgb_named_jpeg": "png",
    "webp": "webp",
    "truncated_100": "truncated",
    "bomb_65535x65535": "too_many_pixels",
    "zero_bytes": "zero_bytes",
    "real_cut_at_80pct": "truncated",
    "html_error_page": "not_an_image",
}


@pytest.mark.parametrize("name", NASTY)
def test_the_nasty_sample_gets_its_expected_verdicts(name: str, data_folder: Path) -> None:
    folder = data_folder / "nasty-sample"
    with (folder / "expected.csv").open() as file:
        row = {row["file"]: row for row in csv.DictReader(file)}[f"{name}.JPEG"]
    raw = (folder / row["file"]).read_bytes()
    made = to_stored(raw, *GEOMETRY)
    if isinstance(made, Rejected):
        assert (row["verdict"], NASTY[name]) == ("quarantine", made.reason)
        return
    assert row["verdict"] == ("convert" if made.fixes else "ok")
    assert set(made.fixes) <= set(NASTY[name].split()) and bool(made.fixes) == bool(NASTY[name])
    expected = [float(value) for value in row["mean_rgb_full_decode"].split()]
    np.testing.assert_allclose(mean(decode(raw)[0]), expected, atol=1.0)
