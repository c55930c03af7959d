"""pipelines/report/lenient.py: what can be seen of a damaged picture, without harm to anybody."""

import io
import struct

import numpy as np
import pytest
from drawn import encoded, jpeg, picture
from PIL import Image, ImageFile

from pipelines.report import lenient


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64)


def claiming(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    raw = jpeg()
    at = raw.index(b"\xff\xc0") + 5
    return raw[:at] + struct.pack(">HH", height, width) + raw[at + 4 :]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP"])
def test_the_part_of_a_cut_picture_that_is_there_is_shown(form: str) -> None:
    whole = picture(height=240, width=320, seed=3)
    raw = encoded(whole, form)
    (seen,) = lenient.thumbnails([raw[: len(raw) * 3 // 4]])
    shown = pixels(seen)
    assert shown.shape == (120, 160, 3)
    small = np.asarray(whole.resize((160, 120), Image.Resampling.BICUBIC), np.float64)
    rows = slice(70, 120) if form == "BMP" else slice(0, 50)  # a BMP begins with the last row
    assert np.abs(shown[rows] - small[rows]).mean() < 12
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_each_picture_has_its_answer_and_what_is_none_has_an_empty_one() -> None:
    raws = [b"", b"<html>", jpeg(1), claiming(65535, 65535), claiming(5000, 5000), jpeg(2)[:9]]
    seen = list(lenient.thumbnails([*raws, encoded(picture(), "PNG")]))
    assert [len(data) > 0 for data in seen] == [False, False, True, False, False, False, True]


def test_a_process_that_dies_costs_one_picture() -> None:
    answers = lenient.thumbnails([jpeg(1), jpeg(2), jpeg(3)])
    first = next(answers)
    answers.gi_frame.f_locals["process"].kill()  # as a crash in a decoder would
    assert first
    assert next(answers) == b""
    assert next(answers)
