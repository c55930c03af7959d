"""The Ray Data graph: one task makes one shard. Rows carry a shard's number, never a picture."""

from __future__ import annotations

import functools
import logging
import sys
import threading
import traceback
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import ray
import ray.data

from alexnet.errors import UserError
from pipelines import cluster, finish, shards
from pipelines.plan import Plan
from pipelines.produce import Job, codec_versions, produce
from pipelines.progress import BuildFailed, MaxRejected, Progress
from pipelines.sources import Source

_SCHEDULER_SECONDS = 10
_MIB = 1 << 20


def build(
    source: Source,
    plan: Plan,
    out: str,
    *,
    max_rejected: MaxRejected,
    workers: int | None = None,
    shared_fs: bool = False,
) -> shards.Manifest:
    """Make what is missing of `plan` in `out`, claimed for it, then the index and the manifest.

    workers: most shards under way at once; None for as many as the cluster has CPUs.
    Raises UserError before any long work for what the user can mend, BuildFailed afterwards.
    """
    done, missing = finish.finished_shards(out, plan)
    progress = Progress(plan, max_rejected)
    for _, _, status in done:
        progress.count(status)
    if missing:
        if done:
            print(f"{len(done)} of {len(plan.shards)} shards are already there", flush=True)
        with _ray():
            cluster.refuse_local_paths([source.raw, out], shared_fs=shared_fs)
            recipe = plan.identity["recipe"]
            job = Job(
                raw=source.raw,
                out=out,
                plan_id=plan.plan_id,
                versions=codec_versions(),
                **{name: recipe[name] for name in ("resize", "crop", "quality")},
            )
            progress.begin()
            statuses = _statuses(job, plan, missing, workers)
            with progress.printed(), closing(statuses):
                for status in statuses:
                    progress.count(status)
        done, missing = finish.finished_shards(out, plan)
        assert not missing, f"shards {missing} vanished while building"
    return finish.finish(out, source, plan, done)


@contextmanager
def _ray() -> Iterator[None]:
    """A connection to Ray, closed afterwards unless it was there before."""
    joined_before = ray.is_initialized()
    try:
        cluster.connect()
        yield
    finally:
        # After Ctrl-C its scheduler still runs for a moment, and Ray's C++ ends the whole process
        # with a code of its own when the cluster goes away under it.
        for thread in threading.enumerate():
            if thread.name.startswith("StreamingExecutor"):
                thread.join(_SCHEDULER_SECONDS)
        if not joined_before:
            ray.shutdown()


def _statuses(
    job: Job, plan: Plan, numbers: list[int], workers: int | None
) -> Generator[dict[str, Any]]:
    """The status of each finished shard, in order of completion."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # they count shards; ours count pictures
    context.print_on_execution_start = False
    # Ray reserves twice this much per task for its output, a row of a few hundred bytes here.
    context.target_max_block_size = _MIB
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "bars disabled"
    rows = [{"number": number, "name": plan.shards[number].name} for number in numbers]
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
        status = produce(job, row["number"], row["name"])
    except UserError as error:
        return _row(row["name"], error=str(error))
    except Exception as error:
        return _row(row["name"], error=repr(error), traceback=traceback.format_exc())
    return _row(
        row["name"],
        samples=status["samples"],
        rejected=[{k: entry[k] for k in ("key", "reason")} for entry in status["rejected"]],
    )


def _row(
    shard: str,
    samples: int = 0,
    rejected: list[dict[str, str]] | None = None,
    error: str = "",
    traceback: str = "",
) -> dict[str, Any]:
    return {
        "shard": shard,
        "samples": samples,
        "rejected": rejected or [],
        "error": error,
        "traceback": traceback,
    }
