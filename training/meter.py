"""What the log lines say of the last steps: loss, accuracy, rates, and where the time went.

Every step has three parts on the accelerator's own time line:

    waiting     from the end of the step before until the batch is there: no data, or nothing to do
    copying     from there until its images and labels are on the device
    computing   augmentation, forward, backward with its communication, and the update

images_per_second is what the clock on the wall saw since the last line, whatever held it up:
evaluations, checkpoints, the start. step_images_per_second is that of the steps alone, without the
first step of the run. Utilization on CPUs is MLPerf Storage's: computing time / all time of these
steps. A GPU may idle between two kernels of a step; there it is the share of about the last second
in which any kernel ran, by its driver (NVML), and left out where nvidia-ml-py or NVML is not there.
Exposed communication is the part of `computing` between a rank's last own gradient and the moment
when those of all ranks are in, the wait for the slowest included: what did not hide behind the
backward pass. MFU, on GPUs alone, is the operations per second that the steps need / the peak
measured here: a plain matrix product of the run's precision.
"""

import contextlib
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alexnet import NETWORK_SIDE

# Columns of a step's row of sums.
LOSS, TOP1, TOP5, IMAGES, GRAD_NORM = range(5)

Mark = float | torch.cuda.Event


class Clock:
    """Instants on a device's time line: CUDA events, or the host's clock where that is the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        """Until the device has passed all marks; `seconds` needs that."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def seconds(self, first: Mark, last: Mark) -> float:
        if isinstance(first, torch.cuda.Event):
            assert isinstance(last, torch.cuda.Event)
            return float(first.elapsed_time(last)) / 1000
        assert isinstance(last, float)
        return last - first


@dataclass(frozen=True)
class Step:
    """What one step leaves: `sums` is float64 (5,) on the device, in the columns named above, of
    this rank's samples (GRAD_NORM: of the gradient of all); `communication` is the exposed part."""

    sums: torch.Tensor
    communication: tuple[Mark, Mark] | None


@dataclass(frozen=True)
class Reading:
    """metrics: means over the steps since the last reading and over all ranks. losses, grad_norms:
    of each of these steps, oldest first."""

    metrics: dict[str, float]
    losses: list[float]
    grad_norms: list[float]


class Meter:
    """Keeps what the steps since the last reading left, on the device: no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._clock, self._device = Clock(device), device
        self._first_step = True
        self.start()
        self._line = self._started

    def start(self) -> None:
        """Begins again; call it after anything between two steps that is not part of them."""
        self._steps: list[Step] = []
        self._marks: list[tuple[Mark, Mark, Mark]] = []
        self._started, self._start = time.perf_counter(), self._clock.mark()

    def data_arrived(self) -> None:
        self._arrived = self._clock.mark()

    def data_copied(self) -> None:
        self._copied = self._clock.mark()

    def add(self, step: Step) -> None:
        self._steps.append(step)
        self._marks.append((self._arrived, self._copied, self._clock.mark()))

    def read(self, world_size: int) -> Reading:
        """Waits for the device and, over several ranks, for the others: call it on all of them."""
        self._clock.wait()
        sums = torch.stack([step.sums for step in self._steps])
        times = [*self._times(), _busy(self._device)]
        both = torch.cat([sums.flatten(), sums.new_tensor(times)])
        if world_size > 1:
            torch.distributed.all_reduce(both)
        values = both.tolist()
        rows = [values[i : i + 5] for i in range(0, sums.numel(), 5)]
        reading = Reading(
            metrics=self._metrics(rows, [value / world_size for value in values[-5:]], world_size),
            losses=[row[LOSS] / row[IMAGES] for row in rows],
            grad_norms=[row[GRAD_NORM] / world_size for row in rows],
        )
        self._first_step = False
        self.start()
        return reading

    def _metrics(
        self, rows: list[list[float]], times: list[float], world_size: int
    ) -> dict[str, float]:
        loss, top1, top5, images, grad_norm = map(sum, zip(*rows, strict=True))
        wait, copy, compute, exposed, busy = times
        steps, all_time = len(rows), wait + copy + compute
        now = time.perf_counter()
        timed = rows[1:] if self._leaves_out_first() else rows
        metrics = {
            "loss": loss / images,
            "top1": top1 / images,
            "top5": top5 / images,
            "grad_norm": grad_norm / world_size / steps,
            "images_per_second": images / (now - self._line),
            "step_images_per_second": sum(row[IMAGES] for row in timed) / all_time,
            "data_wait": wait / all_time,
            "data_copy": copy / all_time,
            "seconds": now - self._started,
            "steps": float(steps),
        }
        self._line = now
        used = busy if self._device.type == "cuda" else compute / all_time
        if not math.isnan(used) and (not self._first_step or self._leaves_out_first()):
            metrics["utilization"] = used
        if world_size > 1:
            metrics["exposed_communication"] = exposed / all_time
        if self._device.type == "cuda":
            metrics["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        return metrics

    def _times(self) -> list[float]:
        """Seconds waiting, copying, computing, and of the last in exposed communication."""
        seconds = self._clock.seconds
        begins = [self._start, *(end for _, _, end in self._marks[:-1])]
        parts = [
            (
                seconds(begin, arrived),
                seconds(arrived, copied),
                seconds(copied, end),
                0.0 if step.communication is None else seconds(*step.communication),
            )
            for begin, (arrived, copied, end), step in zip(
                begins, self._marks, self._steps, strict=True
            )
        ]
        timed = parts[1:] if self._leaves_out_first() else parts
        return [sum(part) for part in zip(*timed, strict=True)]

    def _leaves_out_first(self) -> bool:
        """The run's first step warms up. Alone in its reading, it is still the best rate known."""
        return self._first_step and len(self._steps) > 1


def _busy(device: torch.device) -> float:
    """The share of about the last second in which a kernel ran on a GPU; NaN where nobody knows."""
    if device.type != "cuda":
        return math.nan
    try:
        from pynvml import NVMLError
    except ImportError:
        return math.nan
    try:
        return torch.cuda.utilization(device) / 100
    except (NVMLError, RuntimeError):  # parts of a GPU have none, nor has every container NVML
        return math.nan


_TRAINED = (
    "epoch={epoch:.2f} loss={loss:.4f} top1={top1:.3f} lr={lr:.5f} img/s={images_per_second:.0f} "
    "mfu={mfu:.1%}"
)
_EVALUATED = (
    "epoch={epoch:.0f} val_images={val_images:.0f} val_loss={val_loss:.4f} "
    "val_top1={val_top1:.4f} val_top5={val_top5:.4f}"
)


def log_line(metrics: dict[str, float], step: int) -> str:
    """One line for people and grep: `step=1200 epoch=3.20 loss=5.3100 …`, of what is there, eight
    values at most. MLflow has them all."""
    words = [f"step={step}"]
    for word in (_EVALUATED if "val_top1" in metrics else _TRAINED).split():
        with contextlib.suppress(KeyError):
            words.append(word.format(**metrics))
    if "eta_seconds" in metrics:
        minutes, seconds = divmod(round(metrics["eta_seconds"]), 60)
        words.append(f"eta={minutes}:{seconds:02d}")
    return " ".join(words)


@contextlib.contextmanager
def traced(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each step. Four steps after the first four, which allocate and
    may compile, end up in `folder`/trace.json, which https://ui.perfetto.dev opens; fewer if the
    run is shorter. Without a folder, nothing happens."""
    if folder is None:
        yield lambda: None
        return
    from torch import profiler

    folder.mkdir(parents=True, exist_ok=True)

    schedule = profiler.schedule(wait=3, warmup=1, active=4, repeat=1)
    path = str(folder / "trace.json")
    with profiler.profile(
        schedule=schedule, on_trace_ready=lambda profile: profile.export_chrome_trace(path)
    ) as profile:
        yield profile.step


def training_flops(model: nn.Module) -> float:
    """Floating-point operations per image of forward and backward, of a model on the meta device.

    Convolutions and linear layers, 2 for each multiplication with its addition; three times
    forward (outputs, gradients of weights, gradients of inputs) less the gradient of the images,
    which nobody needs. 6.60e9 for `ungrouped` with 1000 classes, 4.13e9 for `paper`, whose groups
    torch.utils.flop_counter counts too high.
    """
    forward: list[float] = []

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # Each output value is a product of one row of weights: weight[0] has its length.
        forward.append(2.0 * output.numel() * weight[0].numel())

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model(torch.empty(1, 3, NETWORK_SIDE, NETWORK_SIDE, device="meta"))
    for hook in hooks:
        hook.remove()
    return 3 * sum(forward) - forward[0]


def measured_peak(device: torch.device, dtype: torch.dtype, side: int = 8192) -> float:
    """Operations per second of a square matrix product of random numbers (equal ones take less
    power and run faster), the best of five; some 0.1 s on a GPU."""
    clock, seconds = Clock(device), []
    random = torch.Generator(device).manual_seed(0)  # not the run's, which it would move on
    factor = torch.randn(side, side, dtype=dtype, device=device, generator=random)
    product = factor @ factor  # warms up
    for _ in range(5):
        began = clock.mark()
        torch.matmul(factor, factor, out=product)
        ended = clock.mark()
        clock.wait()
        seconds.append(clock.seconds(began, ended))
    return 2.0 * side**3 / min(seconds)


def device_name(device: torch.device) -> str:
    """Of the GPU or the processor, such as "NVIDIA H200"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def processor() -> str:
    """The model of this machine's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
