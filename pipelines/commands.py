"""What each command does with its parsed flags. The flags themselves are in cli.py."""

from __future__ import annotations

import argparse
import functools
import json
import shlex
from pathlib import Path
from typing import Any

from alexnet.errors import UserError
from pipelines import command, flags, storage
from pipelines.plan import Plan
from pipelines.progress import MaxRejected
from pipelines.shards import Manifest
from pipelines.sources import Source


def build(arguments: argparse.Namespace) -> int:
    from pipelines import plan_files, repair

    MaxRejected.parse(arguments.max_rejected)  # before the long reading of RAW
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers} must be at least 1")
    source, plan = flags.planned(arguments)
    out = flags.out_of(arguments, plan)
    only = flags.only_of(arguments.only, plan) if arguments.only else None
    limit = MaxRejected.parse(arguments.max_rejected, plan.official)
    if arguments.retry_quarantined:
        again = repair.retry_quarantined(out, source.raw, plan)
        _say(arguments, f"made again: {', '.join(again) or 'nothing, no picture is quarantined'}")
    plan = plan_files.begin(out, source.raw, plan)
    if storage.exists(storage.join(out, "manifest.json")):
        _say(arguments, f"{out} is finished already (plan {plan.plan_id[:12]}); nothing to do")
        _say(arguments, _next_command(arguments, plan, out))
        return 0
    _say(arguments, _in_words(source, plan, out))

    import pipelines.build  # loads Ray: not before every check that needs none

    manifest = pipelines.build.build(
        plan,
        source.raw,
        out,
        max_rejected=limit,
        only=only,
        workers=arguments.workers,
        address=arguments.address,
        shared_fs=arguments.shared_fs,
        as_json=arguments.json,
    )
    if manifest is None:
        _say(arguments, f"{out}: the shards of --only are there; build without it to finish")
    elif arguments.json:
        command.say(json.dumps({"event": "built", "out": out, **_summary(manifest)}))
    else:
        command.say(f"{_built(manifest, out)}\n{_next_command(arguments, plan, out)}")
    return 0


def plan(arguments: argparse.Namespace) -> int:
    source, plan = flags.planned(arguments)
    out = flags.out_of(arguments, plan)
    _refuse_unusable(out, plan)
    document = _plan_document(source, plan, out)
    if arguments.json:
        print(json.dumps(document, indent=1))
        return 0
    print(_in_words(source, plan, out))
    first = 0
    for split, entry in document["splits"].items():
        last = first + entry["shards"] - 1
        sizes = "-".join(f"{size:,}" for size in dict.fromkeys(entry["samples_per_shard"]))
        print(f"{split}: {entry['pictures']:,} pictures in shards {first} to {last} of {sizes}")
        size = f" of {entry['mean_read_bytes'] / 1e6:.2f} MB" if entry["read_bytes"] else ""
        print(f"{split}: {entry['reads']:,} reads{size}")
        print(f"{split} labels: {entry['labels_from']}")
        if entry["announced"] is not None:
            print(f"{split}: {entry['announced']:,} are announced")
        first = last + 1
    print(f"about {document['bytes'] / 1e6:,.1f} MB of shards; plan_id {plan.plan_id}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from pipelines import repair
    from pipelines.verify import verify

    out = storage.absolute(arguments.out)
    raw = storage.absolute(arguments.raw) if arguments.raw else None
    say = functools.partial(_say, arguments)
    mend = functools.partial(
        repair.repair, out, raw=raw, shared_fs=arguments.shared_fs, as_json=arguments.json
    )
    repaired = None
    if arguments.repair and (undone := repair.left_undone(out)) is not None:
        say(f"{out}: a repair or a build was stopped at its end; going on with it")
        repaired = mend(undone)
    looked_up = raw if arguments.full or not arguments.repair else None
    found = verify(out, full=arguments.full, raw=looked_up, say=say)
    if found.problems and arguments.repair:
        for problem in found.problems:
            say(f"{problem.file}: {problem.text}")
        repaired = mend(found.bad_files)
        found = verify(out, full=arguments.full, say=say)
    if arguments.json:
        document = {
            "out": out,
            "problems": [vars(problem) for problem in found.problems],
            "notes": list(found.notes),
            "checked": found.checked,
            "repaired": repaired is not None,
        }
        print(json.dumps(document))  # in one line, as those of a repair's progress
    else:
        lines = [f"{problem.file}: {problem.text}" for problem in found.problems]
        lines += [f"note: {note}" for note in found.notes]
        count = len(found.problems) or "no"
        print(*lines, f"{out}: {found.checked}; {count} problems", sep="\n")
    return 1 if found.problems else 0


def inspect(arguments: argparse.Namespace) -> int:
    from pipelines.inspect import inspect, text

    document = inspect(flags.existing(arguments.out), arguments.what)
    print(json.dumps(document, indent=1) if arguments.json else text(document))
    return 0


def status(arguments: argparse.Namespace) -> int:
    from pipelines.status import status, text

    document = status(flags.existing(arguments.out, begun=True))
    print(json.dumps(document, indent=1) if arguments.json else text(document))
    return 0


def report(arguments: argparse.Namespace) -> int:
    from pipelines.report import report

    command.say(report(flags.existing(arguments.out)))
    return 0


def fetch(arguments: argparse.Namespace) -> int:
    from pipelines.fetch import fetch

    raw = storage.absolute(arguments.to)
    command.say(fetch(arguments.name, raw, arguments.size, arguments.mirror))
    command.say(f"next: python -m pipelines build --raw {shlex.quote(arguments.to)}")
    return 0


def demo_raw(arguments: argparse.Namespace) -> int:
    from pipelines.demo_raw import Drawing, draw

    drawing = Drawing(arguments.classes, arguments.per_class, arguments.val_per_class)
    command.say(draw(storage.absolute(arguments.dir), drawing, arguments.seed))
    command.say(f"next: python -m pipelines build --raw {shlex.quote(arguments.dir)}")
    return 0


def _say(arguments: argparse.Namespace, line: str) -> None:
    if not arguments.json:
        command.say(line)


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


def _refuse_unusable(out: str, plan: Plan) -> None:
    """A store that does not answer or refuses, and a disk that is too small, are told now."""
    from pipelines import plan_files

    there = {name for name, _ in storage.list_files(out)}
    missing = [n for n, shard in enumerate(plan.shards) if f"{shard.name}.tar" not in there]
    plan_files.refuse_full(out, plan, missing)


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
        "bytes": int(plan.pictures * plan.recipe.bytes_per_sample),
        "plan_id": plan.plan_id,
        "identity": plan.identity,
    }


def _summary(manifest: Manifest) -> dict[str, Any]:
    document = manifest.document
    names = ("plan_id", "totals", "fixes", "rejected", "entries", "lost_classes")
    shards = {"shards": len(manifest.shards), "data_set": manifest.digest}
    return {name: document[name] for name in names if name in document} | shards


def _built(manifest: Manifest, out: str) -> str:
    totals = manifest.document["totals"]
    samples = " + ".join(f"{total['samples']:,} {split}" for split, total in totals.items())
    num_bytes = sum(total["bytes"] for total in totals.values())
    lines = [
        f"built {out}: {samples} samples in {len(manifest.shards)} shards, "
        f"{num_bytes / 1e6:,.1f} MB"
    ]
    for what in ("fixes", "rejected"):
        if counts := manifest.document[what]:
            lines.append(
                f"{what}: {', '.join(f'{count} {name}' for name, count in counts.items())}"
            )
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
