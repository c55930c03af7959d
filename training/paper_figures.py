"""`python -m training.figures`: figures 3 and 4 of the 2012 paper, from a trained network.

    python -m training.figures MODEL [--data OUT] [--out FOLDER] [--pictures 2000]

MODEL is champion, candidate, a version's number, an MLflow model URI, or the folder or s3:// prefix
of a checkpoint or run. FOLDER gets conv1.png, the kernels of conv1 (figure 3); top5.png, eight val
pictures and the five classes that the network thinks likeliest (figure 4, left); neighbours.png,
five val pictures and the six train pictures whose fc7 activations lie nearest (figure 4, right), of
--pictures spread evenly over the train split. By default FOLDER is of the model's name under
$ALEXNET_HOME/figures. Exit codes: 0 done, 2 wrong usage or input.
"""

import argparse
import io
import os
import re
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec, centre_view
from pipelines import command, shards, storage
from training import figures
from training.figures import Neighbours, Panel
from training.loader import Loader
from training.network import LoadedModel, check_fits, load_model
from training.order import Ids

_PANELS = 8
_QUERIES = 5
_NEAREST = 6
_LIKELIEST = 5
_BATCH = 64


def main(argv: Sequence[str] | None = None) -> int:
    return command.answered(lambda: _answer(_parse(argv)))


def _answer(args: argparse.Namespace) -> int:
    if args.pictures < _NEAREST:
        raise UserError(f"--pictures {args.pictures} is below {_NEAREST}; pass more")
    model = load_model(args.model)
    assert isinstance(model.network, AlexNet)
    data = args.data or _data_of(model)
    manifest = shards.load_manifest(data)
    check_fits(model, manifest, data)
    drawn = _draw(model.network, model.input_spec, manifest, data, args.pictures)
    out = args.out or str(storage.home() / "figures" / _as_folder(model.name))
    for name, figure in drawn.items():
        command.say(_save(figure, storage.join(out, name)))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        "python -m training.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", help="shards; by default those that a version learned from")
    parser.add_argument("--out", metavar="FOLDER", help="folder or s3:// prefix")
    parser.add_argument("--pictures", type=int, default=2000, help="train pictures to search")
    return parser.parse_args(argv)


def _as_folder(name: str) -> str:
    """Of a model: such as alexnet-3 of models:/alexnet/3, or the end of a checkpoint's place."""
    return "-".join(re.findall(r"[\w.]+", name.removeprefix("models:")))[-60:]


def _data_of(model: LoadedModel) -> str:
    """Where the shards of a registered version were. Raises UserError for anything else."""
    number = model.name.rpartition("/")[2]
    if model.name.startswith("models:/") and number.isdecimal():
        from training import tracking
        from training.registry import versions

        client = tracking.connect(tracking.tracking_uri())
        run = versions.run_of(client, versions.resolve(client, number))
        if run is not None and "data" in run.data.tags:
            return str(run.data.tags["data"])
    raise UserError(f"{model.name} does not say what it learned from; pass its shards with --data")


def _draw(
    network: AlexNet, spec: InputSpec, manifest: shards.Manifest, data: str, pictures: int
) -> dict[str, Figure]:
    place = f"val pictures of {data}"
    found, searched = neighbours(network, spec, manifest, data, pictures)
    total = manifest.num_samples("train")
    return {
        "conv1.png": figures.conv1_kernels(network.conv1.weight),
        "top5.png": figures.top5_panels(panels(network, spec, manifest, data), place),
        "neighbours.png": figures.neighbours(
            found,
            f"Left: {place}; beside each the nearest of {searched:,} of {total:,} train pictures\n"
            "by the Euclidean distance of their fc7 activations",
        ),
    }


def panels(network: AlexNet, spec: InputSpec, manifest: shards.Manifest, data: str) -> list[Panel]:
    """Eight val pictures with the likeliest five classes: the first picture, in the order of sample
    ids, of each of eight classes that are evenly spread over the labels; nobody chose them.

    Raises UserError for shards that cannot be read, and for a val split without labels.
    """
    index = shards.load_index(data, "val")
    ids = _spread_over_classes(index["label"].to_numpy(), _PANELS)
    images = _images(data, manifest, "val", ids)
    with torch.inference_mode():
        probabilities = network(centre_view(images, spec)).float().softmax(1)
    names, found = manifest.class_names, []
    for sample, image, row in zip(ids.tolist(), images, probabilities, strict=True):
        values, classes = row.topk(min(_LIKELIEST, len(row)))
        likeliest = zip([names[i] for i in classes.tolist()], values.tolist(), strict=True)
        true = names[index["label"][sample].as_py()]
        found.append(Panel(index["key"][sample].as_py(), image, true, tuple(likeliest)))
    return found


def neighbours(
    network: AlexNet, spec: InputSpec, manifest: shards.Manifest, data: str, pictures: int
) -> tuple[list[Neighbours], int]:
    """Five val pictures, chosen as in `panels`, each with the six train pictures nearest to it, the
    nearest first; and how many train pictures were searched, at most `pictures`. Raises as
    `panels`."""
    labels = shards.load_index(data, "val")["label"].to_numpy()
    queries = _images(data, manifest, "val", _spread_over_classes(labels, _QUERIES))
    total = manifest.num_samples("train")
    searched = np.unique(np.linspace(0, total - 1, min(pictures, total)).round().astype(np.int64))
    with Loader(data, manifest, "train", threads=_threads(), cache_gb=20) as loader:
        parts = [searched[at : at + _BATCH] for at in range(0, len(searched), _BATCH)]
        activations = torch.cat([fc7(network, b.images, spec) for b in loader.batches(parts)])
    found = []
    for query, own in zip(queries, fc7(network, queries, spec), strict=True):
        distances = (activations - own).double().square().sum(1).sqrt()
        nearest = distances.argsort(stable=True)[:_NEAREST]
        images = _images(data, manifest, "train", searched[nearest.numpy()])
        found.append(Neighbours(query, images, tuple(distances[nearest].tolist())))
    return found, len(searched)


@torch.inference_mode()
def fc7(network: AlexNet, images: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """images: uint8 (N, 3, crop, crop) → float32 (N, 4096 × width): what the last hidden layer
    gives to fc8, after its ReLU, of the centre view."""
    hidden = network.features(centre_view(images, spec)).flatten(1)
    activations: torch.Tensor = network.classifier[:-1](hidden)
    return activations


def _spread_over_classes(labels: NDArray[np.int64], count: int) -> Ids:
    """int64 (≤ count,): the first sample of each of `count` classes, evenly spread; where there are
    fewer classes, their second samples follow, and so on."""
    known = np.flatnonzero(labels >= 0)
    if not len(known):
        raise UserError("the val split has no labelled pictures; pass other shards with --data")
    by_class = known[labels[known].argsort(kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    earlier = np.arange(len(by_class)) - np.repeat(starts, counts)  # samples of the same class
    chosen: Ids = by_class[earlier.argsort(kind="stable")]
    if len(starts) > count:
        chosen = chosen[np.linspace(0, len(starts) - 1, count).round().astype(np.int64)]
    return chosen[:count]


def _images(data: str, manifest: shards.Manifest, split: str, ids: Ids) -> torch.Tensor:
    """uint8 (N, 3, crop, crop) in the order of the ids."""
    with Loader(data, manifest, split, threads=_threads(), cache_gb=20) as loader:
        return loader.read(ids).images.clone()


def _threads() -> int:
    return os.cpu_count() or 1


def _save(figure: Figure, uri: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    storage.write(uri, buffer.getvalue())
    return uri
