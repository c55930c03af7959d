"""The control of every accuracy here: the same images with their labels shuffled.

    python -m benchmarks.shuffled RAW OUT [--seed 0]

A network that learns from OUT can know nothing about the val split. If it does, labels leak.
"""

import argparse
import os
import random
from pathlib import Path

from alexnet.errors import UserError
from pipelines import command


def shuffle_labels(raw: Path, out: Path, seed: int) -> int:
    """Links the images of RAW/train/CLASS to OUT/train, each under a class drawn by the seed, and
    those of RAW/val as they are; returns how many have another class than before.

    Classes keep their sizes. Train images are named by number, since a name such as
    n01440764_10026.JPEG would tell the class, and the builder would refuse the contradiction.
    Raises UserError for a RAW that has no class folders, and for an OUT that exists.
    """
    images = sorted((raw / "train").glob("*/*"))
    if not images:
        raise UserError(f"{raw} has no train/CLASS/IMAGE; give a folder of class folders")
    if out.exists():
        raise UserError(f"{out} exists; choose another OUT, or remove it first")
    classes = [path.parent.name for path in images]
    drawn = random.Random(seed).sample(classes, len(classes))
    for number, (path, name) in enumerate(zip(images, drawn, strict=True)):
        _link(path, out / "train" / name / f"{number:07d}{path.suffix}")
    for path in sorted((raw / "val").glob("*/*")):
        _link(path, out / "val" / path.parent.name / path.name)
    return sum(before != after for before, after in zip(classes, drawn, strict=True))


def _link(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    os.link(path, to)


def main(argv: list[str] | None = None) -> int:
    parser = command.Parser("python -m benchmarks.shuffled", description=__doc__)
    parser.add_argument("raw", type=Path, metavar="RAW")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    return command.answered(lambda: _shuffled(parser.parse_args(argv)))


def _shuffled(arguments: argparse.Namespace) -> int:
    try:
        moved = shuffle_labels(arguments.raw, arguments.out, arguments.seed)
    except OSError as error:
        raise UserError(str(error)) from error
    print(f"{arguments.out}: {moved:,} train images under another class than before")
    return 0


if __name__ == "__main__":
    command.begin()
    command.leave(main)
