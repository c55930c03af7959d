"""The Ray Data graph: one task makes one shard. Rows carry a shard's number, never a picture."""

from __future__ import annotations

import functools
import logging
import sys
import traceback
from collections.abc import Collection, Generator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import ray
import ray.data

from alexnet.errors import UserError
from pipelines import cluster, command, finish, metrics, plan, plan_files, shards
from pipelines.plan import Plan
from pipelines.progress import BuildFailed, MaxRejected, Progress
from pipelines.sources import StoredAs
from pipelines.write_shard import Job, Made, codec_versions, write_shard

_MIB = 1 << 20


def build(
    made_plan: Plan,
    raw: str,
    out: str,
    *,
    max_rejected: MaxRejected,
    only: Collection[int] | None = None,
    workers: int | None = None,
    address: str | None = None,
    shared_fs: bool = False,
    as_json: bool = False,
    repairs: bool = False,
) -> shards.Manifest | None:
    """Make what is missing of the plan in `out`, claimed for it, then the index and the manifest.

    only: numbers of the shards to make; without the others there is no manifest yet: None.
    workers: most shards under way at once; None for as many as the cluster has CPUs.
    address: of the Ray cluster, as `cluster.connect` takes it.
    repairs: the set was finished before, so that a class of which nothing can be read is no news.
    Raises UserError before any long work for what the user can mend, BuildFailed afterwards.
    """
    done, missing = finish.finished_shards(out, made_plan)
    progress = Progress(len(made_plan.shards), made_plan.pictures, out, max_rejected, as_json)
    for _, status in done:
        row = _row(status["shard"], status["samples"], status["rejected"])
        progress.count(row | {"stored_bytes": status["bytes"]}, before=True)
    numbers = [number for number in missing if only is None or number in only]
    if numbers:
        if done and not as_json:
            command.say(f"{len(done)} of {len(made_plan.shards)} shards are already there")
        plan_files.refuse_full(out, made_plan, numbers)
        _remove_faulty(out, made_plan, {number: missing[number] for number in numbers})
        with cluster.connected(address):
            cluster.refuse_local_paths([raw, out], shared_fs=shared_fs)
            statuses = _statuses(job_for(made_plan, raw, out), made_plan, numbers, workers)
            with progress.running(), closing(statuses):
                for status in statuses:
                    metrics.count(out, status)
                    progress.count(status)
        done, missing = finish.finished_shards(out, made_plan)
    if missing and only is not None and not set(missing) & set(only):
        return None
    if missing:
        names = ", ".join(made_plan.shards[number].name for number in missing)
        raise BuildFailed(f"{names} vanished meanwhile; the same command continues this build")
    if not repairs and not made_plan.recipe.partial:
        _refuse_lost_classes(finish.lost_classes(out, done))
    return finish.finish(out, made_plan, done)


def _refuse_lost_classes(lost: dict[str, int]) -> None:
    if lost:
        shown = ", ".join(f"{name} ({images:,} images)" for name, images in [*lost.items()][:5])
        raise BuildFailed(
            f"of {len(lost):,} class{'es' * (len(lost) > 1)} no image can be read: {shown}"
            f"{', …' * (len(lost) > 5)}; mend the images and pass --retry-quarantined, or build "
            "with --partial into another --out"
        )


def _remove_faulty(out: str, made_plan: Plan, reasons: dict[int, str]) -> None:
    for reason in sorted(set(reasons.values()) - {finish.NOT_MADE}):
        names = [made_plan.shards[n].name for n, why in reasons.items() if why == reason]
        print(f"{', '.join(names)}: made again, because {reason}", file=sys.stderr, flush=True)
        for name in names:
            finish.remove(out, name)


def job_for(made_plan: Plan, raw: str, out: str) -> Job:
    recipe, stored = made_plan.recipe, made_plan.identity["source"]["stored"]
    side, keep = plan.geometry(recipe, StoredAs(**stored) if stored else None)
    return Job(
        raw=raw,
        out=out,
        plan_id=made_plan.plan_id,
        resize=side,
        crop=recipe.crop,
        quality=recipe.quality,
        exif_orientation=recipe.exif_orientation,
        keep=keep,
        versions=codec_versions(),
        archives=made_plan.archives,
    )


def _statuses(
    job: Job, made_plan: Plan, numbers: list[int], workers: int | None
) -> Generator[dict[str, Any]]:
    """What became of each shard, in order of completion."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # they count shards; ours count pictures
    context.print_on_execution_start = False
    # Ray reserves twice this much per task for its output, a row of a few hundred bytes here.
    context.target_max_block_size = _MIB
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "bars disabled"
    rows = [
        {"number": number, "name": shard.name, "shard_id": shard.id}
        for number in numbers
        for shard in (made_plan.shards[number],)
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        functools.partial(_task, job),
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=workers),
    )
    with closing(iter(dataset.iter_rows())) as statuses:
        for status in statuses:
            if status["error"]:
                if status["traceback"]:
                    print(status["traceback"], file=sys.stderr)
                raise BuildFailed(
                    f"shard {status['shard']}: {status['error']}; the same command continues this "
                    "build"
                )
            yield status


def _task(job: Job, row: dict[str, Any]) -> dict[str, Any]:
    """Few numbers go back; the rest is in the sidecar. A failure goes back as a row as well:
    raised here, it would reach the user as a page of Ray's own traceback."""

    try:
        made = write_shard(job, row["number"], row["name"], row["shard_id"])
    except UserError as error:
        return _row(row["name"], error=str(error))
    except MemoryError as error:
        return _row(row["name"], error=f"out of memory ({error}); try fewer --workers")
    except Exception as error:  # printed and raised by the driver, as BuildFailed
        return _row(row["name"], error=repr(error), traceback=traceback.format_exc())
    return _row(row["name"]) | _numbers(made)


def _numbers(made: Made) -> dict[str, Any]:
    return asdict(made) | {"rejected": _keys(made.rejected)}


def _row(
    shard: str,
    samples: int = 0,
    rejected: list[dict[str, Any]] | None = None,
    error: str = "",
    traceback: str = "",
) -> dict[str, Any]:
    return {
        "shard": shard,
        "samples": samples,
        "rejected": _keys(rejected or []),
        "read_bytes": 0,
        "stored_bytes": 0,
        "wait_seconds": 0.0,
        "work_seconds": 0.0,
        "error": error,
        "traceback": traceback,
    }


def _keys(rejected: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"key": entry["key"], "reason": entry["reason"]} for entry in rejected]
