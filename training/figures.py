"""Pictures of a training: the curves, the first layer's kernels, what a network says of pictures.

python -m training.figures MODEL        (see paper_figures.py)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

if __name__ == "__main__":
    from pipelines import command

    command.begin()

import numpy as np
import torch
from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]

_COLUMNS = 6
_CELL_WIDTH, _CELL_HEIGHT, _TITLE_HEIGHT = 1.9, 2.3, 0.5  # inches
_NAME_LENGTH = 20


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


@dataclass(frozen=True)
class Caption:
    """Names of a picture's class (None where nobody knows it) and of the one that the network takes
    it for, with what share of its belief (0..1)."""

    true: str | None
    predicted: str
    probability: float


def contact_sheet(pictures: torch.Tensor, captions: Sequence[Caption], title: str) -> Figure:
    """Pictures, uint8 (N,3,S,S) on the CPU, in rows of six; below each its class, where that is
    known, and what it was taken for: in red where the two differ."""
    rows = max(1, -(-len(captions) // _COLUMNS))
    height = rows * _CELL_HEIGHT + _TITLE_HEIGHT
    figure = Figure(figsize=(_COLUMNS * _CELL_WIDTH, height))
    figure.suptitle(title, fontsize=11, y=1 - 0.2 / height, va="center", parse_math=False)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = (number % _COLUMNS + 0.04) / _COLUMNS
        top = height - _TITLE_HEIGHT - (number // _COLUMNS) * _CELL_HEIGHT
        side = 0.92 * _CELL_WIDTH
        axes = figure.add_axes(
            (left, (top - side) / height, 0.92 / _COLUMNS, side / height), xticks=[], yticks=[]
        )
        axes.imshow(picture.permute(1, 2, 0).numpy())
        if caption.true is not None:
            is_class = f"is: {short(caption.true)}"
            axes.set_xlabel(is_class, fontsize=7, labelpad=2, parse_math=False)
        is_mistake = caption.true not in (None, caption.predicted)
        said = f"said: {short(caption.predicted)}, {caption.probability:.2%}"
        axes.text(
            0.5,
            -0.15 if caption.true is not None else -0.06,
            said,
            color="firebrick" if is_mistake else "black",
            fontsize=7,
            ha="center",
            va="center",
            transform=axes.transAxes,
            parse_math=False,
        )
    return figure


@dataclass(frozen=True)
class Panel:
    """image: uint8 (3, S, S) on the CPU; true: the name of its class; likeliest: names of classes
    with their probabilities (0..1), the highest first."""

    key: str
    image: torch.Tensor
    true: str
    likeliest: tuple[tuple[str, float], ...]


def top5_panels(panels: Sequence[Panel], title: str) -> Figure:
    """As in figure 4 (left) of the paper, in rows of four: each picture above its class and the
    bars of its likeliest classes, red for the right one."""
    columns, rows = 4, -(-len(panels) // 4)
    figure = Figure(figsize=(columns * 2.5, rows * 4.2 + _TITLE_HEIGHT), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=(2.4, 1.2) * rows)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        picture = figure.add_subplot(grid[2 * row, column], xticks=[], yticks=[])
        picture.imshow(panel.image.permute(1, 2, 0).numpy())
        picture.set_xlabel(short(panel.true), fontsize=9, fontweight="bold", parse_math=False)
        bars = figure.add_subplot(grid[2 * row + 1, column], xticks=[], yticks=[], xlim=(0, 1))
        for place, (name, probability) in enumerate(panel.likeliest):
            colour = "#e0787a" if name == panel.true else "#9db8d9"
            bars.barh(-place, probability, height=0.9, color=colour)
            bars.text(0.02, -place, short(name), fontsize=8, va="center", parse_math=False)
            bars.text(0.98, -place, f"{probability:.0%}", fontsize=8, va="center", ha="right")
        bars.set_ylim(-4.6, 0.6)
    return figure


@dataclass(frozen=True)
class Neighbours:
    """A picture, uint8 (3, S, S), and those nearest to it, uint8 (N, 3, S, S), with distances."""

    query: torch.Tensor
    images: torch.Tensor
    distances: tuple[float, ...]


def neighbours(found: Sequence[Neighbours], title: str) -> Figure:
    """As in figure 4 (right) of the paper: a row for each query, which stands first, with a gap
    before its neighbours."""
    columns = 1 + max(len(row.images) for row in found)
    figure = Figure(figsize=(columns * 1.3 + 0.2, len(found) * 1.5 + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=9, parse_math=False)
    grid = figure.add_gridspec(
        len(found), columns + 1, width_ratios=(1, 0.12, *[1] * (columns - 1))
    )
    for number, row in enumerate(found):
        query = figure.add_subplot(grid[number, 0], xticks=[], yticks=[])
        query.imshow(row.query.permute(1, 2, 0).numpy())
        for place, (image, distance) in enumerate(zip(row.images, row.distances, strict=True)):
            axes = figure.add_subplot(grid[number, place + 2], xticks=[], yticks=[])
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set_xlabel(f"{distance:.1f}", fontsize=7, labelpad=2)
    return figure


def short(name: str) -> str:
    """The first of a class's synonyms, cut to what fits: "tench" of "tench, Tinca tinca"."""
    first = name.split(",")[0]
    return first if len(first) <= _NAME_LENGTH else f"{first[: _NAME_LENGTH - 1]}…"


if __name__ == "__main__":
    # Imported by name: the module that runs as __main__ is not the training.figures of the others.
    from training.paper_figures import main

    command.leave(main)
