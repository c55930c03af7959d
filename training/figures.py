"""Pictures of a training: the curves and the first layer's kernels."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]


def curves(history: Mapping[str, Points], title: str) -> Figure:
    """Loss (left) and top-1 (right) over steps; `history` maps metric names to points.

    Uses `loss` and `top1` of the train batches, `val_loss` and `val_top1`; absent ones are left
    out.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    for axes, kind, label in zip(
        figure.subplots(1, 2), ("loss", "top1"), ("cross-entropy, nats", "top-1"), strict=True
    ):
        for name, style in ((kind, "-"), (f"val_{kind}", "o-")):
            if history.get(name):
                axes.plot(*zip(*history[name], strict=True), style, label=name, markersize=3)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure


def conv1_kernels(weight: torch.Tensor) -> Figure:
    """The (N,3,11,11) kernels of conv1 as in figure 3 of the paper, each stretched to its
    own range."""
    kernels = weight.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    low = kernels.min(axis=(1, 2, 3), keepdims=True)
    span = kernels.max(axis=(1, 2, 3), keepdims=True) - low
    kernels = (kernels - low) / np.maximum(span, 1e-12)
    columns = min(16, len(kernels))
    rows = -(-len(kernels) // columns)
    side = kernels.shape[1] + 1
    sheet = np.ones((rows * side + 1, columns * side + 1, 3), dtype=np.float32)
    for number, kernel in enumerate(kernels):
        top, left = number // columns * side + 1, number % columns * side + 1
        sheet[top : top + side - 1, left : left + side - 1] = kernel
    figure = Figure(figsize=(columns * 0.6, rows * 0.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(sheet, interpolation="nearest")
    axes.axis("off")
    return figure
