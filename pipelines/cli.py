"""python -m pipelines build | plan | verify | inspect | status | report | fetch | demo-raw

Exit codes: 0 done; 1 verification failed or build incomplete; 2 wrong usage or input; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import get_args

from pipelines import command, commands
from pipelines.plan import Orientation, Recipe
from pipelines.progress import BuildFailed
from pipelines.sources import SPLITS, Shuffle


def main(argv: Sequence[str] | None = None) -> int:
    return command.answered(
        lambda: _called(argv),
        stopped="stopped; what is finished is kept, the same command continues",
        failed={BuildFailed: "failed"},
    )


def _called(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    return int(arguments.command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="python -m pipelines", description="Raw ImageNet to WebDataset shards."
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(
        name: str,
        function: Callable[[argparse.Namespace], int],
        text: str,
        aliases: Sequence[str] = (),
        json: bool = True,
    ) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, aliases=aliases, allow_abbrev=False)
        sub.set_defaults(command=function)
        if json:
            sub.add_argument("--json", action="store_true", help="JSON on stdout, for programs")
        return sub

    sub = verb("build", commands.build, "make the shards, or go on making them", ["rebuild"])
    _add_plan_flags(sub)
    _add_build_flags(sub)
    sub = verb("plan", commands.plan, "say what build would do, and change nothing")
    _add_plan_flags(sub)
    _add_check_flags(verb("verify", commands.verify, "check a shard set, or mend it"))
    sub = verb("inspect", commands.inspect, "show a shard or a sample, back to RAW")
    sub.add_argument("what", metavar="SHARD|KEY", help="such as train-000000 or n01440764_10026")
    sub.add_argument("--out", help="shard set; default: the newest under $ALEXNET_HOME")
    sub = verb("status", commands.status, "how far a running or stopped build is")
    sub.add_argument("out", metavar="OUT", nargs="?")
    sub = verb("report", commands.report, "write OUT/report/index.html", json=False)
    sub.add_argument("out", metavar="OUT", nargs="?")
    _add_fetch_flags(verb("fetch", commands.fetch, "download a public raw set", json=False))
    _add_drawing_flags(verb("demo-raw", commands.demo_raw, "draw a small raw set", json=False))
    return parser


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
    default = Recipe()
    add = parser.add_argument
    add("--raw", required=True, help="folder or s3:// prefix of the raw data, in any known layout")
    add("--out", help="default: $ALEXNET_HOME/shards/PLAN")
    add("--resize", type=int, help=f"shorter side, pixels ({default.resize})")
    add("--crop", type=int, help=f"centre square, pixels ({default.crop})")
    add("--quality", type=int, help=f"of the JPEGs ({default.quality})")
    add(
        "--exif-orientation",
        metavar="|".join(get_args(Orientation)),
        help="of pictures that say they lie on their side (ignore, as published results do)",
    )
    add("--samples-per-shard", type=int, help=f"({default.samples_per_shard})")
    add(
        "--shuffle",
        metavar="|".join(get_args(Shuffle)),
        help="how pictures are spread over shards (what suits the layout)",
    )
    add("--seed", type=int, help=f"of every shuffle ({default.seed})")
    add("--splits", default=",".join(default.splits), help=f"of {','.join(SPLITS)} (%(default)s)")
    add("--subset", metavar="WNID,...|FILE", help="these classes only")
    add("--per-class", type=int, metavar="N", help="at most N pictures of each class and split")
    add("--partial", action="store_true", help="accept fewer pictures than are announced")
    add("--verify-md5", action="store_true", help="hash the published archives first")


def _add_build_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--max-rejected",
        metavar="N|P%",
        help="unusable pictures (1%%; of the published archives none)",
    )
    add("--only", metavar="12,40-44", help="these shards only, numbered as plan says, or by name")
    add("--retry-quarantined", action="store_true", help="make shards with rejected pictures anew")
    add("--workers", type=int, help="most shards at once; default: one per CPU")
    add(
        "--address",
        metavar="HOST:PORT",
        help="Ray cluster to build on, from one of its nodes; default: $RAY_ADDRESS, or this host",
    )
    add("--shared-fs", action="store_true", help="every node sees the local paths given")


def _add_check_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", metavar="OUT", help="folder or s3:// prefix of the shard set")
    add("--full", action="store_true", help="hash every byte, decode every picture")
    add("--repair", action="store_true", help="make again what fails, from RAW")
    add("--raw", help="compare images and labels with it; with --repair: where RAW is now")
    add("--shared-fs", action="store_true", help="every node sees the local paths given")


def _add_fetch_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help="imagenette: fast.ai's ten classes of ImageNet")
    add("--to", required=True, metavar="RAW", help="folder to fill")
    add("--size", default="160", help="shorter side: 160, 320 or full (%(default)s)")
    add("--mirror", metavar="URL", help="where else the archive lies")


def _add_drawing_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dir", metavar="DIR")
    add("--classes", type=int, default=10, help="2 to 10")
    add("--per-class", type=int, default=60, help="train pictures of each class")
    add("--val-per-class", type=int, default=10)
    add("--seed", type=int, default=0)
