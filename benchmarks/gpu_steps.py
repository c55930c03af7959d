"""What a training step costs on a GPU, and which kernels it is made of. Needs torch alone.

Network, loss and optimiser are those of the recipes; images are random and already there.
"""

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from alexnet.model import AlexNet
from benchmarks.table import Bars, Table, spread
from training.meter import Clock, training_flops

COLUMNS = ("step", "img/s", "MFU", "memory, GB", "compiling and first steps, s")
KERNELS = ("kernel", "ms per step", "share", "calls per step")
_SHOWN_KERNELS = 20
_WARM_UP = 3
_TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Scale:
    """How much is measured: everything on a GPU; next to nothing in a trial."""

    batches: tuple[int, ...] = (128, 256, 512, 1024)
    compiled: tuple[int, ...] = (256, 1024)  # batches; each takes half a minute to compile
    steps: int = 10  # in each round
    width: float = 1.0
    side: int = 8192  # of the matrix product that is the ceiling


@dataclass(frozen=True)
class Case:
    network: str  # "ungrouped" or "paper"
    precision: str  # "fp32", "tf32" or "bf16"
    channels_last: bool
    batch: int
    compiled: bool = False
    lrn: str = ""  # of `paper`: "" as the network has it, otherwise a name of _LRN

    @property
    def name(self) -> str:
        layout = "channels-last" if self.channels_last else "contiguous"
        words = [self.network, self.precision, layout, "compiled" if self.compiled else "eager"]
        return ", ".join([*words, *([self.lrn] if self.lrn else []), f"batch {self.batch}"])


@dataclass(frozen=True)
class Measured:
    rates: list[float]  # images per second, by round
    memory_gb: float
    start_seconds: float


def cases(scale: Scale) -> Iterator[Case]:
    """Every batch, precision and layout in eager mode; compiled networks and other ways to
    normalise in bfloat16."""
    for network, precision, channels_last in itertools.product(
        ("ungrouped", "paper"), _TYPES, (True, False)
    ):
        for batch in scale.batches:
            yield Case(network, precision, channels_last, batch)
    for network, channels_last, batch in itertools.product(
        ("ungrouped", "paper"), (True, False), scale.compiled
    ):
        yield Case(network, "bf16", channels_last, batch, compiled=True)
    for lrn, batch in itertools.product(_LRN, scale.compiled):
        yield Case("paper", "bf16", True, batch, lrn=lrn)


def run(device: torch.device, rounds: int, scale: Scale) -> Table:
    ceilings = {name: ceiling(device, name, scale.side) for name in _TYPES}
    rows, fastest = [], {}
    for case in cases(scale):
        try:
            found = measure(case, device, rounds, scale)
        except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
            rows.append((case.name, "–", "–", "–", " ".join(str(error).split())[:80]))
        else:
            rows.append(_row(case, found, ceilings[case.precision], scale))
            kind = case.name.rpartition(", batch")[0]
            if max(fastest.get(kind, [0.0])) < max(found.rates):
                fastest[kind] = found.rates
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    products = ", ".join(f"{value / 1e12:.3g} ({name})" for name, value in ceilings.items())
    setting = (
        f"1000 classes, width {scale.width}; random images on the device; forward, backward and "
        f"fused SGD; {rounds} rounds of {scale.steps} steps in one process, median "
        "[lowest..highest]; a row after the other. MFU: against the best of five products of two "
        f"random matrices of {scale.side}² here, in TFLOP/s: {products}. fp32 is without TF32 in "
        "products and convolutions."
    )
    chart = Bars("training steps on a GPU, img/s, best batch of each", fastest)
    return Table(COLUMNS, tuple(rows), setting, chart)


def measure(case: Case, device: torch.device, rounds: int, scale: Scale) -> Measured:
    step = _step(case, device, scale)
    clock = Clock(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _timed(clock, step, _WARM_UP)
    rates = [scale.steps * case.batch / _timed(clock, step, scale.steps) for _ in range(rounds)]
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    return Measured(rates, memory, seconds)


def kernels(device: torch.device, rounds: int, scale: Scale) -> Table:
    """Of the step that the recipe `baseline` runs, and of `paper`, at the largest batch but one."""
    batch = scale.batches[-2:][0]
    rows = []
    for network in ("ungrouped", "paper"):
        step = _step(Case(network, "bf16", True, batch), device, scale)
        _timed(Clock(device), step, _WARM_UP)
        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as seen:
            _timed(Clock(device), step, rounds)
        rows += _kernel_rows(network, seen, device, rounds)
    setting = (
        f"bf16, channels-last, eager, batch {batch}; {rounds} steps under torch.profiler, which "
        f"slows them a little; the {_SHOWN_KERNELS} longest kernels of each network."
    )
    return Table(KERNELS, tuple(rows), setting)


def ceiling(device: torch.device, precision: str, side: int) -> float:
    """Operations per second of a square product of random numbers: of equal ones it is faster."""
    _allow_tf32(precision == "tf32")
    factor = torch.randn(side, side, device=device).to(_TYPES[precision])
    product, clock = factor @ factor, Clock(device)
    best = min(
        _timed(clock, lambda: torch.matmul(factor, factor, out=product), 1) for _ in range(5)
    )
    return 2.0 * side**3 / best


def _step(case: Case, device: torch.device, scale: Scale) -> Callable[[], object]:
    _allow_tf32(case.precision == "tf32")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    with torch.device(device):
        model = _network(case.network, scale)
    if case.compiled or case.lrn:
        torch._dynamo.reset()  # it gives up on a function that was compiled for too many networks
    if case.lrn:
        for name in ("lrn1", "lrn2"):
            setattr(model.features, name, _LRN[case.lrn]())
    # The stubs of Module.to know memory_format only together with a dtype or device.
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True
    )
    network = torch.compile(model, dynamic=False) if case.compiled else model
    x = torch.randn(case.batch, 3, 227, 227, device=device).contiguous(memory_format=layout)
    labels = torch.randint(1000, (case.batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            logits = network(x)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def _network(name: str, scale: Scale) -> AlexNet:
    variant = "paper" if name == "paper" else "ungrouped"
    return AlexNet(variant, num_classes=1000, width=scale.width, init="he")


class OneKernel(nn.Module):
    """LocalResponseNorm(5, 1e-4, 0.75, k=2) as sums of shifted squares and x^-0.75 by square roots:
    point by point, so that a compiler makes one kernel of it."""

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x.float().square(), (0, 0, 0, 0, 2, 2))
        channels = x.shape[1]
        total = padded[:, :channels]
        for shift in range(1, 5):
            total = total + padded[:, shift : shift + channels]
        root = torch.rsqrt(2.0 + 1e-4 / 5 * total)
        return (x * root * torch.sqrt(root)).to(x.dtype)


def _compiled(layer: nn.Module) -> nn.Module:
    # A module in, a module out: the stubs say a callable.
    compiled: nn.Module = torch.compile(layer, dynamic=False)  # type: ignore[assignment]
    return compiled


_LRN: dict[str, Callable[[], nn.Module]] = {
    "LRN compiled": lambda: _compiled(nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2)),
    "LRN fused": lambda: _compiled(OneKernel()),
}


def _row(case: Case, found: Measured, ceiling: float, scale: Scale) -> tuple[str, ...]:
    with torch.device("meta"):
        flops = training_flops(_network(case.network, scale))
    share = [rate * flops / ceiling for rate in found.rates]
    return (
        case.name,
        spread(found.rates),
        f"{statistics.median(share):.1%}",
        f"{found.memory_gb:.2f}",
        f"{found.start_seconds:.1f}",
    )


def _kernel_rows(
    network: str, seen: profile, device: torch.device, steps: int
) -> Iterator[tuple[str, ...]]:
    wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else None
    spent = {}
    for event in seen.key_averages():
        if wanted is None or event.device_type == wanted:
            own = event.self_device_time_total if wanted else event.self_cpu_time_total
            spent[event.key] = (own / 1000 / steps, event.count / steps)
    whole = sum(own for own, _ in spent.values())
    longest = sorted(spent.items(), key=lambda item: -item[1][0])[:_SHOWN_KERNELS]
    yield (f"**{network}, all kernels**", f"{whole:.2f}", "100.0%", "")
    for name, (own, calls) in longest:
        words = name.replace("|", "/")[:100]
        yield (f"{network}: {words}", f"{own:.3f}", f"{own / whole:.1%}", f"{calls:g}")


def _timed(clock: Clock, work: Callable[[], object], times: int) -> float:
    first = clock.mark()
    for _ in range(times):
        work()
    last = clock.mark()
    clock.wait()
    return clock.seconds(first, last)


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
