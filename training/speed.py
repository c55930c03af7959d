"""How fast a step could be: operations per picture from the network's shapes, and a measured peak.

"MFU" in the log lines is operations per second that training needs / the peak measured here, not a
data sheet's: a plain matrix product of the run's precision on the run's device and threads.
"""

import functools
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alexnet import NETWORK_SIDE

_SIDES = {"cpu": 768, "cuda": 8192}
_TIMES = 5


def training_flops(model: nn.Module) -> float:
    """Floating-point operations per picture of forward and backward, of a model on the meta device.

    Convolutions and linear layers, 2 for each multiplication with its addition; three times
    forward (outputs, gradients of weights, gradients of inputs) less the gradient of the pictures,
    which nobody needs. 6.60e9 for `deck` with 1000 classes, 4.13e9 for `paper`.
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


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product, the best of a few; some 0.1 s, once for
    each device, type and number of threads."""
    return _peak(device, dtype, torch.get_num_threads())


@functools.cache
def _peak(device: torch.device, dtype: torch.dtype, _threads: int) -> float:
    side = _SIDES[device.type]
    factor = torch.ones(side, side, dtype=dtype, device=device)
    product = factor @ factor  # warms up
    best = float("inf")
    for _ in range(_TIMES):
        _finish(device)
        began = time.perf_counter()
        torch.matmul(factor, factor, out=product)
        _finish(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * side**3 / best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Of the GPU or the processor, such as "NVIDIA H200"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def processor() -> str:
    """The model of this machine's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
