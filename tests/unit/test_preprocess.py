"""Views: colour noise against NumPy, positions on images that say where, draws by formula."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

import alexnet.preprocess as preprocess
from alexnet.errors import UserError
from alexnet.preprocess import (
    Augment,
    InputSpec,
    centre_view,
    draw_views,
    ten_crop,
    train_view,
)

IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
COVARIANCE = ((4900.0, 4400.0, 3900.0), (4400.0, 4600.0, 4300.0), (3900.0, 4300.0, 5200.0))
PLAIN = Augment(crop="centre", flip=False, colour_sigma=0.0)
RANDOM = Augment(crop="random", flip=False, colour_sigma=0.0)


def spec_of(crop: int, covariance=IDENTITY, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)) -> InputSpec:
    return InputSpec(resize=256, crop=crop, mean=mean, std=std, covariance=covariance)


SMALL = spec_of(227)


def coordinates(count: int, side: int) -> torch.Tensor:
    """Images whose red says the row, green the column and blue which image."""
    axis = torch.arange(side, dtype=torch.uint8)
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    images[:, 0] = axis[:, None]
    images[:, 1] = axis
    images[:, 2] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    return images


def noise_images(count: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def view(images, augment, spec=None, *, seed=0, epoch=0, ids=None) -> torch.Tensor:
    ids = torch.arange(len(images)) if ids is None else torch.tensor(ids)
    spec = spec or spec_of(images.shape[-1], COVARIANCE)
    drawn = draw_views(spec, augment, seed=seed, epoch=epoch, sample_ids=ids)
    return train_view(images, drawn, spec, augment)


# ---- random numbers


def splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_uniforms_are_splitmix64_of_seed_epoch_sample_and_draw():
    assert splitmix64(1234567) == 6457827717110365317  # the generator's published test vector
    for seed, epoch in [(0, 0), (42, 7), (2**63 - 1, 10**6)]:
        ids = [0, 1, 1_281_166, 2**40]
        keys = [splitmix64(splitmix64(splitmix64(seed) ^ epoch) ^ i) for i in ids]
        expected = [[(splitmix64(key ^ d) >> 11) / 2**53 for d in range(10)] for key in keys]
        assert preprocess.uniforms(seed, epoch, torch.tensor(ids), 10).tolist() == expected


@pytest.mark.parametrize("crop", ["random", "resized", "centre"])
def test_a_view_depends_on_its_sample_alone(crop):
    images = noise_images(6, 240)
    augment = Augment(crop=crop, flip=True, colour_sigma=0.1)
    ids = [5, 99, 3, 1_000_000, 0, 17]
    together = view(images, augment, ids=ids)
    torch.manual_seed(123)
    before, order = torch.get_rng_state(), [4, 0, 3]
    apart = view(images[order], augment, ids=[ids[i] for i in order])
    assert torch.equal(apart, together[order])
    assert torch.equal(torch.get_rng_state(), before), "no number of torch's generator is taken"


@pytest.mark.parametrize("crop", ["random", "resized"])
def test_epoch_seed_and_sample_each_change_the_view(crop):
    images, augment = noise_images(1, 256), Augment(crop=crop, flip=True, colour_sigma=0.1)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    views = [view(images, augment, seed=s, epoch=e, ids=[i]) for s, e, i in keys]
    assert len({tuple(v.flatten()[:50].tolist()) for v in views}) == len(keys)


# ---- crop and flip


def corners(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Row and column shown at the top left of each view of a coordinate image."""
    return x[:, 0, 0, 0].long().numpy(), x[:, 1, 0, 0].long().numpy()


def test_random_crops_reach_every_offset_equally():
    images = coordinates(1, 239).expand(200, -1, -1, -1)
    tops, lefts = zip(*(corners(view(images, RANDOM, epoch=e)) for e in range(3)), strict=True)
    for offsets in (np.concatenate(tops), np.concatenate(lefts)):
        counts = np.bincount(offsets, minlength=13)
        assert len(counts) == 13  # offsets 0 to 239 − 227
        assert stats.chisquare(counts).pvalue > 1e-4


def test_colour_noise_moves_no_crop_and_a_crop_is_a_window_of_its_own_image():
    images = coordinates(8, 256)
    quiet = view(images, RANDOM)
    for i, (top, left) in enumerate(zip(*corners(quiet), strict=True)):
        window = images[i, :, top : top + 227, left : left + 227]
        assert torch.equal(quiet[i], window.float())
    shift = view(images, Augment(crop="random", flip=False, colour_sigma=0.1)) - quiet
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-4)


def test_half_of_the_views_are_exact_mirror_images():
    images = coordinates(1, 227).expand(200, -1, -1, -1)
    x = view(images, Augment(crop="centre", flip=True, colour_sigma=0.0))
    mirrored = x[:, 1, 0, 0] == 226
    assert stats.binomtest(int(mirrored.sum()), 200).pvalue > 1e-4
    assert torch.equal(x[mirrored], images[mirrored].float().flip(-1))
    assert torch.equal(x[~mirrored], images[~mirrored].float())


def window_of(x: torch.Tensor) -> tuple[float, float, float, float]:
    """Top, bottom, left, right of the stored image that a view of a coordinate image shows:
    its centre and its scale, from the inner part that no border touches."""
    rows, columns = x[0, :, 113].double(), x[1, 113].double()
    edges = []
    for values in (rows, columns):
        slope = float(values[170] - values[60]) / 110
        middle = float(values[113]) + 0.5  # pixel centres lie at half coordinates
        edges += [middle - 113.5 * slope, middle + 113.5 * slope]
    return tuple(edges)


def test_resized_crops_keep_the_promised_area_and_ratio():
    side = 250
    images = coordinates(1, side).expand(150, -1, -1, -1)
    x = view(images, Augment(crop="resized", flip=False, colour_sigma=0.0))
    windows = np.array([window_of(v) for v in x])
    assert windows.min() > -0.1 and windows.max() < side + 0.1
    height, width = windows[:, 1] - windows[:, 0], windows[:, 3] - windows[:, 2]
    area, ratio = height * width / side**2, width / height
    assert 0.35 - 0.01 < area.min() < 0.45 and area.max() > 0.9
    assert 3 / 4 - 0.01 < ratio.min() < 0.85 and 1.2 < ratio.max() < 4 / 3 + 0.01
    free = side - width > 5
    place = (windows[:, 2] / np.maximum(side - width, 1e-9))[free]
    assert place.min() < 0.1 and place.max() > 0.9


def test_a_resized_crop_is_scipys_bilinear_sample_of_its_window():
    image = noise_images(1, 227)
    augment = Augment(crop="resized", flip=False, colour_sigma=0.0)
    top, bottom, left, right = window_of(view(coordinates(1, 227), augment, ids=[11])[0])
    steps = (np.arange(227) + 0.5) / 227
    rows, columns = top + (bottom - top) * steps - 0.5, left + (right - left) * steps - 0.5
    grid = np.meshgrid(rows, columns, indexing="ij")
    x = view(image, augment, ids=[11])[0].numpy()
    for ours, channel in zip(x, image[0].double().numpy(), strict=True):
        expected = ndimage.map_coordinates(channel, grid, order=1, mode="nearest")
        np.testing.assert_allclose(ours, expected, atol=0.1)


def test_a_resized_crop_can_be_mirrored():
    images = coordinates(1, 227).expand(8, -1, -1, -1)
    plain, maybe = (view(images, Augment("resized", flip, 0.0)) for flip in (False, True))
    mirrored = [not torch.equal(one, other) for one, other in zip(plain, maybe, strict=True)]
    assert 0 < sum(mirrored) < 8
    torch.testing.assert_close(maybe[mirrored], plain[mirrored].flip(-1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("cut", [lambda images: view(images, RANDOM), lambda i: ten_crop(i, SMALL)])
def test_windows_of_images_stored_at_227_are_refused(cut):
    with pytest.raises(UserError, match="--crop 256"):
        cut(noise_images(1, 227))


# ---- colour


def test_colour_noise_has_the_images_covariance_times_sigma_squared():
    colours = np.random.default_rng(1).multivariate_normal((120, 110, 100), COVARIANCE, 50_000)
    covariance = tuple(map(tuple, np.cov(colours.T).tolist()))
    draws = preprocess.uniforms(0, 0, torch.arange(40_000), 4)
    noise = preprocess.colour_noise(spec_of(227, covariance), 0.1, draws).numpy()
    np.testing.assert_allclose(np.cov(noise.T), 0.01 * np.cov(colours.T), rtol=0.03)
    assert np.abs(noise.mean(0)).max() < 5 * 0.1 * math.sqrt(5200 / 40_000)
    variances, components = np.linalg.eigh(np.cov(colours.T))
    for alpha in (noise @ components / np.sqrt(variances) / 0.1).T:
        assert stats.kstest(alpha, "norm").pvalue > 1e-4


def test_noise_is_added_before_normalisation_and_once_per_image():
    spec = spec_of(227, COVARIANCE, mean=(123.0, 117.0, 104.0), std=(58.0, 57.0, 57.5))
    images = noise_images(3, 227)
    x = view(images, Augment("centre", flip=False, colour_sigma=0.1), spec).double()
    std, mean = (torch.tensor(v).double()[:, None, None] for v in (spec.std, spec.mean))
    added = x * std + mean - images
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-3)
    draws = preprocess.uniforms(0, 0, torch.arange(3), preprocess.NUM_DRAWS)
    expected = preprocess.colour_noise(spec, 0.1, draws[:, preprocess.DRAW_COLOUR :])
    torch.testing.assert_close(added[:, :, 0, 0], expected, atol=1e-3, rtol=0)


# ---- test views


def test_centre_view_is_the_normalised_middle():
    spec = spec_of(256, mean=(123.0, 117.0, 104.0), std=(58.0, 57.0, 57.5))
    images = noise_images(2, 256)
    middle = images.numpy()[:, :, 14 : 14 + 227, 14 : 14 + 227].astype(np.float64)
    expected = (middle - np.reshape(spec.mean, (3, 1, 1))) / np.reshape(spec.std, (3, 1, 1))
    x = centre_view(images, spec)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-5)
    assert torch.equal(view(images, PLAIN, spec), x)


def test_ten_crop_shows_corners_centre_and_their_mirror_images():
    x = ten_crop(coordinates(2, 256), spec_of(256))
    assert x.shape == (2, 10, 3, 227, 227)
    rows, columns = x[:, :, 0, 0, 0], x[:, :, 1, 0, 0]
    assert rows[0].tolist() == [0, 0, 29, 29, 14] * 2
    assert columns[0].tolist() == [0, 29, 0, 29, 14, 226, 255, 226, 255, 240]
    assert torch.equal(x[:, 5:], x[:, :5].flip(-1))
    assert x[:, :, 2].amax((1, 2, 3)).tolist() == [0, 1]  # the views stay with their image
    spec = spec_of(256, mean=(123.0, 117.0, 104.0), std=(58.0, 57.0, 57.5))
    images = noise_images(2, 256)
    assert torch.equal(ten_crop(images, spec)[:, 4], centre_view(images, spec))
