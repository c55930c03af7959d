"""Images of many kinds to tensors, and tensors to named classes."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from alexnet.classifier import decode, top_k
from alexnet.errors import UserError
from alexnet.preprocess import InputSpec, centre_view

SPEC = InputSpec(
    resize=256,
    crop=240,
    mean=(120.0, 110.0, 100.0),
    std=(60.0, 58.0, 56.0),
    covariance=((3600.0, 0.0, 0.0), (0.0, 3364.0, 0.0), (0.0, 0.0, 3136.0)),
)


def image(height: int = 40, width: int = 60) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([4 * x, 4 * y, x + y], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_file_and_its_bytes_decode_to_the_same_pixels(tmp_path):
    path = tmp_path / "a.png"
    image().save(path)
    pixels = decode(path)
    assert pixels.shape == (3, 40, 60) and pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image()))
    assert torch.equal(decode(str(path)), pixels)
    assert torch.equal(decode(path.read_bytes()), pixels)


@pytest.mark.parametrize(("mode", "kind"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "GIF")])
def test_other_colour_models_become_rgb(mode, kind):
    content = encoded(image().convert(mode), kind)
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_array_equal(decode(content).permute(1, 2, 0).numpy(), np.asarray(expected))


def test_orientation_in_exif_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(encoded(image(), "JPEG", exif=exif)).shape == (3, 40, 60)


@pytest.mark.parametrize(
    "content",
    [
        b"no image at all",
        encoded(image(), "JPEG")[:-200],
        encoded(image(), "GIF")[:20],
        encoded(image(), "TIFF")[:30],
        encoded(image(), "PNG")[:33] + struct.pack(">I", 10) + b"IDAT" + bytes(10),
    ],
)
def test_damaged_images_are_refused_in_one_line(content):
    with pytest.raises(UserError, match=r"^cannot decode the image ") as caught:
        decode(content)
    assert "\n" not in str(caught.value)


def test_sixteen_bits_of_grey_are_refused_rather_than_cut_to_white():
    deep = Image.fromarray(np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16))
    with pytest.raises(UserError, match="more than 8 bits per pixel; save it with 8 first"):
        decode(encoded(deep))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nothing\.jpg: No such file"):
        decode(tmp_path / "nothing.jpg")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        decode(tmp_path)


@pytest.mark.parametrize("limit", [2000, 1000])
def test_images_beyond_pillows_limit_of_pixels_are_refused(monkeypatch, limit):
    """2400 pixels: Pillow itself warns above the limit, and raises above twice the limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=f"the image has more than {limit} pixels"):
        decode(encoded(image()))


LEVELS = [0, 50, 100, 150, 200]


class Brightness(nn.Linear):
    """Says which of the levels the red of a view is nearest to."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        red = x[:, 0, 0, 0] * SPEC.std[0] + SPEC.mean[0]
        return -(red[:, None] - torch.tensor(LEVELS)).abs() / 50


def test_top_k_names_the_likeliest_classes_of_each_image_batch_by_batch(monkeypatch):
    monkeypatch.setattr("alexnet.classifier.BATCH_SIZE", 2)
    images = torch.tensor(LEVELS, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 240, 240)
    model = Brightness()
    answer = top_k(model, images, SPEC, list("abcde"), 5)
    assert [row[0][0] for row in answer] == list("abcde")
    assert "".join(name for name, _ in answer[0]) == "abcde"
    odds = np.exp(-np.arange(5.0))
    assert [p for _, p in answer[0]] == pytest.approx(odds / odds.sum(), rel=1e-4)
    assert [len(x) for x in model.seen] == [2, 2, 1]
    assert torch.equal(torch.cat(model.seen), centre_view(images, SPEC))


def test_fewer_classes_than_k_give_them_all_and_none_is_refused():
    images = torch.zeros(1, 3, 240, 240, dtype=torch.uint8)
    assert len(top_k(Brightness(), images, SPEC, list("abcde"), 9)[0]) == 5
    assert top_k(Brightness(), images[:0], SPEC, list("abcde"), 1) == []
    with pytest.raises(UserError, match="cannot list the 0 likeliest classes; ask for 1 or more"):
        top_k(Brightness(), images, SPEC, list("abcde"), 0)
