"""`python -m training.evaluate`: the accuracy of a trained network, with its mistakes.

    python -m training.evaluate MODEL --data OUT [--split val] [--ten-crop] [--json] [--out FOLDER]

MODEL is champion, candidate, a version's number, an MLflow model URI, or the folder or s3:// prefix
of a checkpoint or run. --out writes evaluation.json (everything), classes.csv (a row per class) and
mistakes.png (the most confident mistakes). Exit codes: 0 done, 2 wrong usage or input.
"""

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alexnet.errors import UserError
from pipelines import command, shards, storage
from training import figures
from training.evaluate import VIEWS, Network, Protocol
from training.loader import Loader
from training.mistakes import ClassAccuracy, Examination, by_class, confused_pairs, examine
from training.network import LoadedModel, check_fits, load_model

_TOLD_PAIRS = 10
_TOLD_CLASSES = 10


@dataclass(frozen=True)
class Evaluation:
    """Everything that the outputs are made of; keys: the name of each mistaken picture."""

    trained: LoadedModel
    data: str
    manifest: shards.Manifest
    split: str
    protocol: Protocol
    found: Examination
    keys: tuple[str, ...]
    pictures: torch.Tensor  # of the mistakes, uint8 (N, 3, crop, crop)


def main(argv: Sequence[str] | None = None) -> int:
    return command.answered(lambda: _answer(_parse(argv)))


def _answer(args: argparse.Namespace) -> int:
    evaluation = _evaluate(args)
    if args.out is not None:
        _write(evaluation, args.out)
    print(json.dumps(document(evaluation), indent=1) if args.json else told(evaluation))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        "python -m training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", required=True, help="folder or s3:// prefix of the shards")
    parser.add_argument("--split", default="val")
    parser.add_argument(
        "--ten-crop", action="store_true", help="ten views, averaged, as the paper; needs 256 px"
    )
    parser.add_argument("--json", action="store_true", help="print evaluation.json instead of text")
    parser.add_argument("--out", metavar="FOLDER", help="write files there (folder or s3://)")
    parser.add_argument("--batch-size", type=int, default=256, help="views at a time")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(argv)


def _evaluate(args: argparse.Namespace) -> Evaluation:
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} is below 1; pass 1 or more")
    device = _device(args.device)
    protocol: Protocol = "ten_crop" if args.ten_crop else "centre"
    manifest = shards.load_manifest(args.data)
    model = load_model(args.model)
    check_fits(model, manifest, args.data)
    with Loader(
        args.data, manifest, args.split, threads=os.cpu_count() or 1, cache_gb=20
    ) as loader:
        found = examine(
            _telling(model.network.to(device), VIEWS[protocol], loader.num_samples),
            loader,
            model.input_spec,
            num_classes=manifest.num_classes,
            device=device,
            batch_size=args.batch_size,
            protocol=protocol,
        )
        if not math.isfinite(found.metrics.loss):
            raise UserError(f"{model.name} answers NaN or infinity; train it again")
        ids = np.array([mistake.sample_id for mistake in found.mistakes], dtype=np.int64)
        pictures = [batch.images.cpu() for batch in loader.batches([ids] if len(ids) else [])]
    keys = shards.load_index(args.data, args.split)["key"].to_pylist()
    return Evaluation(
        trained=model,
        data=args.data,
        manifest=manifest,
        split=args.split,
        protocol=protocol,
        found=found,
        keys=tuple(keys[i] for i in ids),
        pictures=pictures[0] if pictures else torch.empty(0, dtype=torch.uint8),
    )


def _device(choice: str) -> torch.device:
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; pass --device cpu")
    return torch.device(choice)


def _telling(network: torch.nn.Module, views: int, images: int) -> Network:
    """`network`, with a line on a terminal that says how far it is: on a CPU, ten-crop of ImageNet
    takes hours."""
    done = 0

    def forward(x: torch.Tensor) -> torch.Tensor:
        nonlocal done
        logits: torch.Tensor = network(x)
        done += len(x) // views
        if sys.stderr.isatty():
            end = "\n" if done == images else ""
            print(f"\r{done:,} of {images:,} pictures", end=end, file=sys.stderr, flush=True)
        return logits

    return forward


def document(evaluation: Evaluation) -> dict[str, Any]:
    """evaluation.json: metrics, classes, pairs and mistakes by name, and the confusion matrix as
    [label, predicted, pictures] of every cell off the diagonal that is not 0."""
    found, manifest = evaluation.found, evaluation.manifest
    names, metrics = manifest.class_names, found.metrics
    pairs = confused_pairs(found.confusion)
    return {
        "model": {"name": evaluation.trained.name, "about": evaluation.trained.about},
        "data": {
            "uri": evaluation.data,
            "split": evaluation.split,
            "manifest_sha256": manifest.digest,
        },
        "protocol": evaluation.protocol,
        "images": metrics.images,
        "top1": _share(metrics.correct1, metrics.top1, metrics.top1_interval),
        "top5": _share(metrics.correct5, metrics.top5, metrics.top5_interval),
        "loss": metrics.loss,
        "classes": [_class_row(row, manifest) for row in by_class(found.confusion)],
        "confused_pairs": [
            {"true": names[a], "predicted": names[b], "images": n} for a, b, n in pairs[:20]
        ],
        "mistakes": [
            {
                "key": key,
                "sample_id": mistake.sample_id,
                "true": names[mistake.label],
                "predicted": names[mistake.predicted],
                "probability": mistake.probability,
            }
            for key, mistake in zip(evaluation.keys, found.mistakes, strict=True)
        ],
        "confusion": [list(pair) for pair in pairs],
    }


def _share(correct: int, share: float, interval: tuple[float, float]) -> dict[str, Any]:
    return {"correct": correct, "share": share, "wilson95": list(interval)}


def _class_row(row: ClassAccuracy, manifest: shards.Manifest) -> dict[str, Any]:
    low, high = row.interval
    return {
        "label": row.label,
        "wnid": manifest.wnids[row.label],
        "name": manifest.class_names[row.label],
        "images": row.images,
        "correct": row.correct,
        "top1": row.top1,
        "low": low,
        "high": high,
        "taken_for": None if row.taken_for is None else manifest.class_names[row.taken_for],
    }


def told(evaluation: Evaluation) -> str:
    """The text for people: what was evaluated, how well, and where it goes wrong."""
    metrics, manifest = evaluation.found.metrics, evaluation.manifest
    about = f" ({evaluation.trained.about})" if evaluation.trained.about else ""
    lines = [
        f"model     {evaluation.trained.name}{about}",
        f"data      {evaluation.data}, split {evaluation.split}, {metrics.images:,} pictures, "
        f"manifest {manifest.digest[:12]}",
        f"protocol  {_PROTOCOLS[evaluation.protocol]}; 95 % Wilson intervals in brackets",
        f"top-1     {_line(metrics.correct1, metrics.top1, metrics.top1_interval)}",
        f"top-5     {_line(metrics.correct5, metrics.top5, metrics.top5_interval)}",
        f"loss      {metrics.loss:.4f} nats",
    ]
    return "\n".join([*lines, *_told_classes(evaluation), *_told_pairs(evaluation)])


_PROTOCOLS: dict[Protocol, str] = {
    "centre": "the centre 227×227 of each picture, once",
    "ten_crop": "ten-crop: corners, centre and mirror images, probabilities averaged",
}


def _line(correct: int, share: float, interval: tuple[float, float]) -> str:
    return f"{share:.4f}  [{interval[0]:.4f}, {interval[1]:.4f}]  {correct:,} right"


def _told_classes(evaluation: Evaluation) -> list[str]:
    names = evaluation.manifest.class_names
    rows = [row for row in by_class(evaluation.found.confusion) if row.top1 is not None]
    rows.sort(key=lambda row: (row.top1, row.label))
    shown = [
        f"  {row.top1:.4f}  [{row.interval[0]:.4f}, {row.interval[1]:.4f}]  {row.images:>5}  "
        f"{figures.short(names[row.label]):<24}  "
        f"{'' if row.taken_for is None else figures.short(names[row.taken_for])}".rstrip()
        for row in rows[:_TOLD_CLASSES]
    ]
    title = f"{len(shown)} of {len(rows)} classes, the worst first"
    head = f"  {'top-1':<6}  {'':<16}  {'of':>5}  {'class':<24}  most often taken for"
    return ["", title, head, *shown]


def _told_pairs(evaluation: Evaluation) -> list[str]:
    names, pairs = evaluation.manifest.class_names, confused_pairs(evaluation.found.confusion)
    shown = [
        f"  {n:>5}  {figures.short(names[a])} taken for {figures.short(names[b])}"
        for a, b, n in pairs[:_TOLD_PAIRS]
    ]
    return ["", f"{len(shown)} of {len(pairs)} confused pairs", *shown] if pairs else []


def _write(evaluation: Evaluation, folder: str) -> None:
    folder = storage.absolute(folder)
    whole = document(evaluation)
    storage.write(
        storage.join(folder, "evaluation.json"), (json.dumps(whole, indent=1) + "\n").encode()
    )
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(whole["classes"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(whole["classes"])
    storage.write(storage.join(folder, "classes.csv"), table.getvalue().encode())
    captions = [
        figures.Caption(row["true"], row["predicted"], row["probability"])
        for row in whole["mistakes"]
    ]
    title = f"{evaluation.trained.name}: the {len(captions)} most confident mistakes"
    sheet = figures.contact_sheet(evaluation.pictures, captions, title)
    png = io.BytesIO()
    sheet.savefig(png, format="png")
    storage.write(storage.join(folder, "mistakes.png"), png.getvalue())
