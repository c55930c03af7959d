"""python -m pipelines build | plan | verify | inspect | status | report | fetch | demo-raw

Exit codes: 0 done; 1 verification failed or build incomplete; 2 wrong usage or input; 130 Ctrl-C.
Each command imports what it needs as it starts: `--help` and a wrong flag wait for nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import psutil

from alexnet.errors import UserError
from pipelines import command, storage
from pipelines.plan import Orientation, Plan, Recipe, chosen, make
from pipelines.progress import BuildFailed, MaxRejected
from pipelines.sources import SPLITS, Shuffle, Source

if TYPE_CHECKING:
    from pipelines.build import OnRay
    from pipelines.shards import Manifest
    from pipelines.verify import Findings

_Command = Callable[[argparse.Namespace], int]
_BYTES_PER_IMAGE = 400  # of the plan, while it is made and written: measured at 14 million
# Layouts that earlier releases always took in their own order, sorted or not: a set that was begun
# so goes on so.
_READ_AS_THEY_ARE = ("huggingface", "webdataset", "shards")


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
    parser = command.Parser("python -m pipelines", description="Raw ImageNet to WebDataset shards.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(name: str, function: _Command, text: str, *aliases: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, aliases=aliases, allow_abbrev=False)
        sub.set_defaults(command=function)
        if function in (_build, _plan, _verify, _inspect, _status):
            sub.add_argument("--json", action="store_true", help="JSON on stdout, for programs")
        return sub

    sub = verb("build", _build, "make the shards, or go on making them", "rebuild")
    _add_plan_flags(sub)
    _add_build_flags(sub)
    sub = verb("plan", _plan, "say what build would do, and change nothing")
    _add_plan_flags(sub)
    _add_check_flags(verb("verify", _verify, "check a shard set, or repair it"))
    sub = verb("inspect", _inspect, "show a shard or a sample, back to RAW")
    sub.add_argument("what", metavar="SHARD|KEY", help="such as train-000000 or n01440764_10026")
    sub.add_argument("--out", help="shard set; default: the newest under $ALEXNET_HOME")
    sub = verb("status", _status, "how far a running or stopped build is")
    sub.add_argument("out", metavar="OUT", nargs="?")
    sub = verb("report", _report, "write OUT/report/index.html")
    sub.add_argument("out", metavar="OUT", nargs="?")
    _add_fetch_flags(verb("fetch", _fetch, "download a public raw set"))
    _add_drawing_flags(verb("demo-raw", _demo_raw, "draw a small raw set"))
    return parser


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
    default = Recipe()
    add = parser.add_argument
    add("--raw", required=True, help="folder or s3:// prefix of the raw data, in any known layout")
    add("--out", help="default: $ALEXNET_HOME/shards/PLAN")
    add("--resize", type=int, help=f"shorter side, pixels ({default.resize})")
    add("--crop", type=int, help=f"centre square, pixels ({default.crop})")
    add("--quality", type=int, help=f"of the JPEGs ({default.quality})")
    exif = "of images that say they lie on their side (ignore, as published results do)"
    add("--exif-orientation", metavar="|".join(get_args(Orientation)), help=exif)
    add("--samples-per-shard", type=int, help=f"({default.samples_per_shard})")
    spread = "how images are spread over shards (what mixes the classes: source or classes)"
    add("--shuffle", metavar="|".join(get_args(Shuffle)), help=spread)
    add("--seed", type=int, help=f"of every shuffle ({default.seed})")
    add("--splits", default=",".join(default.splits), help=f"of {','.join(SPLITS)} (%(default)s)")
    add("--val-share", type=float, metavar="0.1", help="make val of so much of each train class")
    add("--subset", metavar="WNID,...|FILE", help="these classes only")
    add("--per-class", type=int, metavar="N", help="at most N images of each class and split")
    add("--partial", action="store_true", help="accept fewer images than are announced")
    add("--verify-md5", action="store_true", help="hash the published archives first")


def _add_build_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    limit = "unusable images (1%%; of the published archives none)"
    add("--max-rejected", metavar="N|P%", help=limit)
    add("--only", metavar="12,40-44", help="these shards only, numbered as plan says, or by name")
    add("--retry-quarantined", action="store_true", help="rebuild shards with rejected images")
    _add_ray_flags(add, "$RAY_ADDRESS, or this host")


def _add_check_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", metavar="OUT", help="folder or s3:// prefix of the shard set")
    add("--full", action="store_true", help="hash every byte, decode every image")
    add("--repair", action="store_true", help="rebuild what fails, from RAW")
    add("--raw", help="compare images and labels with it; with --repair: where RAW is now")
    _add_ray_flags(add, "without Ray; a repair as build does")


def _add_ray_flags(add: Callable[..., object], default: str) -> None:
    add("--workers", type=int, help="most shards at once; default: one per CPU")
    ray = f"Ray cluster to work on, from one of its nodes; default: {default}"
    add("--address", metavar="HOST:PORT", help=ray)
    add("--ray-logs", action="store_true", help="show what Ray's own processes say too")
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
    add("--per-class", type=int, default=60, help="train images of each class")
    add("--val-per-class", type=int, default=10)
    add("--seed", type=int, default=0)


def _build(arguments: argparse.Namespace) -> int:
    import pipelines.build
    from pipelines import plan_files

    MaxRejected.parse(arguments.max_rejected)  # before the long reading of RAW
    on = _on_ray(arguments)
    source, plan, out = _planned(arguments)
    only = _only_of(arguments.only, plan) if arguments.only else None
    limit = MaxRejected.parse(arguments.max_rejected, plan.official)
    if arguments.retry_quarantined:
        again = pipelines.build.retry_quarantined(out, source.raw, plan)
        _say(arguments, f"made again: {', '.join(again) or 'nothing, no image is quarantined'}")
    plan = plan_files.begin(out, source.raw, plan)
    if storage.exists(storage.join(out, "manifest.json")):
        _say(arguments, f"{out} is finished already (plan {plan.plan_id[:12]}); nothing to do")
        _say(arguments, _next_command(arguments, plan, out))
        return 0
    _say(arguments, _in_words(source, plan, out))

    manifest = pipelines.build.build(
        plan,
        source.raw,
        out,
        max_rejected=limit,
        only=only,
        on=on,
        as_json=arguments.json,
    )
    if manifest is None:
        _say(arguments, f"{out}: the shards of --only are there; build without it to finish")
    elif arguments.json:
        names = {"plan_id", "totals", "fixes", "rejected", "entries", "lost_classes"}
        summary = {name: value for name, value in manifest.document.items() if name in names}
        summary |= {"shards": len(manifest.shards), "data_set": manifest.digest}
        command.say(json.dumps({"event": "built", "out": out} | summary))
    else:
        command.say(f"{_built(manifest, out)}\n{_next_command(arguments, plan, out)}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from pipelines import plan_files

    source, plan, out = _planned(arguments)
    # A store that does not answer or refuses, and a disk that is too small, are reported now.
    there = {name for name, _ in storage.list_files(out)}
    missing = [n for n, shard in enumerate(plan.shards) if f"{shard.name}.tar" not in there]
    plan_files.refuse_full(out, plan, missing)
    document = _plan_document(source, plan, out)
    if arguments.json:
        print(json.dumps(document, indent=1))
        return 0
    print(_in_words(source, plan, out))
    first = 0
    for split, entry in document["splits"].items():
        last = first + entry["shards"] - 1
        sizes = "-".join(f"{size:,}" for size in dict.fromkeys(entry["samples_per_shard"]))
        print(f"{split}: {entry['pictures']:,} images in shards {first} to {last} of {sizes}")
        size = f" of {entry['mean_read_bytes'] / 1e6:.2f} MB" if entry["read_bytes"] else ""
        print(f"{split}: {entry['reads']:,} reads{size}")
        print(f"{split} labels: {entry['labels_from']}")
        if entry["announced"] is not None:
            print(f"{split}: {entry['announced']:,} are announced")
        first = last + 1
    print(f"about {document['bytes'] / 1e6:,.1f} MB of shards; plan_id {plan.plan_id}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    import pipelines.build

    out = storage.absolute(arguments.out)
    raw = storage.absolute(arguments.raw) if arguments.raw else None
    say = functools.partial(_say, arguments)
    on = _on_ray(arguments)
    asked = (on.address, on.workers, on.shared_fs, on.ray_logs)
    if any(asked) and not (arguments.full or arguments.repair):
        raise UserError(
            "--address, --workers, --shared-fs and --ray-logs are for --full and --repair; pass "
            "one of these as well"
        )
    mend = functools.partial(pipelines.build.repair, out, raw=raw, on=on, as_json=arguments.json)
    check = functools.partial(_checked, out, full=arguments.full, say=say, on=on)
    repaired = None
    if arguments.repair and (undone := pipelines.build.left_undone(out)) is not None:
        say(f"{out}: a repair or a build was stopped at its end; going on with it")
        repaired = mend(undone)
    looked_up = raw if arguments.full or not arguments.repair else None
    found = check(raw=looked_up)
    if found.problems and arguments.repair:
        for problem in found.problems:
            say(f"{problem.file}: {problem.text}")
        repaired = mend(found.bad_files)
        found = check(raw=None)
    if arguments.json:
        document: dict[str, Any] = {"out": out, "problems": [*map(vars, found.problems)]}
        document |= {"notes": found.notes, "checked": found.checked}
        document |= {"repaired": repaired is not None}
        print(json.dumps(document))  # in one line, as those of a repair's progress
    else:
        lines = [f"{problem.file}: {problem.text}" for problem in found.problems]
        lines += [f"note: {note}" for note in found.notes]
        count = len(found.problems) or "no"
        print(*lines, f"{out}: {found.checked}; {count} problems", sep="\n")
    return int(bool(found.problems))


def _checked(
    out: str, *, full: bool, raw: str | None, on: OnRay, say: Callable[[str], None]
) -> Findings:
    """Files are read whole by a cluster where one was named, else by threads of this process."""
    from pipelines import strict_read
    from pipelines.verify import verify

    read = functools.partial(strict_read.in_threads, workers=on.workers)
    if not full or on.address is None:
        return verify(out, full=full, raw=raw, say=say, read=read)
    with on.joined(out):
        read = functools.partial(strict_read.on_ray, workers=on.workers)
        return verify(out, full=full, raw=raw, say=say, read=read)


def _on_ray(arguments: argparse.Namespace) -> OnRay:
    from pipelines.build import OnRay

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers} must be at least 1")
    return OnRay(arguments.workers, arguments.address, arguments.shared_fs, arguments.ray_logs)


def _inspect(arguments: argparse.Namespace) -> int:
    from pipelines.inspect import inspect, text

    return _shown(arguments, inspect(_existing(arguments.out), arguments.what), text)


def _status(arguments: argparse.Namespace) -> int:
    from pipelines.inspect import status, status_text

    return _shown(arguments, status(_existing(arguments.out, begun=True)), status_text)


def _shown(arguments: argparse.Namespace, document: Any, text: Callable[[Any], str]) -> int:
    print(json.dumps(document, indent=1) if arguments.json else text(document))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pipelines.report import report

    command.say(report(_existing(arguments.out)))
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    from pipelines.fetch import fetch

    raw = storage.absolute(arguments.to)
    command.say(fetch(arguments.name, raw, arguments.size, arguments.mirror))
    command.say(f"next: python -m pipelines build --raw {shlex.quote(arguments.to)}")
    return 0


def _demo_raw(arguments: argparse.Namespace) -> int:
    from pipelines.demo_raw import Drawing, draw

    drawing = Drawing(arguments.classes, arguments.per_class, arguments.val_per_class)
    command.say(draw(storage.absolute(arguments.dir), drawing, arguments.seed))
    command.say(f"next: python -m pipelines build --raw {shlex.quote(arguments.dir)}")
    return 0


def _say(arguments: argparse.Namespace, line: str) -> None:
    if not arguments.json:
        command.say(line)


def _in_words(source: Source, plan: Plan, out: str) -> str:
    images = " + ".join(
        f"{source.count(split):,} {split}" for split in plan.identity["recipe"]["splits"]
    )
    notes = "".join(f"\nnote: {note}" for note in source.notes)
    most = psutil.virtual_memory().total // _BYTES_PER_IMAGE
    if plan.images * 4 > most:
        notes += f"\nnote: memory here is enough for the plans of {most:,} images at most"
    partial = " (partial)" if plan.identity["recipe"]["partial"] else ""
    return (
        f"{source.raw}: {source.layout}{partial}, {images} images, {len(source.wnids)} classes"
        f"{notes}\n{out}: {len(plan.shards)} shards, plan {plan.plan_id[:12]}"
    )


def _plan_document(source: Source, plan: Plan, out: str) -> dict[str, Any]:
    from pipelines import reads

    assert plan.table is not None, "just made"
    splits: dict[str, dict[str, Any]] = {}
    start = 0
    for shard in plan.shards:
        requests, num_bytes = reads.cost(plan.table.slice(start, shard.samples))
        start += shard.samples
        entry = splits.setdefault(shard.split, {"shards": 0, "reads": 0, "read_bytes": 0, "n": []})
        entry["shards"] += 1
        entry["reads"] += requests
        entry["read_bytes"] += num_bytes
        entry["n"].append(shard.samples)
    for split, entry in splits.items():
        sizes = entry.pop("n")
        entry["pictures"] = sum(sizes)
        entry["mean_read_bytes"] = entry["read_bytes"] / entry["reads"]
        entry["samples_per_shard"] = [min(sizes), max(sizes)]
        entry["labels_from"] = source.labels_from[split]
        entry["announced"] = (source.announced or {}).get(split)
    return {
        "raw": source.raw,
        "out": out,
        "layout": source.layout,
        "official": source.official,
        "classes": len(source.wnids),
        "notes": list(source.notes),
        "entries": plan.entries,
        "splits": splits,
        "bytes": int(plan.images * plan.recipe.bytes_per_sample),
        "plan_id": plan.plan_id,
        "identity": plan.identity,
    }


def _built(manifest: Manifest, out: str) -> str:
    totals = manifest.document["totals"]
    samples = " + ".join(f"{total['samples']:,} {split}" for split, total in totals.items())
    num_bytes = sum(total["bytes"] for total in totals.values())
    shards = f"{len(manifest.shards)} shards, {num_bytes / 1e6:,.1f} MB"
    lines = [f"built {out}: {samples} samples in {shards}"]
    for what in ("fixes", "rejected"):
        if counts := [f"{count} {name}" for name, count in manifest.document[what].items()]:
            lines.append(f"{what}: {', '.join(counts)}")
    return "\n".join(lines)


def _next_command(arguments: argparse.Namespace, plan: Plan, out: str) -> str:
    """What trains on the set in `out`, as it works from here: on the Ray there is, or without."""
    from pipelines import cluster  # loads Ray

    if not {"train", "val"} <= {shard.split for shard in plan.shards}:
        return "next: a run needs train and val; build with --splits train,val and another --out"
    checkout = Path(__file__).resolve().parents[1]
    here = Path.cwd() == checkout
    script = "training/run.py" if here else f"{checkout}/training/run.py"
    words = ["python", script, "--data", out]
    if arguments.address or cluster.is_known():
        address = ["--address", arguments.address] if arguments.address else []
        submit = ["ray", "job", "submit", *address, "--working-dir", "." if here else str(checkout)]
        words = [*submit, "--", "python", "training/run.py", "--data", out]
    return f"next: {shlex.join(words)}"


def _planned(arguments: argparse.Namespace) -> tuple[Source, Plan, str]:
    """Reads RAW; the last is OUT. Raises UserError for impossible flags, and for all that
    `sources.scan` does."""
    from pipelines import plan_files, sources
    from pipelines.sources import official

    given = {field.name: getattr(arguments, field.name) for field in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    given["splits"] = tuple(dict.fromkeys(arguments.splits.split(",")))
    given["subset"] = sources.parse_subset(arguments.subset) if arguments.subset else ()
    recipe = Recipe(**given)
    raw = storage.absolute(arguments.raw)
    source = sources.scan(raw, recipe.raw_splits, recipe.partial)
    if arguments.verify_md5:
        for line in official.verify_md5(raw, dict(storage.list_files(raw))):
            print(line, file=sys.stderr, flush=True)
    source = chosen(source, recipe)
    out = None if arguments.out is None else storage.absolute(arguments.out)
    suits: dict[str, Any] = {"shuffle": source.shuffle}  # this source, unless the user knows better
    if out is not None and source.layout in _READ_AS_THEY_ARE:
        suits["shuffle"] = plan_files.order_in(out) or source.shuffle
    if source.stored:
        suits |= {name: getattr(source.stored, name) for name in ("resize", "crop", "quality")}
    plan = make(source, replace(recipe, **suits | given))
    usual = storage.absolute(str(storage.home() / "shards" / plan.plan_id[:12]))
    return source, plan, out or usual


def _existing(out: str | None, *, begun: bool = False) -> str:
    """`out`, or the newest set under $ALEXNET_HOME; `begun`: finished or not. Raises UserError if
    there is none."""
    if out is not None:
        return storage.absolute(out)
    found = storage.newest_shards("_meta/plan.json" if begun else "manifest.json")
    if found is None:
        raise UserError(
            f"no shard set under {storage.home() / 'shards'}; name the OUT that was given to build "
            "--out, or build one with `python -m pipelines build --raw RAW`"
        )
    return found


def _only_of(text: str, plan: Plan) -> set[int]:
    """Shard numbers from "12,40-44", counted over all splits as `plan` prints them, or from names
    such as "val-000003". Raises UserError for what the plan does not have."""
    names = {shard.name: number for number, shard in enumerate(plan.shards)}
    numbers: set[int] = set()
    for item in text.split(","):
        first, _, last = item.partition("-")
        if item in names:
            numbers.add(names[item])
        elif first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first):
            numbers |= set(range(int(first), int(last or first) + 1))
        else:
            raise UserError(f"--only {text}: {item!r} is no shard; write 12,40-44 or val-000003")
    if beyond := sorted(numbers - set(names.values())):
        raise UserError(f"--only {text}: there is no shard {beyond[0]}, only 0 to {len(names) - 1}")
    return numbers
