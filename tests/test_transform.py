"""pipelines/transform.py: every picture gets a verdict, with Pillow as the second opinion."""

import csv
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from drawn import encoded, picture
from PIL import Image

from pipelines.transform import Rejected, Stored, decode, to_stored

GEOMETRY = (256, 227, 90)


def mean(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(-1, 3).mean(axis=0)


def stored(raw: bytes) -> Stored:
    made = to_stored(raw, *GEOMETRY)
    assert isinstance(made, Stored), made
    return made


def rejected(raw: bytes) -> str:
    made = to_stored(raw, *GEOMETRY)
    assert isinstance(made, Rejected)
    return made.reason


PLAIN = picture(375, 500, seed=1)


def test_the_stored_picture_is_pillows_lanczos_resize_and_centre_crop() -> None:
    raw = encoded(PLAIN, quality=95)
    made = stored(raw)
    with Image.open(io.BytesIO(raw)) as source:
        resized = source.convert("RGB").resize((341, 256), Image.Resampling.LANCZOS)
    expected = np.asarray(resized.crop((57, 14, 57 + 227, 14 + 227)), np.float64)
    difference = made.pixels.transpose(1, 2, 0) - expected
    assert np.sqrt((difference**2).mean()) < 1  # above 48 dB
    assert (made.width, made.height, made.fixes) == (500, 375, ())


def test_the_jpeg_is_strict_rgb_420_of_the_crop_and_carries_nothing_else() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret place"
    raw = encoded(PLAIN, quality=95, exif=exif, comment=b"hello", icc_profile=b"x" * 300)
    made = stored(raw)
    assert made.fixes == ("exif_orientation_ignored",)
    with Image.open(io.BytesIO(made.jpeg)) as image:
        image.load()
        assert (image.size, image.mode, image.format) == ((227, 227), "RGB", "JPEG")
        assert image.layer[0][1:3] == (2, 2) and image.layer[1][1:3] == (1, 1)
        assert not image.getexif() and not {"comment", "icc_profile"} & image.info.keys()
        # As the raw pixels lie: the orientation in EXIF is not applied.
        assert np.abs(mean(np.asarray(image)) - mean(made.pixels.transpose(1, 2, 0))).max() < 1


def test_equal_input_gives_equal_bytes() -> None:
    raw = encoded(PLAIN)
    assert stored(raw).jpeg == stored(raw).jpeg


RGBA = PLAIN.copy()
RGBA.putalpha(128)


@pytest.mark.parametrize(
    ("raw", "fixes"),
    [
        (encoded(PLAIN, quality=95), set()),
        (encoded(PLAIN, quality=95, progressive=True), set()),
        (encoded(PLAIN, quality=95, keep_rgb=True, subsampling=0), set()),
        (encoded(PLAIN, "PNG"), {"png"}),
        (encoded(PLAIN, "BMP"), {"bmp"}),
        (encoded(PLAIN, "WEBP", lossless=True), {"webp"}),
        (encoded(PLAIN.quantize(64), "GIF"), {"gif", "palette"}),
        (encoded(PLAIN.quantize(64), "PNG"), {"png", "palette"}),
        (encoded(RGBA, "PNG"), {"png", "alpha_dropped"}),
        (encoded(PLAIN.convert("CMYK"), quality=95), {"cmyk"}),
        (
            encoded(PLAIN, "MPO", save_all=True, append_images=[picture(375, 500, seed=2)]),
            {"mpo_first_frame"},
        ),
        (
            encoded(PLAIN, "WEBP", lossless=True, save_all=True, append_images=[RGBA]),
            {"webp", "first_frame"},
        ),
    ],
)
def test_every_way_to_write_a_colour_picture_gives_its_colours(raw: bytes, fixes: set[str]) -> None:
    pixels, found = decode(raw)
    assert found - {"alpha_dropped"} == fixes - {"alpha_dropped"}
    assert np.abs(mean(pixels) - mean(np.asarray(PLAIN))).max() < 3
    assert pixels.shape == (375, 500, 3)
    stored(raw)


@pytest.mark.parametrize(
    ("raw", "fixes"),
    [
        (encoded(PLAIN.convert("L"), quality=95), {"grey"}),
        (encoded(PLAIN.convert("L"), "PNG"), {"png", "grey"}),
        (encoded(PLAIN.convert("LA"), "PNG"), {"png", "grey", "alpha_dropped"}),
        (
            encoded(Image.fromarray(np.asarray(PLAIN.convert("L")).astype(np.uint16) * 257), "PNG"),
            {"png", "16bit", "grey"},
        ),
    ],
)
def test_a_grey_picture_becomes_rgb_with_equal_channels(raw: bytes, fixes: set[str]) -> None:
    pixels, found = decode(raw)
    assert found == fixes
    assert (pixels == pixels[..., :1]).all()
    assert abs(pixels.mean() - np.asarray(PLAIN.convert("L")).mean()) < 1


def test_black_and_white_becomes_rgb() -> None:
    pixels, found = decode(encoded(PLAIN.convert("1"), "PNG"))
    assert found == {"png", "grey"}
    assert set(np.unique(pixels)) == {0, 255}


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 2}])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8, 0.99])
def test_a_cut_jpeg_never_passes_not_even_with_an_end_mark(
    options: dict[str, object], share: float
) -> None:
    raw = encoded(PLAIN, quality=90, **options)
    cut = raw[: int(len(raw) * share)]
    assert rejected(cut) in ("truncated", "corrupt")
    if not options.get("progressive"):  # whose later scans may be missing without a trace
        assert rejected(cut + b"\xff\xd9") in ("truncated", "corrupt")


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP", "BMP"])
def test_other_formats_cut_in_half_never_pass(form: str) -> None:
    raw = encoded(PLAIN.quantize(64) if form == "GIF" else PLAIN, form)
    assert rejected(raw[: len(raw) // 2]) in ("truncated", "corrupt")


def test_a_cut_cmyk_jpeg_never_passes() -> None:
    raw = encoded(PLAIN.convert("CMYK"), quality=90)
    assert rejected(raw[: len(raw) // 2]) == "truncated"
    assert rejected(raw[: len(raw) // 2] + b"\xff\xd9") in ("truncated", "corrupt")


def test_stray_bytes_between_markers_are_no_reason_to_lose_a_picture() -> None:
    raw = encoded(PLAIN, quality=90)
    made = stored(raw[:-2] + bytes(7) + raw[-2:])
    assert made.fixes == ("jpeg_warning_ignored",)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "zero_bytes"),
        (b"<!DOCTYPE html><title>404</title>", "not_an_image"),
        (b"\xff\xd8", "not_an_image"),
        (bytes(5000), "not_an_image"),
    ],
)
def test_what_is_no_picture_is_rejected(raw: bytes, reason: str) -> None:
    assert rejected(raw) == reason


def test_absurd_sizes_are_refused_before_anything_is_allocated() -> None:
    raw = bytearray(encoded(picture(16, 16)))
    frame = raw.index(b"\xff\xc0")  # SOF0: length, precision, height, width
    for height, width in ((65535, 65535), (12000, 8000)):
        raw[frame + 5 : frame + 9] = height.to_bytes(2) + width.to_bytes(2)
        assert rejected(bytes(raw)) == "too_many_pixels"


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (3000, 3), (20, 17)])
def test_tiny_and_extreme_shapes_are_enlarged_and_cropped(size: tuple[int, int]) -> None:
    made = stored(encoded(picture(*size)))
    assert made.pixels.shape == (3, 227, 227)
    assert (made.height, made.width) == size


def test_damaged_exif_is_no_news_about_the_pixels() -> None:
    raw = encoded(PLAIN, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xee" * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored(raw)


def test_the_nasty_sample_gets_its_expected_verdicts(data_folder: Path) -> None:
    folder = data_folder / "nasty-sample"
    with (folder / "expected.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        raw = (folder / row["file"]).read_bytes()
        made = to_stored(raw, *GEOMETRY)
        verdict = "quarantine" if isinstance(made, Rejected) else "convert" if made.fixes else "ok"
        assert (row["file"], verdict) == (row["file"], row["verdict"])
        if row["mean_rgb_full_decode"]:
            expected = [float(value) for value in row["mean_rgb_full_decode"].split()]
            np.testing.assert_allclose(mean(decode(raw)[0]), expected, atol=0.15)
