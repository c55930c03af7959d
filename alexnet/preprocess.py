"""From images to the network's input: one geometry, the training views, the test views.

Everywhere `images` is uint8 (B, 3, S, S) with S = spec.crop, the stored side, and a view is
float32 (B, 3, 227, 227) on the same device, normalised per channel as (pixel − mean) / std.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet import NETWORK_SIDE
from alexnet.errors import UserError

# An image longer than this many times its shorter side is first cut to its centre.
MAX_ASPECT = 8
# Of a "resized" crop: share of the stored area, and width / height. Milder than the 0.08 usual for
# deeper nets: the stored images are centre crops already.
AREA_RANGE = (0.35, 1.0)
ASPECT_RANGE = (3 / 4, 4 / 3)

# Which column of the draws decides what. Fixed, so that switching one augmentation off leaves the
# others as they were. Three colour normals need two pairs of uniforms.
DRAW_TOP, DRAW_LEFT, DRAW_FLIP, DRAW_AREA, DRAW_ASPECT, DRAW_COLOUR = range(6)
NUM_DRAWS = DRAW_COLOUR + 4

Triple = tuple[float, float, float]
Compute = Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # as `view`


@dataclass(frozen=True)
class InputSpec:
    """Geometry and statistics that travel from the shards to the model.

    resize: shorter side in pixels; crop: stored side in pixels, 227 ≤ crop ≤ resize;
    mean, std, covariance: of RGB over the stored training pixels, in units of 0..255.
    Raises UserError for values outside these limits.
    """

    resize: int
    crop: int
    mean: Triple
    std: Triple
    covariance: tuple[Triple, Triple, Triple]

    def __post_init__(self) -> None:
        if not NETWORK_SIDE <= self.crop <= self.resize:
            raise UserError(
                f"resize {self.resize} with crop {self.crop} is impossible; "
                f"choose {NETWORK_SIDE} <= crop <= resize"
            )
        if not all(0 < value < math.inf for value in self.std):
            raise UserError(
                f"std {self.std} of the stored pixels must be positive in every channel; "
                "build shards from images that differ"
            )

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # lists for the tuples
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "InputSpec":
        """Raises UserError when a field is missing or has another shape."""
        try:
            first, second, third = document["covariance"]
            return cls(
                resize=int(document["resize"]),
                crop=int(document["crop"]),
                mean=_triple(document["mean"]),
                std=_triple(document["std"]),
                covariance=(_triple(first), _triple(second), _triple(third)),
            )
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(
                f"input specification is damaged ({error!r}); take it again from the shards' "
                "manifest or the registered model"
            ) from error


@dataclass(frozen=True)
class Augment:
    """crop: where a training view lies in the stored image:
      random   each 227×227 window equally likely, as in the paper; needs a stored side above 227
      resized  a window of 0.35 to 1 of the area, ratio 3/4 to 4/3, stretched to 227×227 bilinearly
      centre   the middle 227×227
    flip: mirror left to right with probability 1/2.
    colour_sigma: strength of the colour noise (see colour_noise); 0.1 in the paper, 0 for none.
    """

    crop: Literal["random", "resized", "centre"]
    flip: bool
    colour_sigma: float


def resize_and_crop(image: Tensor, resize: int, crop: int) -> Tensor:
    """uint8 (C, H, W) on the CPU → uint8 (C, crop, crop), possibly a view of a larger image.

    Fastest where a pixel's channels are neighbours in memory; so they are in the result, then. The
    shorter side becomes `resize`, the other long·resize/short rounded half up, by antialiased
    Lanczos (Pillow's filter); then the centre, with offset (side − crop) / 2 rounded down.

    An image longer than 8 times its shorter side is first cut to its centre of exactly 8 times
    (offset rounded down as well): the crop never sees the rest, and a 1×10000 strip would otherwise
    grow to 256×2,560,000 pixels. It moves the crop by less than one pixel of the source plus one of
    the result.

    Raises UserError where torch has no Lanczos filter, because any other gives other pixels.
    """
    assert image.dtype == torch.uint8 and image.ndim == 3 and image.device.type == "cpu"
    assert crop <= resize
    short = min(image.shape[1:])
    image = _centre(image, *(min(side, MAX_ASPECT * short) for side in image.shape[1:]))
    size = [(2 * side * resize + short) // (2 * short) for side in image.shape[1:]]
    # By all four strides torch sees that channels are neighbours, and `image[None]` has a wrong
    # first one: the pixels would be the same, but sorted by channel before and after.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    try:
        resized = F.interpolate(batch, size=size, mode="lanczos", antialias=True)[0]
    except NotImplementedError as error:  # of a torch without this mode
        raise UserError(
            f"torch {torch.__version__} has no Lanczos resize; install torch 2.13 or later"
        ) from error
    return _centre(resized, crop, crop)


def draw_views(
    spec: InputSpec, augment: Augment, *, seed: int, epoch: int, sample_ids: Tensor
) -> Tensor:
    """sample_ids: int64 (B,) → float32 (B, 9): where each training view lies, and its colour.

    Every random number is a hash of (seed, epoch, sample id, which draw): the view of a sample does
    not depend on its batch, its order, the worker or torch's own generator. It is drawn on the
    device of sample_ids: on the CPU it costs microseconds, and any thread may do it ahead.

    Columns 0-5: of a "resized" crop the rows of the matrix for affine_grid; of the others top and
    left in pixels, whether it is mirrored, and nothing. Columns 6-8: what is subtracted of RGB, the
    mean less the colour noise. Raises UserError for crop "random" on images stored at 227×227.
    """
    draws = uniforms(seed, epoch, sample_ids, NUM_DRAWS)
    mirrored = (draws[:, DRAW_FLIP] < 0.5) & augment.flip
    noise = colour_noise(spec, augment.colour_sigma, draws[:, DRAW_COLOUR:])
    shift = torch.tensor([spec.mean], dtype=torch.float64, device=noise.device) - noise
    if augment.crop == "resized":
        place = _resized_places(draws, mirrored)
    else:
        place = draws.new_zeros(len(draws), 6)
        place[:, 0], place[:, 1] = _offsets(draws, spec, augment)
        place[:, 2] = mirrored
    return torch.cat([place, shift], dim=1).float()


def train_view(
    images: Tensor, drawn: Tensor, spec: InputSpec, augment: Augment, compute: Compute | None = None
) -> Tensor:
    """Crop, flip, colour and normalisation, batched on the device of both. drawn: of draw_views,
    for the same spec and augment. compute: `view` as a compiler made it, or as it is by default."""
    _check_stored(images, spec)
    std = _statistics(spec, images.device)[1]
    return (compute or view)(images, drawn, std, augment.crop == "resized")


def view(images: Tensor, drawn: Tensor, std: Tensor, resized: bool) -> Tensor:
    """What train_view computes, of tensors alone: a compiler makes one kernel of it."""
    x = (_resized_windows if resized else _windows)(images, drawn[:, :6])
    return (x - drawn[:, 6:, None, None]).div_(std)


def centre_view(images: Tensor, spec: InputSpec) -> Tensor:
    """The middle 227×227, offset (S − 227) / 2 rounded down."""
    _check_stored(images, spec)
    return _normalise(_centre(images, NETWORK_SIDE, NETWORK_SIDE), spec)


def ten_crop(images: Tensor, spec: InputSpec) -> Tensor:
    """float32 (B, 10, 3, 227, 227): top left, top right, bottom left, bottom right, centre, and
    then the mirror images of these five in the same order (paper, section 4.1).

    Raises UserError for images stored at 227×227, where all ten would be two.
    """
    _check_stored(images, spec)
    margin = spec.crop - NETWORK_SIDE
    if margin == 0:
        raise UserError(
            "ten-crop needs images stored larger than 227×227; rebuild the shards with "
            "--crop 256 or evaluate the centre view"
        )
    places = [(0, 0), (0, margin), (margin, 0), (margin, margin), (margin // 2, margin // 2)]
    side = NETWORK_SIDE
    crops = [images[..., top : top + side, left : left + side] for top, left in places]
    views = torch.stack(crops + [crop.flip(-1) for crop in crops], dim=1)
    return _normalise(views.flatten(0, 1), spec).reshape(views.shape)


def average_probabilities(logits: Tensor) -> Tensor:
    """(B, V, C) logits of V views → (B, C) mean of their softmax, as the paper's test does."""
    return logits.float().softmax(-1).mean(1)


def colour_noise(spec: InputSpec, sigma: float, draws: Tensor) -> Tensor:
    """draws (B, 4), uniform in [0, 1) → float64 (B, 3), in grey levels, to add to every pixel.

    Paper, section 4.1: principal components of RGB times normal numbers of std 0.1. Its formula
    multiplies them by the eigenvalues λ, so that its effect depends on the pixels' unit; the 2012
    source multiplies by √λ, the standard deviations, and then divides the image by 1 + 0.1. Here:
    √λ, without that division, since the views are normalised by fixed statistics anyway.

    So the noise is normal with covariance sigma²·spec.covariance. Its symmetric root V·√λ·Vᵀ does
    not depend on the signs that an eigenvalue routine happens to give V.
    """
    return sigma * _normals(draws)[:, :3] @ _root(spec.covariance).to(draws.device)


def uniforms(seed: int, epoch: int, sample_ids: Tensor, count: int) -> Tensor:
    """float64 (B, count) in [0, 1), the same bits on every device. seed, epoch: 0 to 2^63 − 1."""
    ids = sample_ids.to(torch.int64)
    key = _hash(_hash(_hash(torch.full_like(ids, seed)) ^ epoch) ^ ids)
    bits = _hash(key[:, None] ^ torch.arange(count, device=ids.device))
    return _shift_right(bits, 11).double() * 2.0**-53


@functools.lru_cache
def _root(covariance: tuple[Triple, Triple, Triple]) -> Tensor:
    """float64 (3, 3), symmetric, on the CPU."""
    variances, components = torch.linalg.eigh(torch.tensor(covariance, dtype=torch.float64))
    root: Tensor = components @ variances.clamp(min=0).sqrt().diag() @ components.T
    return root


def _hash(state: Tensor) -> Tensor:
    """The next output of splitmix64 (Steele, Lea, Flood 2014) from each int64 state: the signed
    product wraps around to the bits of the unsigned one, which torch lacks."""
    z = state + (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ _shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shift_right(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shift_right(z, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Without copies of the sign: torch's own shift of int64 is arithmetic."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _normals(draws: Tensor) -> Tensor:
    """Box–Muller: (B, 2n) uniforms in [0, 1) → (B, 2n) independent standard normals."""
    radius = (-2 * torch.log1p(-draws[:, 0::2])).sqrt()
    angle = 2 * math.pi * draws[:, 1::2]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)


def _offsets(draws: Tensor, spec: InputSpec, augment: Augment) -> tuple[Tensor, Tensor]:
    margin = spec.crop - NETWORK_SIDE
    if augment.crop == "centre":
        middle = torch.full_like(draws[:, 0], margin // 2, dtype=torch.int64)
        return middle, middle
    if margin == 0:
        raise UserError(
            "crop 'random' needs images stored larger than 227×227; rebuild the shards with "
            "--crop 256 or use crop 'resized'"
        )
    places = (draws * (margin + 1)).long()
    return places[:, DRAW_TOP], places[:, DRAW_LEFT]


def _windows(images: Tensor, place: Tensor) -> Tensor:
    """uint8 (B, 3, 227, 227): each sample's window, mirrored where asked."""
    # All windows as one strided view: picking from it copies only what is picked.
    every = images.unfold(2, NETWORK_SIDE, 1).unfold(3, NETWORK_SIDE, 1)
    top, left, mirrored = place[:, :3].long().unbind(1)
    windows = every[torch.arange(len(images), device=images.device), :, top, left]
    return torch.where(mirrored.bool()[:, None, None, None], windows.flip(-1), windows)


def _resized_places(draws: Tensor, mirrored: Tensor) -> Tensor:
    """float64 (B, 6). A window's side that would exceed the image's is cut to it."""
    area = AREA_RANGE[0] + (AREA_RANGE[1] - AREA_RANGE[0]) * draws[:, DRAW_AREA]
    low, high = map(math.log, ASPECT_RANGE)
    aspect = (low + (high - low) * draws[:, DRAW_ASPECT]).exp()
    width = (area * aspect).sqrt().clamp(max=1)  # as shares of the image's side
    height = (area / aspect).sqrt().clamp(max=1)
    # In grid_sample's coordinates the image spans −1 to 1: a window has room 1 − side around 0.
    theta = draws.new_zeros(len(draws), 2, 3)
    theta[:, 0, 0] = torch.where(mirrored, -width, width)
    theta[:, 0, 2] = (2 * draws[:, DRAW_LEFT] - 1) * (1 - width)
    theta[:, 1, 1] = height
    theta[:, 1, 2] = (2 * draws[:, DRAW_TOP] - 1) * (1 - height)
    return theta.flatten(1)


def _resized_windows(images: Tensor, place: Tensor) -> Tensor:
    """float32 (B, 3, 227, 227). The grid is affine_grid's, whose general product takes ten times as
    long on CPUs."""
    side, matrix = NETWORK_SIDE, place.reshape(-1, 2, 3)
    centres = torch.linspace(-1, 1, side, device=place.device) * ((side - 1) / side)
    x, y = (matrix[:, row, row, None] * centres + matrix[:, row, 2:] for row in (0, 1))
    shape = len(images), side, side
    grid = torch.stack([x[:, None].expand(shape), y[..., None].expand(shape)], dim=-1)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def _centre(images: Tensor, height: int, width: int) -> Tensor:
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def _normalise(x: Tensor, spec: InputSpec) -> Tensor:
    """(N, 3, 227, 227) → float32 (x − mean) / std."""
    mean, std = _statistics(spec, x.device)
    return (x - mean).div_(std)


@functools.lru_cache
def _statistics(spec: InputSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """mean and std, float32 (3, 1, 1), made once: whoever sends them to a GPU waits for it."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(v, dtype=torch.float64).float() for v in (spec.mean, spec.std))
        return mean.to(device)[:, None, None], std.to(device)[:, None, None]


def _check_stored(images: Tensor, spec: InputSpec) -> None:
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, spec.crop, spec.crop)


def _triple(values: Any) -> Triple:
    first, second, third = map(float, values)
    return first, second, third
