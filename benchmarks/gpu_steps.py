"""A training step on a GPU: its ceilings, whether it is right, what it costs and what it runs."""

import contextlib
import copy
import dataclasses
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alexnet.preprocess import Augment, draw_views, train_view
from benchmarks.fit_loop import Enough, never
from benchmarks.images import manifest_bytes
from benchmarks.table import Bars, Table, spread
from pipelines import shards
from training.config import TrainConfig
from training.loop import Place, fit
from training.meter import measured_peak
from training.network import build_model, input_spec
from training.recipes import RECIPES
from training.steps import Stepper, algorithms, learning_rates

IMAGENET = 1_281_167
Row = tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """How much is measured: everything on a GPU; next to nothing in a trial."""

    rounds: int = 5
    steps: int = 30  # between two log lines
    batches: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    compiled: tuple[int, ...] = (256, 1024)
    width: float = 1.0
    classes: int = 1000
    side: int = 8192  # of the matrix product that is the ceiling
    copied: int = 1 << 30  # bytes
    fed: tuple[int, ...] = (256, 1024)  # batches
    images: int = 40_960  # in an epoch from shards
    decoded: int = 1024  # JPEGs in a round
    threads: tuple[int, ...] = (1, 2, 4, 8, 14, 16)


FULL = Scale()
SMALL = Scale(
    steps=9,
    batches=(2,),
    compiled=(),
    width=0.05,
    classes=5,
    side=64,
    copied=1 << 20,
    fed=(4,),
    images=36,
    decoded=4,
    threads=(1, 2),
)


@dataclass
class Part:
    """Rows that are measured as they are asked for. charted: values of each round by row name,
    which the rows fill on their way."""

    columns: Row
    setting: str
    rows: Iterator[Row]
    title: str = ""
    charted: dict[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    def table(self, rows: Sequence[Row]) -> Table:
        chart = Bars(self.title, self.charted) if self.charted else None
        return Table(self.columns, tuple(rows), self.setting, chart)


def limits(device: torch.device, scale: Scale, scratch: Path) -> Part:
    """What nothing here can exceed."""

    def rows() -> Iterator[Row]:
        host = torch.empty(scale.copied, dtype=torch.uint8, pin_memory=device.type == "cuda")
        own, other = (torch.empty(scale.copied, dtype=torch.uint8, device=device) for _ in "ab")
        own.random_()
        ways = {
            "pinned memory to the GPU, GB/s": (1, lambda: own.copy_(host, non_blocking=True)),
            "memory of the GPU to itself, read and written, GB/s": (2, lambda: other.copy_(own)),
        }
        for name, (times, copied) in ways.items():
            yield name, f"{times * scale.copied / _seconds(device, copied, 5) / 1e9:.1f}"
        for precision in PRECISIONS:
            peak = _peak(device, precision, scale.side)
            yield f"product of random matrices, {precision}, TFLOP/s", f"{peak / 1e12:.3g}"
        for key in ("Thread(s) per core", "Core(s) per socket"):
            yield f"CPU: {key}", _lscpu().get(key, "?")

    words = f"Copies of {scale.copied / 1e9:.2f} GB; products of {scale.side}²; best of five."
    return Part(("limit", "value"), words, rows())


def exact(device: torch.device, scale: Scale, scratch: Path) -> Part:
    """One step beside the same on the CPU in float64, without dropout, whose masks differ."""

    def rows() -> Iterator[Row]:
        for name in ("baseline", "paper"):
            wanted = _one_step(name, torch.device("cpu"), "fp32", scale, torch.float64)
            for precision in PRECISIONS:
                found = _one_step(name, device, precision, scale, torch.float32)
                yield (
                    f"{name}, {precision}",
                    *(f"{_distance(found[part], wanted[part]):.1e}" for part in found),
                )

    words = (
        f"Width {scale.width}, {scale.classes} classes, 4 images, same weights and labels; "
        "‖found − wanted‖ / ‖wanted‖ over all values of a kind; wanted: float64 on the CPU."
    )
    return Part(("step", "view", "loss", "gradients", "update"), words, rows())


def steps(device: torch.device, scale: Scale, scratch: Path) -> Part:
    """`training.loop.fit` on resident images."""
    base = {name: _at_width(RECIPES[name](), scale) for name in RECIPES}
    cases: list[TrainConfig] = []
    for batch in scale.batches:
        cases.append(_case(base["baseline"], batch))
    for batch in scale.compiled:
        cases.append(_case(base["baseline"], batch, compile=True))
    for precision in ("fp32", "tf32"):
        cases.append(_case(base["baseline"], 256 if scale is not SMALL else 2, precision=precision))
    for precision, batch in itertools.product(("tf32", "bf16"), scale.batches[2:3] or (2,)):
        cases.append(_case(base["paper"], batch, precision=precision))
    for batch in scale.compiled[1:]:
        cases.append(_case(base["fast"], 4 * batch, compile=True))

    part = Part(_STEPS, _setting(scale), iter(()), "training steps on a GPU, img/s")

    def rows() -> Iterator[Row]:
        for config in cases:
            try:
                seen = fitted(config, device, scale, scratch)
            except torch.OutOfMemoryError as error:
                yield (_name(config), "–", *("–" for _ in _STEPS[2:-1]), str(error)[:80])
                continue
            part.charted[_name(config)] = seen.rates
            yield (_name(config), *_cells(seen, config))

    part.rows = rows()
    return part


def kernels(device: torch.device, scale: Scale, scratch: Path) -> Part:
    """The longest of three recipes' steps."""

    def rows() -> Iterator[Row]:
        batch = scale.batches[-2:][0]
        for name in ("baseline", "paper", "fast"):
            config = _case(_at_width(RECIPES[name](), scale), batch, compile=False)
            seen = fitted(config, device, dataclasses.replace(scale, rounds=1), scratch)
            whole = sum(seen.kernels.values())
            yield (f"**{name}, all kernels**", f"{whole:.2f}", "100.0%")
            longest = sorted(seen.kernels.items(), key=lambda item: -item[1])[:12]
            for kernel, spent in longest:
                words = " ".join(kernel.replace("|", "/").split())[:110]
                yield (f"{name}: {words}", f"{spent:.3f}", f"{spent / whole:.1%}")

    words = (
        f"Eager, batch {scale.batches[-2:][0]}, the recipe's precision; four steps of "
        "`training.loop.fit` on resident images under torch.profiler."
    )
    return Part(("kernel", "ms a step", "share"), words, rows())


_STEPS = (
    "step",
    "img/s",
    "ms a step",
    "kernels, ms a step",
    "launches a step",
    "waits for the GPU a step",
    "MFU",
    "memory, GB",
    "first line after, s",
)
PRECISIONS = ("fp32", "tf32", "bf16")


@dataclass(frozen=True)
class Fitted:
    """lines: what the loop logged of each round; kernels: ms a step by name; calls: of the CUDA
    runtime a step, by name; first: seconds to the first line."""

    lines: list[dict[str, float]]
    kernels: Mapping[str, float]
    calls: Mapping[str, float]
    first: float

    @property
    def rates(self) -> list[float]:
        return [line["images_per_second"] for line in self.lines]


def fitted(config: TrainConfig, device: torch.device, scale: Scale, scratch: Path) -> Fitted:
    """Rounds of log lines after a first one, in which four steps are profiled."""
    began, lines, first = time.monotonic(), [], 0.0
    config = dataclasses.replace(config, log_steps=scale.steps, flat_loss_steps=0, synthetic=True)

    def log(metrics: dict[str, float], step: int) -> None:
        nonlocal first
        first = first or time.monotonic() - began
        lines.append(metrics)
        if len(lines) > scale.rounds:
            raise Enough

    manifest = _imagenet(scale, 256 if config.augment.crop == "random" else 227)
    if config.compile:
        torch._dynamo.reset()  # it gives up on a function that was compiled for too many networks
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.set_num_threads(1)  # as the workers of run.py
    trace = scratch / "trace"
    with contextlib.suppress(Enough):
        place = Place(device, threads=1)
        fit(config, "", manifest, place, log=log, report=never, profile_to=trace)
    durations, calls = _profiled(trace / "trace.json", device)
    return Fitted(lines[1:], durations, calls, first)


def _profiled(path: Path, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in json.loads(path.read_text())["traceEvents"]:
        kind = event.get("cat", "")
        if kind == ("kernel" if device.type == "cuda" else "cpu_op"):
            spent[event["name"]] += event["dur"]
        if kind in ("cuda_runtime", "cuda_driver"):
            calls[event["name"]] += 1
    return {k: v / 1000 / 4 for k, v in spent.items()}, {k: v / 4 for k, v in calls.items()}


def _cells(seen: Fitted, config: TrainConfig) -> Row:
    launches = sum(n for name, n in seen.calls.items() if "LaunchKernel" in name)
    stops = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
    shares = [line["mfu"] for line in seen.lines if "mfu" in line]  # on GPUs
    return (
        spread(seen.rates),
        f"{1000 * config.optim.batch_size / statistics.median(seen.rates):.2f}",
        f"{sum(seen.kernels.values()):.2f}",
        f"{launches:.0f}",
        f"{sum(seen.calls.get(name, 0.0) for name in stops):g}",
        f"{statistics.median(shares):.1%}" if shares else "–",
        f"{max(line.get('gpu_memory_gb', 0.0) for line in seen.lines):.1f}",
        f"{seen.first:.1f}",
    )


def _setting(scale: Scale) -> str:
    return (
        f"`training.loop.fit --synthetic`: {scale.classes} classes, width {scale.width}, the "
        f"recipe's augmentation; {scale.rounds} rounds of {scale.steps} steps, wall-clock, median "
        "[lowest..highest]. Kernels, launches and waits are of four profiled steps before them. "
        "MFU: against a product of random matrices in the same precision on this machine."
    )


def _name(config: TrainConfig) -> str:
    way = "compiled" if config.compile else "eager"
    return f"{config.recipe}, {config.precision}, {way}, batch {config.optim.batch_size}"


def _case(config: TrainConfig, batch: int, **settings: Any) -> TrainConfig:
    optim = dataclasses.replace(config.optim, batch_size=batch, lr=1e-3)
    return dataclasses.replace(config, optim=optim, **({"compile": False} | settings))


def _at_width(config: TrainConfig, scale: Scale) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, width=scale.width))


def _imagenet(scale: Scale, crop: int) -> shards.Manifest:
    """As many samples as ImageNet, of which no file is there."""
    train = IMAGENET if scale is not SMALL else 1000
    infos = [("train-000000", "train", train, 1, "0" * 64), ("val-000000", "val", 10, 1, "0" * 64)]
    return shards.parse_manifest("", manifest_bytes(infos, crop, scale.classes))


def _one_step(
    name: str, device: torch.device, precision: str, scale: Scale, dtype: torch.dtype
) -> dict[str, Tensor]:
    config = _case(_at_width(RECIPES[name](), scale), 4, precision=precision)
    crop = 256 if name == "paper" else 227
    augment = Augment("random" if name == "paper" else "resized", flip=True, colour_sigma=0.1)
    spec = input_spec(_imagenet(scale, crop), config)
    model = build_model(config, scale.classes)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, crop, crop, 3), dtype=torch.uint8, generator=random)
    images = images.permute(0, 3, 1, 2).to(device)
    labels = torch.randint(scale.classes, (4,), generator=random).to(device)
    with algorithms(config, device):
        drawn = draw_views(spec, augment, seed=0, epoch=0, sample_ids=torch.arange(4))
        x = train_view(images, drawn.to(device), spec, augment)
        stepper = Stepper(config, model.to(dtype), Place(device))
        before = copy.deepcopy([p.detach() for p in stepper.model.parameters()])
        rates = learning_rates(config, 1000, 1000)
        step = stepper.step(x.to(dtype), labels, number=0, rates=rates, global_size=4)
    after = [p.detach() for p in stepper.model.parameters()]
    return {
        "view": x,
        "loss": step.sums[:1],
        "gradients": _flat([p.grad for p in stepper.model.parameters()]),
        "update": _flat([new - old for new, old in zip(after, before, strict=True)]),
    }


def _flat(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors if t is not None])


def _distance(found: Tensor, wanted: Tensor) -> float:
    own, right = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((own - right).norm() / right.norm())


def _peak(device: torch.device, precision: str, side: int) -> float:
    config = _case(RECIPES["baseline"](), 1, precision=precision)
    with algorithms(config, device):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return measured_peak(device, dtype, side)


def _seconds(device: torch.device, work: Callable[[], object], times: int) -> float:
    """The best of a few runs, the work alone."""
    best = float("inf")
    for _ in range(times):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def _lscpu() -> dict[str, str]:
    import subprocess

    done = subprocess.run(["lscpu"], capture_output=True, text=True, check=True)
    pairs = (line.partition(":") for line in done.stdout.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
