"""pipelines/transform/: what resizing costs in quality, and keeping stored images, nothing."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from drawn import encoded, image
from forged import resized_jpeg
from PIL import Image

from pipelines.transform import Rejected, Stored, decode, keep_stored, to_stored

GEOMETRY = (256, 227, 90)


def stored(raw: bytes) -> Stored:
    made = to_stored(raw, *GEOMETRY)
    assert isinstance(made, Stored), made
    return made


def opened(raw: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(raw)) as image:
        return np.asarray(image.convert("RGB"))


def decibels(pixels: np.ndarray, reference: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(pixels - reference).mean()))


def exact_crop(image: np.ndarray) -> np.ndarray:
    """float (227, 227, 3): Pillow's Lanczos in single precision, never rounded to integers."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = (int(width * 256 / short + 0.5), int(height * 256 / short + 0.5))
    left, top = (size[0] - 227) // 2, (size[1] - 227) // 2
    channels = [Image.fromarray(plane.astype(np.float32)) for plane in image.transpose(2, 0, 1)]
    resized = [np.asarray(c.resize(size, Image.Resampling.LANCZOS)) for c in channels]
    return np.stack(resized, -1)[top : top + 227, left : left + 227].clip(0, 255)


def loss_of_quality(raw: bytes) -> float:
    """dB that the stored JPEG is worse than one encoded from the full-precision pixels."""
    reference = exact_crop(decode(raw)[0][..., :3])
    made = stored(raw)
    assert decibels(made.pixels.transpose(1, 2, 0), reference) > 50  # rounding alone: 58.9
    rounded = Image.fromarray(np.rint(reference).astype(np.uint8))
    ideal = encoded(rounded, quality=90, subsampling="4:2:0")
    return decibels(opened(ideal), reference) - decibels(opened(made.jpeg), reference)


@pytest.mark.parametrize("size", [(375, 500), (600, 450), (200, 260)])
def test_stored_images_are_within_a_tenth_of_a_decibel_of_full_precision(size: tuple) -> None:
    grain = np.random.default_rng(0).normal(0, 12, (*size, 3))
    grainy = (np.asarray(image(*size, seed=3)) + grain).clip(0, 255).astype(np.uint8)
    assert loss_of_quality(encoded(Image.fromarray(grainy), quality=95)) < 0.1


def test_real_photos_lose_on_average_a_fraction_of_a_tenth_of_a_decibel(data_folder: Path) -> None:
    with tarfile.open(data_folder / "photos-200.tar") as archive:
        members = [member for member in archive if member.isfile()][::10]
        losses = [loss_of_quality(archive.extractfile(member).read()) for member in members]
    assert np.mean(losses) < 0.05 and max(losses) < 0.5  # of 200: 0.015 and 0.30


def test_own_images_are_kept_byte_for_byte() -> None:
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
def test_what_is_no_stored_image_is_not_kept(raw: bytes, reason: str, detail: str) -> None:
    kept = keep_stored(raw, 227)
    assert isinstance(kept, Rejected) and kept.reason == reason and detail in kept.detail
