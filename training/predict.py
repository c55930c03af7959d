"""Names the classes of pictures with a trained network.

    python -m training.predict IMAGE|FOLDER… [--model MODEL] [--top 5] [--json] [--sheet FILE]
    python -m training.predict --data OUT --out FOLDER [--model MODEL] [--split val] [--workers N]

The first names the classes of picture files, and of those in folders, with everything below them.
--json prints a line of JSON for each picture, --sheet draws the first 60 with their likeliest class
into a PNG file.

The second predicts a whole split on Ray and writes a folder that pandas and pyarrow read as one
table, with a parquet part for each shard; the same command goes on with one that was stopped.
_predictions.json in it says which model and data they are of.

MODEL is champion (the default), candidate, a version's number, an MLflow model URI, or the folder
or s3:// prefix of a checkpoint or run. The geometry and the pixel statistics are the model's own.

Exit codes: 0 done, 1 some pictures cannot be read (each is told, the others are predicted), 2 wrong
usage or input, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    from pipelines import command

    command.begin()

from alexnet.errors import UserError
from pipelines import command
from training import picture_files
from training.evaluate import Metrics
from training.network import load_model
from training.picture_files import Prediction
from training.predictions import write_predictions


def main(argv: Sequence[str] | None = None) -> int:
    return command.answered(
        lambda: _predict(_parser().parse_args(argv)),
        stopped="stopped; with --data, the same command goes on from here",
    )


def _predict(args: argparse.Namespace) -> int:
    if (args.data is None) == (not args.pictures):
        raise UserError("name picture files or folders, or the shards to predict with --data")
    if (args.data is None) != (args.out is None):
        raise UserError("--data OUT and --out FOLDER go together")
    return _predict_pictures(args) if args.data is None else _predict_shards(args)


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        "python -m training.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pictures", nargs="*", metavar="IMAGE|FOLDER")
    parser.add_argument("--model", default="champion", help="default: %(default)s")
    parser.add_argument("--top", type=int, default=5, help="how many classes to name (5)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each picture")
    parser.add_argument("--sheet", metavar="FILE", help="a PNG of the pictures and their classes")
    shards = parser.add_argument_group("predictions of a shard set")
    shards.add_argument("--data", metavar="OUT", help="folder or s3:// prefix of the shards")
    shards.add_argument("--out", metavar="FOLDER", help="where the parts go (folder or s3://)")
    shards.add_argument("--split", default="val", help="val, train, … (%(default)s)")
    shards.add_argument("--workers", type=int, help="processes of one CPU (all CPUs)")
    shards.add_argument("--shared-fs", action="store_true", help="all nodes see a local OUT")
    return parser


def _predict_pictures(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise UserError(f"--top {args.top} is below 1; pass 1 or more")
    found = picture_files.find(args.pictures)
    if found.skipped:
        print(f"skipped {found.skipped:,} entries that are no pictures", file=sys.stderr)
    model = load_model(args.model)
    bad = 0
    shown: list[Prediction] = []
    for prediction in picture_files.predict(model, found.paths, args.top):
        if prediction.error is not None:
            bad += 1
            print(f"error: {prediction.error}", file=sys.stderr)
        elif len(shown) < picture_files.ON_SHEET and args.sheet is not None:
            shown.append(prediction)
        if args.json:
            print(prediction.json_line())
        elif prediction.error is None:
            print(prediction.told())
    if args.sheet is not None:
        picture_files.write_sheet(args.sheet, model.name, shown, len(found.paths) - bad)
    return 1 if bad else 0


def _predict_shards(args: argparse.Namespace) -> int:
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers} is below 1; pass 1 or more")
    found = write_predictions(
        load_model(args.model),
        args.data,
        args.out,
        split=args.split,
        workers=args.workers,
        shared_fs=args.shared_fs,
    )
    command.say(
        f"{args.out}: {found.parts} parts, {found.made} of them new; {_told(found.metrics)}"
    )
    return 0


def _told(metrics: Metrics) -> str:
    low, high = metrics.top1_interval
    return (
        f"top-1 {metrics.top1:.4f} [{low:.4f}, {high:.4f}], top-5 {metrics.top5:.4f}, loss "
        f"{metrics.loss:.4f} on {metrics.images:,} pictures"
    )


if __name__ == "__main__":
    command.leave(main)
