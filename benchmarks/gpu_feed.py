"""Whether a GPU is fed: the training loop from shards beside --synthetic, and JPEG decoders.

The loop needs pyarrow, simplejpeg, safetensors and tyro; where one is missing, its row says so.
"""

import contextlib
import dataclasses
import importlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from alexnet.errors import UserError
from benchmarks.table import Bars, Table, spread

COLUMNS = (
    "images come from",
    "img/s",
    "ratio to --synthetic",
    "utilization",
    "MFU",
    "memory, GB",
    "an epoch of ImageNet, s (extrapolated)",
    "90 epochs, min (extrapolated)",
)
DECODERS = ("decoder", "img/s")
SYNTHETIC = "nowhere: --synthetic"
WAYS: dict[str, dict[str, Any]] = {
    SYNTHETIC: {"synthetic": True},
    "shards, decoded on the CPUs": {},
}
_IMAGENET = 1_281_167
_SIDE = 227


@dataclass(frozen=True)
class Scale:
    batch: int = 512
    steps: int = 20  # in each round
    classes: int = 1000
    width: float = 1.0
    decoded: int = 256  # JPEGs in a call of a decoder
    calls: int = 8  # in each round


class _Enough(Exception):
    """Ends a training that has been watched long enough."""


def run(device: torch.device, rounds: int, scale: Scale) -> Table:
    """Two readings in each epoch, from the second epoch on."""
    threads = len(os.sched_getaffinity(0))
    rows, rates = [], {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        uri = ""
        for name, settings in WAYS.items():
            try:
                uri = uri or _shards(Path(folder), scale)
                seen = _fed(uri, device, rounds, threads, scale, settings)
            except (ImportError, UserError) as error:
                rows.append((name, f"not here: {error}", *["–"] * (len(COLUMNS) - 2)))
            else:
                rates[name] = [metrics["step_images_per_second"] for metrics in seen]
                rows.append(_row(name, seen, rates.get(SYNTHETIC, rates[name])))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    setting = (
        "`training.loop.fit` of the recipe baseline without Ray and MLflow: "
        f"width {scale.width}, bf16, channels-last, eager, its augmentation; batch {scale.batch}; "
        f"shards of {_SIDE} px in the page cache, {threads} threads; {rounds} rounds of "
        f"{scale.steps} steps, from the second epoch on, median [lowest..highest]. Utilization is "
        "the lowest. Extrapolated: 1,281,167 images at the median rate, without evaluation and "
        "checkpoints; nobody ran an epoch of ImageNet here."
    )
    return Table(COLUMNS, tuple(rows), setting, Bars("feeding a GPU, img/s", rates))


def decoders(device: torch.device, rounds: int, scale: Scale) -> Table:
    """In turns within a round."""
    jpegs, origin = jpegs_of(scale.decoded)
    threads = len(os.sched_getaffinity(0))
    rows: list[tuple[str, ...]] = []
    rates: dict[str, list[float]] = {}
    with ThreadPoolExecutor(threads) as pool:
        ways = _decoders(device, pool, threads)
        working = {}
        for name, make in ways.items():
            try:
                working[name] = make()
                working[name](jpegs)
                rates[name] = []
            except (ImportError, RuntimeError, UserError, ValueError, OSError) as error:
                rows.append((name, f"not here: {' '.join(str(error).split())[:200]}"))
        for number in range(rounds):
            for name in list(working)[:: 1 if number % 2 == 0 else -1]:
                rates[name].append(_rate(working[name], jpegs, scale.calls, device))
    rows = [(name, spread(values)) for name, values in rates.items()] + rows
    setting = (
        f"{len(jpegs)} JPEGs of {_SIDE} px a call ({origin}), in memory, to uint8 pixels on the "
        f"decoder's side; {rounds} rounds of {scale.calls} calls in alternating order, median "
        "[lowest..highest]."
    )
    return Table(DECODERS, tuple(rows), setting, Bars("decoding JPEGs, img/s", rates))


def _fed(
    uri: str,
    device: torch.device,
    rounds: int,
    threads: int,
    scale: Scale,
    settings: dict[str, Any],
) -> list[dict[str, float]]:
    from pipelines.shards import load_manifest
    from training.loop import Place, fit
    from training.recipes import RECIPES

    baseline = RECIPES["baseline"]()
    config = dataclasses.replace(
        baseline,
        log_steps=scale.steps,
        flat_loss_steps=0,
        model=dataclasses.replace(baseline.model, width=scale.width),
        optim=dataclasses.replace(baseline.optim, batch_size=scale.batch, epochs=2 + rounds),
        **settings,
    )
    seen: list[dict[str, float]] = []

    def log(metrics: dict[str, float], step: int) -> None:
        if "step_images_per_second" in metrics and step > 2 * scale.steps:
            seen.append(metrics)
        if len(seen) == rounds:
            raise _Enough

    with contextlib.suppress(_Enough):
        place = Place(device, threads=threads)
        fit(config, uri, load_manifest(uri), place, log=log, report=lambda *_: None)
    return seen


def _shards(folder: Path, scale: Scale) -> str:
    """Two rounds of steps in an epoch. Raises ImportError."""
    images = importlib.import_module("benchmarks.images")
    jpegs, _ = jpegs_of(min(200, scale.batch))
    train = 2 * scale.steps * scale.batch
    return str(
        images.write_shards(
            folder / "shards",
            jpegs,
            crop=_SIDE,
            train=train,
            classes=scale.classes,
            per_shard=-(-train // 8),
        )
    )


def jpegs_of(count: int) -> tuple[list[bytes], str]:
    """Of 227 px at quality 90: photos where $ALEXNET_TEST_DATA has them, or drawn ones whose size
    in bytes is near theirs. Pillow alone."""
    images, origin = _photos(), "photos"
    if not images:
        random = np.random.default_rng(0)
        images = [_drawn(random) for _ in range(min(count, 64))]
        origin = "DRAWN images, unlike photos in detail"
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    size = statistics.mean(map(len, encoded)) / 1000
    repeated = [encoded[number % len(encoded)] for number in range(count)]
    return repeated, f"of {len(encoded)} {origin}, mean {size:.0f} kB"


def _photos() -> list[Image.Image]:
    import tarfile

    path = Path(os.environ.get("ALEXNET_TEST_DATA") or "/nonexistent") / "photos-200.tar"
    if not path.exists():
        return []
    found = []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                image = Image.open(io.BytesIO(file.read())).convert("RGB")
                found.append(_cropped(image))
    return found


def _cropped(image: Image.Image) -> Image.Image:
    scale = 256 / min(image.size)
    size = [max(_SIDE, round(side * scale)) for side in image.size]
    small = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    left, top = ((side - _SIDE) // 2 for side in size)
    return small.crop((left, top, left + _SIDE, top + _SIDE))


def _drawn(random: np.random.Generator) -> Image.Image:
    """Smooth colours under a little noise: some 20 kB."""
    coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + random.normal(0, 9, smooth.shape).astype(np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


Decode = Callable[[Sequence[bytes]], object]


def _decoders(
    device: torch.device, pool: ThreadPoolExecutor, threads: int
) -> dict[str, Callable[[], Decode]]:
    def pillow() -> Decode:
        return lambda jpegs: list(pool.map(_by_pillow, jpegs, chunksize=8))

    def turbo() -> Decode:
        decode = importlib.import_module("simplejpeg").decode_jpeg
        return lambda jpegs: list(pool.map(decode, jpegs, chunksize=8))

    def nvimgcodec() -> Decode:
        library: Any = importlib.import_module("nvidia.nvimgcodec")
        if device.type != "cuda":
            raise RuntimeError("no GPU")
        # Interpolates chroma that was stored at half size, as libjpeg-turbo does.
        decoder = library.Decoder(device_id=device.index or 0, options=":fancy_upsampling=1")
        params = library.DecodeParams(
            apply_exif_orientation=False, color_spec=library.ColorSpec.SRGB
        )

        def decode(jpegs: Sequence[bytes]) -> object:
            stream = torch.cuda.current_stream(device)
            sources = [library.CodeStream(jpeg) for jpeg in jpegs]
            images = decoder.decode(sources, params=params, cuda_stream=stream.cuda_stream)
            if any(image is None for image in images):
                raise RuntimeError("nvImageCodec does not decode an image")
            batch = torch.stack([torch.utils.dlpack.from_dlpack(image) for image in images])
            stream.synchronize()  # before the memory of `images`, not PyTorch's, is freed
            return batch

        return decode

    def torchvision() -> Decode:
        library: Any = importlib.import_module("torchvision.io")
        if device.type != "cuda":
            raise RuntimeError("no GPU")

        def decode(jpegs: Sequence[bytes]) -> object:
            sources = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
            return library.decode_jpeg(sources, device=device)

        return decode

    return {
        f"Pillow, {threads} threads": pillow,
        f"simplejpeg, {threads} threads": turbo,
        "nvidia.nvimgcodec on the GPU": nvimgcodec,
        "torchvision.io.decode_jpeg on the GPU": torchvision,
    }


def _by_pillow(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def _rate(decode: Decode, jpegs: Sequence[bytes], calls: int, device: torch.device) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        decode(jpegs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return calls * len(jpegs) / (time.perf_counter() - began)


def _row(name: str, seen: list[dict[str, float]], synthetic: list[float]) -> tuple[str, ...]:
    rates = [metrics["step_images_per_second"] for metrics in seen]
    shares = [metrics["mfu"] for metrics in seen if "mfu" in metrics]  # on GPUs
    middle = statistics.median(rates)
    epoch = _IMAGENET / middle
    return (
        name,
        spread(rates),
        f"{middle / statistics.median(synthetic):.2f}",
        f"{min(metrics['utilization'] for metrics in seen):.1%}",
        f"{statistics.median(shares):.1%}" if shares else "–",
        f"{max(metrics.get('gpu_memory_gb', 0.0) for metrics in seen):.2f}",
        f"{epoch:.1f}",
        f"{90 * epoch / 60:.1f}",
    )
