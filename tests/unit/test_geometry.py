"""resize_and_crop against Pillow, and the specification that carries the geometry."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import alexnet.preprocess as preprocess
from alexnet.errors import UserError
from alexnet.preprocess import InputSpec, resize_and_crop

IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
COVARIANCE = ((4900.0, 4400.0, 3900.0), (4400.0, 4600.0, 4300.0), (3900.0, 4300.0, 5200.0))


def spec_of(crop: int, covariance=IDENTITY, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)) -> InputSpec:
    return InputSpec(resize=256, crop=crop, mean=mean, std=std, covariance=covariance)


def smooth_image(height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): waves, sharp edges and a little noise."""
    y, x = np.mgrid[:height, :width]
    waves = 128 + 60 * np.sin(x / 9 + y / 17) + 40 * np.cos(y / 5)
    image = np.stack([waves, waves.T if height == width else 255 - waves, 0.7 * waves], axis=-1)
    image[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 60)
    noise = np.random.default_rng(0).normal(0, 10, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


def pillow_resize_and_crop(image: np.ndarray, resize: int, crop: int) -> np.ndarray:
    height, width = image.shape[:2]
    short = min(height, width)
    size = (math.floor(width * resize / short + 0.5), math.floor(height * resize / short + 0.5))
    resized = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - crop) // 2, (size[1] - crop) // 2
    return np.asarray(resized.crop((left, top, left + crop, top + crop)))


@pytest.mark.parametrize(
    ("height", "width", "resize", "crop"),
    [
        (375, 500, 256, 227),
        (500, 333, 256, 256),
        (97, 130, 256, 227),
        (256, 256, 256, 227),
        (227, 227, 227, 227),
        (1201, 800, 300, 241),
        (60, 480, 256, 227),
        (800, 101, 256, 227),
    ],
)
def test_resize_and_crop_gives_pillows_lanczos_pixels(height, width, resize, crop):
    image = smooth_image(height, width)
    ours = resize_and_crop(torch.from_numpy(image).permute(2, 0, 1), resize, crop)
    assert ours.shape == (3, crop, crop) and ours.dtype == torch.uint8
    theirs = pillow_resize_and_crop(image, resize, crop).transpose(2, 0, 1)
    difference = np.abs(ours.numpy().astype(int) - theirs)
    assert difference.max() <= 2  # torch's integer weights have fewer bits than Pillow's
    assert difference.mean() < 0.02


def test_memory_layout_does_not_change_the_pixels():
    rows_of_pixels = torch.from_numpy(smooth_image(301, 407)).permute(2, 0, 1)
    planes = rows_of_pixels.contiguous()
    assert rows_of_pixels.stride() != planes.stride()
    assert torch.equal(resize_and_crop(rows_of_pixels, 256, 227), resize_and_crop(planes, 256, 227))
    with_idle_channel = torch.cat([rows_of_pixels.permute(1, 2, 0)] * 2, -1)[..., :4].contiguous()
    found = resize_and_crop(with_idle_channel.permute(2, 0, 1), 256, 227)
    assert torch.equal(found[:3], resize_and_crop(planes, 256, 227))


@pytest.mark.parametrize(("height", "width"), [(1, 10_000), (10_000, 1), (1, 1), (3, 5000)])
def test_strips_do_not_explode(height, width, monkeypatch):
    sizes = []
    interpolate = preprocess.F.interpolate

    def recording(*arguments, **options):
        sizes.append(options["size"])
        return interpolate(*arguments, **options)

    monkeypatch.setattr(preprocess.F, "interpolate", recording)
    image = torch.full((3, height, width), 77, dtype=torch.uint8)
    found = resize_and_crop(image, 256, 227)
    assert found.shape == (3, 227, 227) and (found == 77).all()
    assert max(sizes[0]) <= 8 * 256


def test_a_strip_keeps_the_centre_that_pillow_shows():
    """A ramp along the strip: the cut may move it by a pixel of source and result, not more."""
    length = 9 * 60
    ramp = np.linspace(0, 255, length).astype(np.uint8)
    strip = np.broadcast_to(ramp[None, :, None], (60, length, 3)).copy()
    ours = resize_and_crop(torch.from_numpy(strip).permute(2, 0, 1), 256, 227)
    theirs = pillow_resize_and_crop(strip, 256, 227).transpose(2, 0, 1)
    assert np.abs(ours.numpy().astype(int) - theirs).max() <= 2


def test_a_torch_without_lanczos_is_named(monkeypatch):
    def old_interpolate(*_arguments, **_options):
        raise NotImplementedError("Input Error")

    monkeypatch.setattr(preprocess.F, "interpolate", old_interpolate)
    with pytest.raises(UserError, match=r"no Lanczos resize; install torch 2\.13 or later"):
        resize_and_crop(torch.zeros(3, 300, 300, dtype=torch.uint8), 256, 227)


def test_input_spec_survives_json():
    spec = spec_of(240, COVARIANCE, mean=(123.456, 117.1, 104.0), std=(58.4, 57.1, 57.4))
    document = json.loads(json.dumps(spec.to_json()))
    found = InputSpec.from_json(document)
    assert (found, hash(found), document) == (spec, hash(spec), spec.to_json())


@pytest.mark.parametrize(
    "change", [{"mean": [1, 2]}, {"covariance": [1, 2, 3]}, {"crop": None}, {"std": "abc"}]
)
def test_a_damaged_specification_is_refused(change):
    with pytest.raises(UserError, match="input specification is damaged"):
        InputSpec.from_json(spec_of(227).to_json() | change)
    document = spec_of(227).to_json()
    del document[next(iter(change))]
    with pytest.raises(UserError, match=f"damaged .*{next(iter(change))!r}"):
        InputSpec.from_json(document)


@pytest.mark.parametrize(
    ("resize", "crop", "std", "named"),
    [
        (256, 226, 1.0, "choose 227 <= crop <= resize"),
        (240, 241, 1.0, "choose 227 <= crop <= resize"),
        *((256, 227, std, "must be positive in every") for std in (0.0, math.nan, math.inf)),
    ],
)
def test_impossible_values_are_refused(resize, crop, std, named):
    with pytest.raises(UserError, match=named):
        InputSpec(resize, crop, (0.0,) * 3, (1.0, std, 1.0), IDENTITY)
