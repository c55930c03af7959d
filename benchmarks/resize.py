"""Claim: the builder turns raw JPEGs into stored ones faster than the usual script, as well.

Quality is measured against a Lanczos resize in double precision that rounds once, at its end.
"""

import io
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.images import QUALITY, RESIZE, Raw
from benchmarks.table import Bars, Table, spread
from pipelines.transform import Stored, decode, to_stored

COLUMNS = (
    "path",
    "img/s per core",
    "ratio",
    "PSNR before encoding, dB (worst)",
    "PSNR after, dB",
    "kB",
)
CROP = 227
_LANCZOS = Image.Resampling.LANCZOS
_SUPPORT = 3.0  # lobes of the Lanczos window

Pixels = NDArray[np.uint8]
Result = tuple[Pixels, bytes]  # (227, 227, 3), and its JPEG
Path = Callable[[bytes], Result]


def run(raw: Raw, rounds: int = 5) -> Table:
    """Each round runs every path over all images, in turn, in alternating order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for path in PATHS.values():
            path(raw.jpegs[0])  # what is loaded or compiled on first use
        rates = _rates(raw, rounds)
        quality = _quality(raw)
    finally:
        torch.set_num_threads(threads)
    usual = rates["usual Pillow script"]
    rows = []
    for name in PATHS:
        ratios = [mine / theirs for mine, theirs in zip(rates[name], usual, strict=True)]
        rows.append((name, spread(rates[name]), spread(ratios, 2), *quality[name]))
    setting = (
        f"{raw.origin}; shorter side {RESIZE}, centre crop {CROP}, JPEG quality {QUALITY} 4:2:0; "
        f"one thread, in memory; seconds of CPU time; {rounds} rounds, median [lowest..highest], "
        "ratios within a round."
    )
    chart = Bars("raw JPEG to stored JPEG, img/s per core of CPU time", rates)
    return Table(COLUMNS, tuple(rows), setting, chart)


def _rates(raw: Raw, rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in PATHS}
    for number in range(rounds):
        for name in list(PATHS)[:: 1 if number % 2 == 0 else -1]:
            start = time.process_time()
            for jpeg in raw.jpegs:
                PATHS[name](jpeg)
            rates[name].append(len(raw.jpegs) / (time.process_time() - start))
    return rates


def usual(jpeg: bytes) -> Result:
    """What every tutorial does: resize the whole image, then crop."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    width, height, left, top = _geometry(*image.size)
    image = image.resize((width, height), _LANCZOS)
    image = image.crop((left, top, left + CROP, top + CROP))
    return _encoded(image)


def boxed(jpeg: bytes) -> Result:
    """Pillow as its reference manual allows: the crop's part alone is resized."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    width, height, left, top = _geometry(*image.size)
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + CROP) * across, (top + CROP) * down)
    return _encoded(image.resize((CROP, CROP), _LANCZOS, box=box))


def ours(jpeg: bytes) -> Result:
    """What the builder runs, with all its checks."""
    result = to_stored(jpeg, RESIZE, CROP, QUALITY)
    assert isinstance(result, Stored)
    return result.pixels.transpose(1, 2, 0), result.jpeg


PATHS: dict[str, Path] = {
    "usual Pillow script": usual,
    "Pillow, resize and crop in one": boxed,
    "pipelines.transform": ours,
}


def _geometry(
    width: int, height: int, resize: int = RESIZE, crop: int = CROP
) -> tuple[int, int, int, int]:
    """Size after the resize, then left and top of the crop; the builder's own rounding."""
    short = min(width, height)
    wide, high = ((2 * side * resize + short) // (2 * short) for side in (width, height))
    return wide, high, (wide - crop) // 2, (high - crop) // 2


def _encoded(image: Image.Image) -> Result:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return np.asarray(image), buffer.getvalue()


def _quality(raw: Raw) -> dict[str, tuple[str, str, str]]:
    """Per path: mean and worst PSNR of the pixels, mean PSNR of the JPEG, and its mean size."""
    figures: dict[str, list[tuple[float, float, int]]] = {name: [] for name in PATHS}
    for jpeg in raw.jpegs:
        wanted = reference(jpeg)
        for name, path in PATHS.items():
            pixels, encoded = path(jpeg)
            shown = np.asarray(Image.open(io.BytesIO(encoded)))
            figures[name].append((psnr(pixels, wanted), psnr(shown, wanted), len(encoded)))
    quality = {}
    for name, rows in figures.items():
        before, after, size = np.mean(rows, axis=0)
        worst = min(row[0] for row in rows)
        quality[name] = (f"{before:.1f} ({worst:.1f})", f"{after:.2f}", f"{size / 1000:.1f}")
    return quality


def reference(jpeg: bytes, resize: int = RESIZE, crop: int = CROP) -> NDArray[np.float64]:
    """float64 (crop, crop, 3) in 0..255: both passes in double precision, clipped, not rounded."""
    pixels = decode(jpeg)[0][..., :3].astype(np.float64)
    width, height, left, top = _geometry(pixels.shape[1], pixels.shape[0], resize, crop)
    rows = _weights(pixels.shape[0], height)[top : top + crop]
    columns = _weights(pixels.shape[1], width)[left : left + crop]
    cut: NDArray[np.float64] = np.einsum("yh,hwc,xw->yxc", rows, pixels, columns, optimize=True)
    return cut.clip(0, 255)


def _weights(source: int, target: int) -> NDArray[np.float64]:
    """(target, source): row i holds the share of every source sample in target sample i."""
    scale = source / target
    stretch = max(scale, 1.0)  # antialiasing: the window grows when the image shrinks
    centres = (np.arange(target) + 0.5) * scale
    distance = (np.arange(source)[None, :] + 0.5 - centres[:, None]) / stretch
    window = np.where(abs(distance) < _SUPPORT, np.sinc(distance / _SUPPORT), 0.0)
    weights = np.sinc(distance) * window
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def psnr(pixels: Pixels, wanted: NDArray[np.float64]) -> float:
    error = float(np.mean((pixels.astype(np.float64) - wanted) ** 2))
    return 10 * float(np.log10(255**2 / error))
