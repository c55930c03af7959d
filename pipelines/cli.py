"""python -m pipelines build | plan | verify | inspect | report | demo-raw

Exit codes: 0 done; 1 verification failed or build incomplete; 2 wrong usage or input; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from alexnet.errors import UserError
from pipelines import storage
from pipelines.plan import Plan, Recipe
from pipelines.progress import BuildFailed, MaxRejected
from pipelines.sources import SPLITS, Source


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        return int(arguments.command(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BuildFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; finished shards are kept, the same command continues", file=sys.stderr)
        return 130


def build(arguments: argparse.Namespace) -> int:
    from pipelines.plan import begin

    max_rejected = MaxRejected.parse(arguments.max_rejected)
    source, plan = _plan(arguments)
    out = _out(arguments, plan)
    begin(out, source, plan)
    if storage.exists(storage.join(out, "manifest.json")):
        print(f"{out} is finished already (plan {plan.plan_id[:12]}); nothing to do")
        _next_command(out)
        return 0
    print(_in_words(source, plan, out), flush=True)

    import pipelines.build  # loads Ray: not before every check that needs none

    manifest = pipelines.build.build(
        source,
        plan,
        out,
        max_rejected=max_rejected,
        workers=arguments.workers,
        shared_fs=arguments.shared_fs,
    )
    totals = manifest.document["totals"]
    samples = " + ".join(f"{total['samples']:,} {split}" for split, total in totals.items())
    num_bytes = sum(total["bytes"] for total in totals.values())
    print(f"built {out}: {samples} samples in {len(plan.shards)} shards, {num_bytes / 1e6:,.1f} MB")
    for what in ("fixes", "rejected"):
        if counts := manifest.document[what]:
            print(f"{what}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    _next_command(out)
    return 0


def plan(arguments: argparse.Namespace) -> int:
    source, plan = _plan(arguments)
    out = _out(arguments, plan)
    print(_in_words(source, plan, out))
    for split in plan.identity["recipe"]["splits"]:
        parts = [shard.samples for shard in plan.shards if shard.split == split]
        sizes = f"{min(parts):,}" if min(parts) == max(parts) else f"{min(parts):,}-{max(parts):,}"
        plural = "s" if len(parts) > 1 else ""
        print(f"{split}: {sum(parts):,} pictures in {len(parts)} shard{plural} of {sizes}")
        print(f"{split} labels: {source.labels_from[split]}")
        if source.announced:
            print(f"{split}: the devkit announces {source.announced[split]:,}")
    print(f"about {plan.estimated_bytes / 1e6:,.1f} MB of shards; plan_id {plan.plan_id}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from pipelines.verify import verify

    out = storage.absolute(arguments.out)
    problems, checked = verify(out, full=arguments.full)
    for problem in problems:
        print(problem)
    print(f"{out}: {checked}; {'no' if not problems else len(problems)} problems")
    return 1 if problems else 0


def inspect(arguments: argparse.Namespace) -> int:
    from pipelines.verify import inspect

    print(inspect(_existing(arguments.out), arguments.what))
    return 0


def report(arguments: argparse.Namespace) -> int:
    from pipelines.report import report

    print(report(storage.absolute(arguments.out)))
    return 0


def demo_raw(arguments: argparse.Namespace) -> int:
    from pipelines.demo_raw import Drawing, draw

    drawing = Drawing(arguments.classes, arguments.per_class, arguments.val_per_class)
    print(draw(storage.absolute(arguments.dir), drawing, arguments.seed))
    print(f"next: python -m pipelines build --raw {arguments.dir}")
    return 0


def _plan(arguments: argparse.Namespace) -> tuple[Source, Plan]:
    from pipelines.plan import make
    from pipelines.sources import scan

    recipe = Recipe(
        resize=arguments.resize,
        crop=arguments.crop,
        quality=arguments.quality,
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        splits=tuple(dict.fromkeys(arguments.splits.split(","))),
        partial=arguments.partial,
    )
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers} must be at least 1")
    splits = [split for split in SPLITS if split in recipe.splits]
    source = scan(storage.absolute(arguments.raw), splits, recipe.partial)
    return source, make(source, recipe)


def _out(arguments: argparse.Namespace, plan: Plan) -> str:
    if arguments.out is not None:
        return storage.absolute(arguments.out)
    return str(storage.home() / "shards" / plan.plan_id[:12])


def _existing(out: str | None) -> str:
    found = storage.absolute(out) if out is not None else storage.newest_shards()
    if found is None:
        shards = storage.home() / "shards"
        raise UserError(
            f"no shard set under {shards}; pass --out, or build one with "
            "`python -m pipelines build --raw RAW`"
        )
    return found


def _in_words(source: Source, plan: Plan, out: str) -> str:
    pictures = " + ".join(
        f"{source.count(split):,} {split}" for split in plan.identity["recipe"]["splits"]
    )
    notes = "".join(f"\nnote: {note}" for note in source.notes)
    partial = " (partial)" if plan.identity["recipe"]["partial"] else ""
    return (
        f"{source.raw}: {source.layout}{partial}, {pictures} pictures, {len(source.wnids)} classes"
        f"{notes}\n{out}: {len(plan.shards)} shards, plan {plan.plan_id[:12]}"
    )


def _next_command(out: str) -> None:
    print(f"next: ray job submit --working-dir . -- python training/run.py --data {out}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other mistake; argparse would print its usage first."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m pipelines", description="Raw ImageNet to WebDataset shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for command, function, text in (
        ("build", build, "make the shards, or continue making them"),
        ("plan", plan, "say what build would do, and change nothing"),
    ):
        sub = commands.add_parser(command, help=text, allow_abbrev=False)
        sub.set_defaults(command=function)
        _add_build_flags(sub)

    sub = commands.add_parser("verify", help="check a shard set", allow_abbrev=False)
    sub.set_defaults(command=verify)
    sub.add_argument("out", metavar="OUT", help="folder or s3:// prefix of the shard set")
    sub.add_argument("--full", action="store_true", help="decode every picture as well")

    sub = commands.add_parser("inspect", help="show a shard or a sample", allow_abbrev=False)
    sub.set_defaults(command=inspect)
    sub.add_argument("what", metavar="SHARD|KEY", help="such as train-000000 or n01440764_10026")
    sub.add_argument("--out", help="shard set; default: the newest under $ALEXNET_HOME")

    sub = commands.add_parser("report", help="write OUT/report/index.html", allow_abbrev=False)
    sub.set_defaults(command=report)
    sub.add_argument("out", metavar="OUT")

    sub = commands.add_parser("demo-raw", help="draw a small raw set", allow_abbrev=False)
    sub.set_defaults(command=demo_raw)
    sub.add_argument("dir", metavar="DIR")
    sub.add_argument("--classes", type=int, default=10, help="2 to 10")
    sub.add_argument("--per-class", type=int, default=60, help="train pictures of each class")
    sub.add_argument("--val-per-class", type=int, default=10)
    sub.add_argument("--seed", type=int, default=0)
    return parser


def _add_build_flags(parser: argparse.ArgumentParser) -> None:
    default = Recipe()
    add = parser.add_argument
    add("--raw", required=True, help="folder or s3:// prefix of archives or class folders")
    add("--out", help="default: $ALEXNET_HOME/shards/PLAN")
    add("--resize", type=int, default=default.resize, help="shorter side, pixels (%(default)s)")
    add("--crop", type=int, default=default.crop, help="centre square, pixels (%(default)s)")
    add("--quality", type=int, default=default.quality, help="of the JPEGs (%(default)s)")
    add("--samples-per-shard", type=int, default=default.samples_per_shard, help="(%(default)s)")
    add("--seed", type=int, default=default.seed, help="of the order inside shards (%(default)s)")
    add("--splits", default=",".join(SPLITS), help="(%(default)s)")
    add("--partial", action="store_true", help="accept fewer pictures than the devkit announces")
    add("--max-rejected", default="1%", help="unusable pictures: N or P%%")
    add("--workers", type=int, help="most shards at once; default: one per CPU")
    add("--shared-fs", action="store_true", help="every node sees the local paths given")
