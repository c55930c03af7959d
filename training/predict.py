"""Names the classes of images with a trained network.

    python -m training.predict IMAGE|FOLDER… [--model MODEL] [--top 5] [--json]
    python -m training.predict --data OUT --out FILE [--model MODEL] [--split val] [--workers N]

The first names the classes of image files, and of those in folders, with everything below them.
--json prints a line of JSON for each image.

The second predicts a whole split and writes one table, with a row for each image, to a .parquet
file, or as predictions.parquet to a folder: in this process, or with --workers N on Ray.

MODEL is champion (the default), candidate, a version's number, an MLflow model URI, or the folder
or s3:// prefix of a checkpoint or run. The geometry and the pixel statistics are the model's own.

Exit codes: 0 done, 1 some images cannot be read (each is reported, the others are predicted), 2
wrong usage or input, 130 interrupted.
"""

if __name__ == "__main__":
    from pipelines import command

    command.begin()
    import training.predict

    command.leave(training.predict.main)

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from alexnet.classifier import BATCH_SIZE, decode, top_k
from alexnet.errors import UserError
from alexnet.preprocess import InputSpec, resize_and_crop
from pipelines import command, entries, shards, storage
from training.evaluate import add_ray_flags, score
from training.network import LoadedModel, check_fits, load_model

# (name, wnid), probability: the likeliest first
Classes = list[tuple[tuple[str, str], float]]


def main(argv: Sequence[str] | None = None) -> int:
    return command.answered(lambda: _predict(_parser().parse_args(argv)))


def _predict(args: argparse.Namespace) -> int:
    if (args.data is None) == (not args.images):
        raise UserError("name image files or folders, or the shards to predict with --data")
    if (args.data is None) != (args.out is None):
        raise UserError("--data OUT and --out FILE go together")
    return _predict_files(args) if args.data is None else _predict_shards(args)


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser("python -m training.predict", description=__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE|FOLDER")
    parser.add_argument("--model", default="champion", help="default: %(default)s")
    parser.add_argument("--top", type=int, default=5, help="how many classes to name (5)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each image")
    split = parser.add_argument_group("predictions of a shard set")
    split.add_argument("--data", metavar="OUT", help="folder or s3:// prefix of the shards")
    split.add_argument("--out", metavar="FILE", help="a .parquet file or folder (or s3://)")
    split.add_argument("--split", default="val", help="val, train, … (%(default)s)")
    add_ray_flags(split)
    return parser


def _predict_files(args: argparse.Namespace) -> int:
    paths, skipped = _find(args.images)
    if skipped:
        print(f"skipped {skipped:,} entries that are not images", file=sys.stderr)
    bad = 0
    for path, found in _classes(load_model(args.model), paths, args.top):
        if isinstance(found, UserError):
            bad += 1
            print(f"error: {found}", file=sys.stderr)
            if args.json:
                print(json.dumps({"path": path, "error": str(found)}))
        elif args.json:
            rows = [{"name": name, "wnid": wnid, "probability": p} for (name, wnid), p in found]
            print(json.dumps({"path": path, "classes": rows}))
        else:
            print(path, *(f"  {p:7.2%}  {name}" for (name, _), p in found), sep="\n")
    return 1 if bad else 0


def _find(named: Sequence[str]) -> tuple[list[str], int]:
    """Files as they are named, and the images of folders, with everything below them, in order of
    their names; and how many other entries the folders hold, ignored as in a build. Links are
    followed; one that leads nowhere is a path that cannot be read.

    Raises UserError for a folder that cannot be read or holds nothing that may be an image.
    """
    paths: list[str] = []
    skipped = 0
    for name in named:
        # Path's own would raise for a name that is too long for a file.
        if not os.path.isdir(name):  # noqa: PTH112
            paths.append(name)
            continue
        below = entries.listing(name)
        files = sorted([*below.files, *below.broken])
        images = [file for file in files if entries.rule(file) is None]
        if not images:
            raise UserError(
                f"{name} holds no image ({below.total} entries, each ignored by its name); name "
                "another folder"
            )
        paths += [str(Path(name) / file) for file in images]
        skipped += below.total - len(images)
    return paths, skipped


def _classes(
    model: LoadedModel, paths: Sequence[str], top: int
) -> Iterator[tuple[str, Classes | UserError]]:
    """In the order of `paths`, with a batch of images in memory; or what is wrong with the file."""
    spec = model.input_spec
    names = list(zip(model.class_names, model.wnids, strict=True))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for at in range(0, len(paths), BATCH_SIZE):
            part = paths[at : at + BATCH_SIZE]
            read = list(pool.map(lambda path: _read(path, spec), part))
            images = [image for image in read if not isinstance(image, UserError)]
            answers = iter(
                top_k(model.network, torch.stack(images), spec, names, top) if images else []
            )
            for path, image in zip(part, read, strict=True):
                yield path, image if isinstance(image, UserError) else next(answers)


def _read(path: str, spec: InputSpec) -> torch.Tensor | UserError:
    try:
        # Contiguous, because the crop is a view that would keep the whole resized image.
        return resize_and_crop(decode(path), spec.resize, spec.crop).contiguous()
    except UserError as error:
        return error


def _predict_shards(args: argparse.Namespace) -> int:
    manifest = shards.load_manifest(args.data)
    model = load_model(args.model)
    check_fits(model, manifest, args.data)
    network, ray = model.network, {"workers": args.workers, "shared_fs": args.shared_fs}
    if args.workers is None and torch.cuda.is_available():
        network = network.to("cuda")
    scored = score(
        network, model.input_spec, args.data, manifest, args.split, label="predictions", **ray
    )
    out = storage.absolute(args.out)
    file = out if out.endswith(".parquet") else storage.join(out, "predictions.parquet")
    storage.write(file, shards.parquet_bytes(scored.table(model.name, manifest)))
    metrics = scored.metrics
    low, high = metrics.top1_interval
    command.say(
        f"{file}: {metrics.images:,} images; top-1 {metrics.top1:.4f} [{low:.4f}, {high:.4f}], "
        f"top-5 {metrics.top5:.4f}, loss {metrics.loss:.4f}"
    )
    return 0
