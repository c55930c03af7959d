"""pipelines/transform/: every good image is converted right, with Pillow as the oracle; and what
that costs in quality."""

import csv
import gzip
import io
import tarfile
import warnings

import numpy as np
import pytest
from drawn import encoded, image
from forged import (
    interlaced_rows,
    patched,
    png,
    png16,
    resized_jpeg,
    segment,
    unusual_sampling,
    without,
    ycck,
)
from PIL import Image, ImageOps

from pipelines import transform
from pipelines.transform import FIXES, Rejected, Stored, keep_stored, to_stored

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
DEEP_GREY = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
RGBA = PLAIN.copy()
RGBA.putalpha(128)
CMYK = encoded(PLAIN.convert("CMYK"), quality=95)
PALETTE = PLAIN.quantize(64)

SEVERAL = {"save_all": True, "append_images": [OTHER]}
CLEAR = bytes(range(64))

COLOUR = {  # bytes and fixes
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
    "mpo": (encoded(PLAIN, "MPO", **SEVERAL), "mpo_first_frame"),
    "gzip": (gzip.compress(encoded(PLAIN)), "gzip"),
    "gzip around png": (gzip.compress(encoded(PLAIN, "PNG")), "gzip png"),
    "png": (encoded(PLAIN, "PNG"), "png"),
    "png of 16 bits": (png16(np.asarray(PLAIN).astype(np.uint16) * 256 + 255), "16bit png"),
    "interlaced": (png(interlaced_rows(np.asarray(PLAIN)), 160, 120, 8, 2, 1), "png"),
    "animated png": (encoded(PLAIN, "PNG", **SEVERAL), "first_frame png"),
    "palette": (encoded(PALETTE, "PNG"), "palette png"),
    "palette, clear": (encoded(PALETTE, "PNG", transparency=CLEAR), "alpha_dropped palette png"),
    "rgba": (encoded(RGBA, "PNG"), "alpha_dropped png"),
    "bmp": (encoded(PLAIN, "BMP"), "bmp"),
    "bmp of 32 bits": (encoded(RGBA, "BMP"), "bmp"),
    "bmp with palette": (encoded(PALETTE, "BMP"), "bmp palette"),
    "webp": (encoded(PLAIN, "WEBP"), "webp"),
    "webp, clear": (encoded(RGBA, "WEBP", lossless=True, exact=True), "alpha_dropped webp"),
    "animated webp": (encoded(PLAIN, "WEBP", **SEVERAL), "first_frame webp"),
    "tiff": (encoded(PLAIN, "TIFF"), "tiff"),
    "tiff, packed": (encoded(PLAIN, "TIFF", compression="packbits"), "tiff"),
    "tiff of two": (
        encoded(PLAIN.copy(), "TIFF", save_all=True, append_images=[OTHER.copy()]),
        "first_frame tiff",
    ),
    "tiff with palette": (encoded(PALETTE, "TIFF"), "palette tiff"),
    "ppm": (encoded(PLAIN, "PPM"), "ppm"),
    "gif": (encoded(PALETTE, "GIF"), "gif palette"),
    "gif, clear": (encoded(PALETTE, "GIF", transparency=3), "alpha_dropped gif palette"),
    "animated gif": (
        encoded(PALETTE, "GIF", save_all=True, append_images=[OTHER.quantize(64)]),
        "first_frame gif palette",
    ),
}
GREYS = {
    "grey jpeg": (encoded(GREY, quality=95), "grey"),
    "grey png": (encoded(GREY, "PNG"), "grey png"),
    "grey with alpha": (encoded(GREY.convert("LA"), "PNG"), "alpha_dropped grey png"),
    "grey of 16 bits": (encoded(DEEP_GREY, "PNG"), "16bit grey png"),
    "grey gif": (encoded(GREY, "GIF"), "gif palette"),
    "grey bmp": (encoded(GREY, "BMP"), "bmp grey"),
}


@pytest.mark.parametrize("name", COLOUR | GREYS)
def test_every_way_to_write_an_image_gives_its_colours(name):
    raw, fixes = (COLOUR | GREYS)[name]
    made, pixels = stored(raw), decode(raw)[0].astype(int)
    assert " ".join(made.fixes) == fixes
    drawn = np.asarray(PLAIN if name in COLOUR else GREY.convert("RGB"))
    assert np.abs(mean(pixels) - mean(drawn)).max() < 1.5
    if "16bit" in fixes:  # which Pillow reads otherwise
        assert np.abs(pixels - drawn).max() == 0
    else:
        plain = raw if "gzip" not in fixes else gzip.decompress(raw)
        assert np.abs(pixels - opened(plain)).max() <= 1
    assert (made.height, made.width) == pixels.shape[:2] == (120, 160)


def test_16_bits_keep_their_high_byte():
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, 3)).astype(np.uint16)
    np.testing.assert_array_equal(decode(png16(pixels))[0], pixels >> 8)


def test_black_and_white_becomes_rgb():
    pixels, found = decode(encoded(PLAIN.convert("1"), "PNG"))
    assert found == {"png", "grey"}
    assert set(np.unique(pixels)) == {0, 255}


def test_inks_that_differ_from_each_other_keep_their_colours():
    raw = encoded(Image.new("CMYK", (32, 32), (200, 30, 90, 60)), quality=95)
    expected = (255 - np.array([200, 30, 90.0])) * (255 - 60) / 255
    assert np.abs(mean(decode(raw)[0]) - expected).max() < 2


def test_sampling_that_the_fast_decoder_lacks_is_decoded_by_pillow():
    raw = unusual_sampling()
    pixels, fixes = decode(raw)
    assert fixes == set()
    np.testing.assert_array_equal(pixels, opened(raw))


CLEAN = encoded(PLAIN, quality=90)
END, ADOBE = len(CLEAN) - 2, b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x09"
HARMLESS = {
    "stray bytes before the end": CLEAN[:END] + bytes(50) + CLEAN[END:],
    "fill bytes as well": CLEAN[:END] + bytes(50) + b"\xff\xff" + CLEAN[END:],
    "stray bytes in the header": CLEAN[: (k := segment(CLEAN, 0xDB).start)] + b"abc" + CLEAN[k:],
    "JFIF of the future": patched(CLEAN, segment(CLEAN, 0xE0).start + 9, b"\x07"),
    "odd scan parameters": patched(CLEAN, segment(CLEAN, 0xDA).stop - 3, b"\x01\x3e\x00"),
    "unknown Adobe transform": CLEAN[:2] + ADOBE + without(CLEAN, 0xE0)[2:],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_oddities_that_touch_no_pixel_are_no_reason_to_lose_a_image(name):
    pixels, fixes = decode(HARMLESS[name])
    assert fixes == {"jpeg_warning_ignored"}
    np.testing.assert_array_equal(pixels, decode(CLEAN)[0])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(10))
def test_orientation_is_ignored_or_applied_as_asked(form, value):
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


def test_damaged_exif_is_no_news_about_the_pixels():
    raw = encoded(PLAIN, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xee" * 40)
    with warnings.catch_warnings(action="error"):
        assert stored(raw).fixes == ()


def test_the_jpeg_is_strict_rgb_420_of_the_crop_and_carries_nothing_else():
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


def test_a_turned_tiff_is_stored_as_pillow_shows_it():
    raw = turned(6, "TIFF")
    pixels, fixes = decode(raw)
    assert pixels.shape == (160, 120, 3) and fixes == {"tiff"}
    assert (pixels == opened(raw)).all()


def test_every_fix_that_is_explained_can_happen():
    raws = [raw for raw, _ in [*COLOUR.values(), *GREYS.values()]] + [*HARMLESS.values()]
    found = set().union(*(decode(raw)[1] for raw in [*raws, turned(3)]))
    assert found | decode(turned(3), "apply")[1] == set(FIXES)


def test_the_nasty_samples_get_their_expected_verdicts_and_colours(data_folder):
    folder = data_folder / "nasty-sample"
    with (folder / "expected.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    for row in rows:
        raw = (folder / row["file"]).read_bytes()
        made = to_stored(raw, *GEOMETRY)
        if isinstance(made, Rejected):
            assert row["verdict"] == "quarantine", row
            continue
        assert row["verdict"] == ("convert" if made.fixes else "ok"), row
        expected = [float(value) for value in row["mean_rgb_full_decode"].split()]
        np.testing.assert_allclose(mean(decode(raw)[0]), expected, atol=1.0)


# Quality


def decibels(pixels: np.ndarray, reference: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(pixels - reference).mean()))


def exact_crop(image: np.ndarray) -> np.ndarray:
    """float (227, 227, 3): Pillow's Lanczos in single precision, never rounded to integers."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = (int(width * 256 / short + 0.5), int(height * 256 / short + 0.5))
    left, top = (size[0] - 227) // 2, (size[1] - 227) // 2
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in image.transpose(2, 0, 1)]
    resized = [np.asarray(plane.resize(size, Image.Resampling.LANCZOS)) for plane in planes]
    return np.stack(resized, -1)[top : top + 227, left : left + 227].clip(0, 255)


def loss_of_quality(raw: bytes) -> float:
    """dB that the stored JPEG is worse than one encoded from the full-precision pixels."""
    reference = exact_crop(decode(raw)[0])
    made = stored(raw)
    assert decibels(made.pixels.transpose(1, 2, 0), reference) > 50  # rounding alone: 58.9
    rounded = Image.fromarray(np.rint(reference).astype(np.uint8))
    ideal = encoded(rounded, quality=90, subsampling="4:2:0")
    return decibels(opened(ideal), reference) - decibels(opened(made.jpeg), reference)


def test_stored_images_are_within_a_tenth_of_a_decibel_of_full_precision():
    grain = np.random.default_rng(0).normal(0, 12, (600, 450, 3))
    grainy = (np.asarray(image(600, 450, seed=3)) + grain).clip(0, 255).astype(np.uint8)
    assert loss_of_quality(encoded(Image.fromarray(grainy), quality=95)) < 0.1


def test_real_photos_lose_on_average_a_fraction_of_a_tenth_of_a_decibel(data_folder):
    with tarfile.open(data_folder / "photos-200.tar") as archive:
        members = [member for member in archive if member.isfile()][::10]
        losses = [loss_of_quality(archive.extractfile(member).read()) for member in members]
    assert np.mean(losses) < 0.05 and max(losses) < 0.5  # of 200: 0.015 and 0.30


def test_own_images_are_kept_byte_for_byte():
    jpeg = stored(encoded(image(120, 160), quality=95)).jpeg
    kept = keep_stored(jpeg, 227)
    assert isinstance(kept, Stored) and kept.jpeg is jpeg
    assert (kept.width, kept.height, kept.fixes) == (227, 227, ())
    assert kept.pixels.shape == (3, 227, 227) and kept.pixels.flags.c_contiguous
    np.testing.assert_array_equal(kept.pixels.transpose(1, 2, 0), opened(jpeg))


OWN = encoded(image(227, 227))


@pytest.mark.parametrize(
    ("raw", "reason", "detail"),
    [
        (encoded(image(227, 228)), "not_as_stored", "228×227 in 3 components, not 227×227 in 3"),
        (encoded(image(227, 227).convert("L")), "not_as_stored", "in 1 components"),
        (encoded(image(227, 227), "PNG"), "not_as_stored", "PNG"),
        (gzip.compress(OWN, mtime=0), "not_as_stored", "bytes beginning"),
        (b"", "zero_bytes", ""),
        (OWN[:-2], "truncated", "Premature end"),
        (OWN[:900] + OWN[-2:], "truncated", "premature end"),
        (OWN[:-2] + bytes(40) + OWN[-2:], "corrupt", "needs jpeg_warning_ignored"),
        (resized_jpeg(OWN, 60000, 60000), "too_many_pixels", ""),
    ],
)
def test_what_is_no_stored_image_is_not_kept(raw, reason, detail):
    kept = keep_stored(raw, 227)
    assert isinstance(kept, Rejected) and kept.reason == reason and detail in kept.detail
