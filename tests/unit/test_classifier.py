"""Images of many kinds to tensors, and tensors to named classes."""

import io
import struct
import warnings

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


def test_odd_metadata_is_no_reason_to_warn():
    palette = image().convert("P")
    content = encoded(palette, transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(content).shape == (3, 40, 60)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image at all",
        encoded(image(), "JPEG")[:-200],
        encoded(image(), "PNG")[:-60],
        encoded(image(), "GIF")[:20],
        encoded(image(), "TIFF")[:30],
        encoded(image(), "BMP")[:40],
        encoded(image(), "PNG")[:33] + struct.pack(">I", 10) + b"IDAT" + bytes(10),
    ],
)
def test_damaged_images_are_refused_in_one_line(content):
    with pytest.raises(UserError, match=r"^cannot decode the image ") as caught:
        decode(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM"])
def test_whatever_the_damage_the_answer_is_pixels_or_one_line(kind):
    rng = np.random.default_rng(0)
    whole = np.frombuffer(encoded(image(), kind), np.uint8)
    for _ in range(40):
        content = whole.copy()
        places = rng.integers(0, min(len(content), 200), 4)
        content[places] = rng.integers(0, 256, 4)
        try:
            assert decode(content.tobytes()).ndim == 3
        except UserError as error:
            assert "\n" not in str(error)


def test_what_is_no_image_is_told_which_kinds_are():
    with pytest.raises(UserError, match="it is none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM"):
        decode(b"GIT")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_refused_rather_than_cut_to_white(kind):
    deep = Image.fromarray(np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16))
    with pytest.raises(UserError, match="more than 8 bits per pixel; save it with 8 first"):
        decode(encoded(deep, kind))


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


class Fixed(nn.Module):
    """Logits known beforehand; remembers the views it was shown."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return self.logits[x[:, 0, 0, 0].argsort().argsort()]


def test_top_k_names_the_likeliest_classes_with_their_probabilities():
    odds = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]])
    images = torch.zeros(2, 3, 240, 240, dtype=torch.uint8)
    images[1] = 200
    model = Fixed(odds.log())
    answer = top_k(model, images, SPEC, ["cat", "dog", "eel"], 2)
    assert [[name for name, _ in row] for row in answer] == [["dog", "eel"], ["cat", "eel"]]
    assert [p for row in answer for _, p in row] == pytest.approx([0.5, 0.3, 0.7, 0.2])
    assert torch.equal(model.seen[0], centre_view(images, SPEC))


def test_many_images_are_taken_in_batches_and_stay_in_order(monkeypatch):
    monkeypatch.setattr("alexnet.classifier.BATCH_SIZE", 2)
    images = torch.zeros(5, 3, 240, 240, dtype=torch.uint8)
    images += torch.tensor([0, 50, 100, 150, 200], dtype=torch.uint8)[:, None, None, None]

    class Brightness(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert len(x) <= 2
            red = x[:, 0, 0, 0] * 60 + 120
            return -(red[:, None] - torch.tensor([0.0, 50, 100, 150, 200])).abs()

    answer = top_k(Brightness(1, 1), images, SPEC, list("abcde"), 1)
    assert [row[0][0] for row in answer] == list("abcde")


def test_fewer_classes_than_k_give_them_all_and_none_is_refused():
    model, images = Fixed(torch.zeros(1, 3)), torch.zeros(1, 3, 240, 240, dtype=torch.uint8)
    assert len(top_k(model, images, SPEC, ["a", "b", "c"], 5)[0]) == 3
    assert top_k(model, images[:0], SPEC, ["a", "b", "c"], 1) == []
    with pytest.raises(UserError, match="cannot list the 0 likeliest classes; ask for 1 or more"):
        top_k(model, images, SPEC, ["a", "b", "c"], 0)
