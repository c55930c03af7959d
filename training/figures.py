"""Figures of a network: its curves, conv1's kernels, and what it says of images.

    python -m training.figures MODEL --data OUT [--out FOLDER]

MODEL is champion, candidate, a version's number, an MLflow model URI, or the folder or s3:// prefix
of a checkpoint or run. FOLDER gets conv1.png, the kernels of conv1 as in figure 3 of the 2012
paper, and top5.png, eight val images and the five classes that the network thinks likeliest, as in
figure 4. By default FOLDER has the model's name, under $ALEXNET_HOME/figures.
Exit codes: 0 done, 2 wrong usage or input.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pipelines import command

    command.begin()
    import training.figures

    command.leave(training.figures.main)

import argparse
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec, centre_view
from pipelines import command, shards, storage
from training.accuracy import short
from training.loader import Loader
from training.network import check_fits, load_model
from training.order import Ids

Points = Sequence[tuple[int, float]]

_COLUMNS, _PANELS, _PANEL_COLUMNS = 6, 8, 4
_NAMED = 40  # classes, at most, whose names a confusion matrix has room for


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
        axes.set(xlabel="step", ylabel=label)
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


def mistakes(
    images: torch.Tensor, captions: Sequence[tuple[str, str, float]], title: str
) -> Figure:
    """Images, uint8 (N,3,S,S) on the CPU, in rows of six; below each the name of its class, of the
    one it was taken for, and with what probability (0..1)."""
    rows = max(1, -(-len(captions) // _COLUMNS))
    figure = Figure(figsize=(_COLUMNS * 1.9, rows * 2.3 + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    for number, (image, (true, predicted, probability)) in enumerate(
        zip(images, captions, strict=True), start=1
    ):
        axes = figure.add_subplot(rows, _COLUMNS, number, xticks=[], yticks=[])
        axes.imshow(image.permute(1, 2, 0).numpy())
        said = f"is: {short(true)}\nsaid: {short(predicted)}, {probability:.2%}"
        axes.set_xlabel(said, fontsize=7, parse_math=False)
    return figure


def most_confident_errors(
    rows: Sequence[Mapping[str, Any]], data: str, manifest: shards.Manifest, split: str, model: str
) -> Figure:
    """`mistakes` of the rows of that name in evaluation.json."""
    ids = np.array([row["sample_id"] for row in rows], dtype=np.int64)
    captions = [(row["true"], row["predicted"], row["probability"]) for row in rows]
    title = f"{model}: the {len(rows)} most confident errors"
    return mistakes(read_images(data, manifest, split, ids), captions, title)


def confusion(counts: NDArray[np.int64], names: Sequence[str], title: str) -> Figure:
    """counts: (classes, classes), row the class, column what it was taken for; the darker, the
    larger the share of the row. Few classes have their names and numbers."""
    few = len(names) <= _NAMED
    side = 3 + 0.35 * len(names) if few else 10
    figure = Figure(figsize=(side, side), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    axes = figure.add_subplot(xlabel="taken for", ylabel="class")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The root of a share, or else a class that is mistaken once in ten times could not be seen.
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if few:
        places, labels = range(len(names)), [short(name) for name in names]
        axes.set_xticks(places, labels, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(places, labels, fontsize=8, parse_math=False)
        for row, column in np.argwhere(counts).tolist():
            colour = "white" if shares[row, column] > 0.4 else "black"
            number = f"{counts[row, column]}"
            axes.text(column, row, number, ha="center", va="center", fontsize=7, color=colour)
    return figure


def top5(
    network: AlexNet, spec: InputSpec, manifest: shards.Manifest, data: str, title: str = ""
) -> Figure:
    """As in figure 4 of the paper: eight images all over the val split, which nobody chose, in rows
    of four; each above its class and the bars of its likeliest classes, red for the right one.

    network: on the CPU, in evaluation mode. Raises UserError for shards that cannot be read, and
    for a val split without labels.
    """
    labels = shards.load_index(data, "val", ["label"])["label"].to_numpy()
    if not len(labels) or labels.min() < 0:
        raise UserError("the val split has no labelled images; pass other shards with --data")
    ids = np.unique(np.linspace(0, len(labels) - 1, _PANELS).round().astype(np.int64))
    images = read_images(data, manifest, "val", ids)
    with torch.inference_mode():
        probabilities = network(centre_view(images, spec)).float().softmax(1)
    rows = -(-len(ids) // _PANEL_COLUMNS)
    figure = Figure(figsize=(_PANEL_COLUMNS * 2.5, rows * 4.2 + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    grid = figure.add_gridspec(2 * rows, _PANEL_COLUMNS, height_ratios=(2.4, 1.2) * rows)
    for number, (image, label) in enumerate(zip(images, labels[ids].tolist(), strict=True)):
        row, column = divmod(number, _PANEL_COLUMNS)
        axes = figure.add_subplot(grid[2 * row, column], xticks=[], yticks=[])
        axes.imshow(image.permute(1, 2, 0).numpy())
        name = short(manifest.class_names[label])
        axes.set_xlabel(name, fontsize=9, fontweight="bold", parse_math=False)
        bars = figure.add_subplot(grid[2 * row + 1, column], xticks=[], yticks=[], xlim=(0, 1))
        values, classes = probabilities[number].topk(min(5, manifest.num_classes))
        for place, (share, likely) in enumerate(
            zip(values.tolist(), classes.tolist(), strict=True)
        ):
            bars.barh(-place, share, height=0.9, color="#e0787a" if likely == label else "#9db8d9")
            name = short(manifest.class_names[likely])
            bars.text(0.02, -place, name, fontsize=8, va="center", parse_math=False)
            bars.text(0.98, -place, f"{share:.0%}", fontsize=8, va="center", ha="right")
        bars.set_ylim(-4.6, 0.6)
    return figure


def read_images(data: str, manifest: shards.Manifest, split: str, ids: Ids) -> torch.Tensor:
    """uint8 (N, 3, crop, crop) in the order of the ids."""
    with Loader(data, manifest, split, threads=os.cpu_count() or 1) as loader:
        return loader.read(ids).images.clone()


def save(figure: Figure, uri: str) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    storage.write(uri, png.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    return command.answered(lambda: _answer(_parse(argv)))


def _answer(args: argparse.Namespace) -> int:
    model = load_model(args.model)
    assert isinstance(model.network, AlexNet)
    manifest = shards.load_manifest(args.data)
    check_fits(model, manifest, args.data)
    drawn = {
        "conv1.png": conv1_kernels(model.network.conv1.weight),
        "top5.png": top5(
            model.network, model.input_spec, manifest, args.data, f"val images of {args.data}"
        ),
    }
    out = args.out or str(storage.home() / "figures" / model.file_name)
    for file, figure in drawn.items():
        save(figure, storage.join(out, file))
        command.say(storage.join(out, file))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser("python -m training.figures", description=__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", required=True, help="folder or s3:// prefix of the shards")
    parser.add_argument("--out", metavar="FOLDER", help="folder or s3:// prefix")
    return parser.parse_args(argv)
