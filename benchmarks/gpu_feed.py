"""Whether a GPU is fed: the training loop from shards beside resident images, and JPEG decoders."""

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import shutil
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import simplejpeg
import torch
from PIL import Image

from benchmarks import images
from benchmarks.fit_loop import Enough
from benchmarks.gpu_steps import IMAGENET, Part, Row, Scale
from benchmarks.table import spread
from pipelines.shards import load_manifest
from training.loop import Place, fit
from training.recipes import RECIPES

FED = (
    "images come from",
    "img/s between log lines",
    "a whole epoch, with evaluation and checkpoint, img/s",
    "utilization",
    "MFU",
    "memory, GB",
    "90 epochs of ImageNet, min (extrapolated)",
)
_SIDE = 227
_PER_SHARD = 5005


def feed(device: torch.device, scale: Scale, scratch: Path) -> Part:
    """`training.loop.fit` of `baseline`, whole epochs with evaluation and checkpoint."""
    jpegs, origin = jpegs_of(200)
    uri = _shards(scratch, jpegs, scale.images, scale)
    threads = max(1, len(os.sched_getaffinity(0)) - 2)
    ways: dict[str, dict[str, Any]] = {
        "memory of the GPU: --synthetic": {"synthetic": True},
        f"shards, decoded by {threads} threads": {},
        "shards, decoded once: --cache decoded": {"cache": "decoded"},
    }
    part = Part(FED, "", iter(()), "feeding a GPU, img/s")

    def rows() -> Iterator[Row]:
        for batch in scale.fed:
            for way, settings in ways.items():
                name = f"{way}, batch {batch}"
                steps = -(-scale.images // batch)
                with patch.dict(os.environ, ALEXNET_HOME=str(scratch / name)):  # no file yet
                    seen = _fed(uri, device, scale, threads, batch, settings, steps // 2)
                part.charted[name] = seen.rates
                yield (name, *_cells(seen, scale))

    part.setting = (
        f"`training.loop.fit` of the recipe baseline without Ray and MLflow: width {scale.width}, "
        f"its precision and augmentation; {scale.images:,} images an epoch ({origin}) in shards "
        f"of {_SIDE} px in the page cache; {scale.rounds} epochs after a first one, median "
        "[lowest..highest]; utilization is the lowest. Extrapolated: 1,281,167 images at the "
        "whole epoch's rate; nobody ran an epoch of ImageNet here."
    )
    part.rows = rows()
    return part


def waits(device: torch.device, scale: Scale, scratch: Path) -> Part:
    """Where the host waits for the GPU in one epoch from shards, its evaluation and checkpoint."""
    count, batch = 20, 64 if device.type == "cuda" else 2

    def rows() -> Iterator[Row]:
        uri = _shards(scratch, jpegs_of(200)[0], count * batch, scale)
        found: Counter[str] = Counter()

        def note(message: Any, category: Any, path: str, line: int, *_: Any) -> None:
            if "called a synchronizing" in str(message):
                found[f"{'/'.join(Path(path).parts[-2:])}:{line}"] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                _fed(uri, device, dataclasses.replace(scale, rounds=0), 2, batch, {}, count)
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        for place, times in found.most_common():
            yield place, str(times)
        yield "all", str(sum(found.values()))

    words = (
        f"`training.loop.fit` of baseline: {count} steps of {batch} with one log line, evaluation "
        "and checkpoint; as torch.cuda.set_sync_debug_mode counts."
    )
    return Part(("file and line", "waits"), words, rows())


def decoders(device: torch.device, scale: Scale, scratch: Path) -> Part:
    """One after another, from memory to uint8 pixels on the decoder's side."""
    jpegs, origin = jpegs_of(scale.decoded)
    words = f"{len(jpegs)} JPEGs of {_SIDE} px ({origin}) a round, {scale.rounds} rounds."
    part = Part(("decoder", "img/s"), words, iter(()), "decoding JPEGs, img/s")

    def measured(name: str, decode: Callable[[], object]) -> Row:
        try:
            rates = [_rate(decode, len(jpegs), device) for _ in range(scale.rounds + 1)][1:]
        except (ImportError, RuntimeError) as error:
            return name, f"not here: {' '.join(str(error).split())[:120]}"
        part.charted[name] = rates
        return name, spread(rates)

    def rows() -> Iterator[Row]:
        for threads in scale.threads:
            with ThreadPoolExecutor(threads) as pool:
                decode = functools.partial(pool.map, _on_cpu, jpegs, chunksize=16)
                yield measured(f"simplejpeg, {threads} threads", lambda: list(decode()))  # noqa: B023
        for size in (64, 512):
            decode = functools.partial(_on_gpu, jpegs, size, device)
            yield measured(f"torchvision.io.decode_jpeg on the GPU, {size} a call", decode)

    part.rows = rows()
    return part


def _shards(scratch: Path, jpegs: Sequence[bytes], count: int, scale: Scale) -> str:
    return images.write_shards(
        scratch / "shards",
        jpegs,
        crop=_SIDE,
        train=count,
        classes=scale.classes,
        per_shard=_PER_SHARD,
    )


@dataclasses.dataclass
class _Fed:
    lines: list[dict[str, float]]
    epochs: list[float]  # seconds from one evaluation's end to the next

    @property
    def rates(self) -> list[float]:
        return [line["step_images_per_second"] for line in self.lines]


def _fed(
    uri: str,
    device: torch.device,
    scale: Scale,
    threads: int,
    batch: int,
    settings: dict[str, Any],
    log_steps: int,
) -> _Fed:
    baseline = RECIPES["baseline"]()
    config = dataclasses.replace(
        baseline,
        log_steps=log_steps,
        flat_loss_steps=0,
        model=dataclasses.replace(baseline.model, width=scale.width),
        optim=dataclasses.replace(baseline.optim, batch_size=batch, epochs=scale.rounds + 2),
        **settings,
    )
    seen, ended = _Fed([], []), [0.0]
    before = torch.get_num_threads()

    def log(metrics: dict[str, float], step: int) -> None:
        if "val_top1" in metrics:
            now = time.perf_counter()
            seen.epochs.append(now - ended[0])
            ended[0] = now
            if len(seen.epochs) == scale.rounds + 1:
                raise Enough
        elif seen.epochs:
            seen.lines.append(metrics)

    def report(_: dict[str, float], write: Callable[[], Path] | None) -> None:
        assert write is not None
        writer.submit(lambda: shutil.rmtree(write()))  # behind the training, as an upload

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.set_num_threads(1)  # as the workers of run.py
    with ThreadPoolExecutor(1) as writer, contextlib.suppress(Enough):
        place = Place(device, threads=threads)
        fit(config, uri, load_manifest(uri), place, log=log, report=report)
    torch.set_num_threads(before)
    seen.epochs = seen.epochs[1:]
    return seen


def _cells(seen: _Fed, scale: Scale) -> Row:
    shares = [line["mfu"] for line in seen.lines if "mfu" in line]  # on GPUs
    used = [line["utilization"] for line in seen.lines if "utilization" in line]  # NVML may lack
    whole = [scale.images / seconds for seconds in seen.epochs]
    return (
        spread(seen.rates),
        spread(whole),
        f"{min(used):.1%}" if used else "–",
        f"{statistics.median(shares):.1%}" if shares else "–",
        f"{max(line.get('gpu_memory_gb', 0.0) for line in seen.lines):.1f}",
        f"{90 * IMAGENET / statistics.median(whole) / 60:.1f}",
    )


def jpegs_of(count: int) -> tuple[list[bytes], str]:
    """Of 227 px at quality 90: photos where $ALEXNET_TEST_DATA has them, drawn ones otherwise. By
    Pillow alone: the builder's resize needs torch 2.13."""
    photos = Path(os.environ.get("ALEXNET_TEST_DATA") or "/nonexistent") / "photos-200.tar"
    if photos.exists():
        raw, origin = images.members(photos.read_bytes()), "photos"
    else:
        raw, origin = images.drawn(64), "DRAWN images, unlike photos in detail"
    encoded = []
    for jpeg in raw[:count]:
        buffer = io.BytesIO()
        _cropped(Image.open(io.BytesIO(jpeg)).convert("RGB")).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    size = statistics.mean(map(len, encoded)) / 1000
    repeated = [encoded[number % len(encoded)] for number in range(count)]
    return repeated, f"{len(encoded)} {origin}, stored as {size:.0f} kB"


def _cropped(image: Image.Image) -> Image.Image:
    scale = 256 / min(image.size)
    width, height = (max(_SIDE, round(side * scale)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - _SIDE) // 2, (height - _SIDE) // 2
    return small.crop((left, top, left + _SIDE, top + _SIDE))


def _on_cpu(jpeg: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(jpeg, colorspace="RGB")


def _on_gpu(jpegs: Sequence[bytes], size: int, device: torch.device) -> None:
    """Raises RuntimeError on CPUs and ImportError without torchvision."""
    if device.type != "cuda":
        raise RuntimeError("no GPU")
    decode = importlib.import_module("torchvision.io").decode_jpeg
    for first in range(0, len(jpegs), size):
        part = [
            torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
            for jpeg in jpegs[first : first + size]
        ]
        decode(part, device=device)


def _rate(decode: Callable[[], object], count: int, device: torch.device) -> float:
    began = time.perf_counter()
    decode()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)
