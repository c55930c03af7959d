"""A shard set built, or repaired: a Ray Data graph in which one task makes one shard. Rows carry a
shard's number, never an image.

Ray is loaded where work starts, and not before every check that needs none.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import traceback
from collections.abc import Collection, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from alexnet.errors import UserError
from pipelines import command, finish, plan, plan_files, shards, sidecars, storage
from pipelines.plan import Plan
from pipelines.progress import BuildFailed, MaxRejected, Progress, export
from pipelines.sources import StoredAs
from pipelines.write_shard import Job, Made, codec_versions, write_shard


@dataclass(frozen=True)
class OnRay:
    """Where and with how many tasks at once."""

    workers: int | None = None  # None for as many as the cluster has CPUs
    address: str | None = None  # this and ray_logs as `cluster.connect` takes them
    shared_fs: bool = False  # every node mounts the local paths
    ray_logs: bool = False

    @contextmanager
    def joined(self, *paths: str) -> Iterator[None]:
        """The cluster, whose tasks can reach the paths. Raises UserError where they cannot."""
        from pipelines import cluster

        with cluster.connected(self.address, ray_logs=self.ray_logs):
            cluster.refuse_local_paths([*paths], shared_fs=self.shared_fs)
            yield


def build(
    made_plan: Plan,
    raw: str,
    out: str,
    *,
    max_rejected: MaxRejected,
    only: Collection[int] | None = None,
    on: OnRay = OnRay(),
    as_json: bool = False,
    repairs: bool = False,
) -> shards.Manifest | None:
    """Make what is missing of the plan in `out`, claimed for it, then the index and the manifest.

    only: numbers of the shards to make; without the others there is no manifest yet: None.
    repairs: the set was finished before, so that a class of which nothing can be read is no news.
    Raises UserError before any long work for what the user can mend, BuildFailed afterwards.
    """
    done, missing = finish.finished_shards(out, made_plan)
    progress = Progress(len(made_plan.shards), made_plan.images, max_rejected, as_json)
    for _, status in done:
        progress.count(status, before=True)
    numbers = [number for number in missing if only is None or number in only]
    if numbers:
        if done and not as_json:
            command.say(f"{len(done)} of {len(made_plan.shards)} shards are already there")
        plan_files.refuse_full(out, made_plan, numbers)
        _remove_faulty(out, made_plan, {number: missing[number] for number in numbers})
        with on.joined(raw, out):
            statuses = _statuses(job_for(made_plan, raw, out), made_plan, numbers, on.workers)
            with progress.running(), closing(statuses):
                for status in statuses:
                    export(out, status)
                    progress.count(status)
        done, missing = finish.finished_shards(out, made_plan)
    if missing and only is not None and not set(missing) & set(only):
        return None
    if missing:
        names = ", ".join(made_plan.shards[number].name for number in missing)
        raise BuildFailed(f"{names} vanished meanwhile; the same command continues this build")
    if not repairs and not made_plan.recipe.partial:
        _refuse_lost_classes(finish.lost_classes(out, done))
    try:
        return finish.finish(out, made_plan, done)
    except finish.Faulty as faulty:
        number = next(n for n, each in enumerate(made_plan.shards) if each.name == faulty.shard)
        _remove_faulty(out, made_plan, {number: finish.DAMAGED})
        return build(
            made_plan, raw, out, max_rejected=max_rejected, on=on, as_json=as_json, repairs=repairs
        )


def repair(
    out: str,
    bad_files: Collection[str],
    raw: str | None,
    *,
    on: OnRay = OnRay(),
    as_json: bool = False,
) -> shards.Manifest:
    """Rebuild the shards of `bad_files` (names in `out`) from `raw`, and all that is derived.

    raw: None for where the set was built from.
    Raises UserError when that is not known or other codecs are installed; BuildFailed when what
    was rebuilt is not what the set had been.
    """
    made_plan = plan_files.load(out)
    plan_files.load_rows(out, ("split", "key", "wnid"))  # raises where they are damaged
    raw = raw or plan_files.raw_of(out)
    if raw is None:
        raise UserError(f"{out}: where it was built from is not known; pass --raw RAW")
    expected = _digests(out)
    done, missing = finish.finished_shards(out, made_plan)
    if other := [why for why in missing.values() if why.startswith(finish.OTHER_CODECS)]:
        raise UserError(
            f"{out}: {other[0]}, here are {codec_versions()}; install those versions, or build a "
            "new set"
        )
    names, bins = _to_rebuild(bad_files, made_plan, done)
    # Whoever is killed below leaves a set that tells of every damaged shard: by its missing
    # sidecar, in a set that is complete or in one that is not.
    for name in names:
        storage.delete(sidecars.place(out, name))
    for name in bins:
        storage.delete(storage.join(out, name))
    storage.delete(storage.join(out, "manifest.json"))  # from here on the set is not complete
    for name in names:
        finish.remove(out, name)
    no_limit = MaxRejected(number=made_plan.images)
    manifest = build(
        made_plan,
        raw,
        out,
        max_rejected=no_limit,
        on=on,
        as_json=as_json,
        repairs=True,
    )
    assert manifest is not None, "a build of all shards ends with a manifest"
    if expected and manifest.digest not in expected:
        raise BuildFailed(
            f"{out} is whole again, but not the data set that it was ({manifest.digest[:12]} "
            f"instead of {' or '.join(sorted(digest[:12] for digest in expected))}): has {raw} "
            "changed? Compare its SHA256SUMS with those of a copy"
        )
    return manifest


def _to_rebuild(
    bad_files: Collection[str], made_plan: Plan, done: list[finish.Done]
) -> tuple[list[str], list[str]]:
    """The shards that `bad_files` belong to, and those of the files that are quarantined images."""
    bins = [name for name in bad_files if name.startswith("quarantine/") and name.endswith(".bin")]
    bad = {name.removeprefix("_meta/").rsplit(".", 1)[0] for name in bad_files}
    for shard, status in done:
        kept = {shards.rejected_name(shard.split, entry["key"]) for entry in status["rejected"]}
        if kept & set(bins):
            bad.add(shard.name)
    return [shard.name for shard in made_plan.shards if shard.name in bad], bins


def left_undone(out: str) -> list[str] | None:
    """Files to be rebuilt where a repair was stopped: of the shards without a sidecar. None where
    none was: SHA256SUMS without a manifest is what every repair begins and ends with."""
    files = {name for name, _ in storage.list_files(out)}
    if "manifest.json" in files or not {"SHA256SUMS", "_meta/plan.json"} <= files:
        return None
    names = [shard.name for shard in plan_files.load(out).shards]
    return [f"{name}.tar" for name in names if f"_meta/{name}.parquet" not in files]


def retry_quarantined(out: str, raw: str, made_plan: Plan) -> list[str]:
    """Take the shards with rejected images out of `out`, to be built by `made_plan` of the repaired
    RAW. Returns their names. Raises UserError when more has changed in RAW than those images."""
    before = plan_files.load(out)
    done, missing = finish.finished_shards(out, before)
    rejected = [(shard, status) for shard, status in done if status["rejected"]]
    again = [before.shards[number].name for number in missing]
    again += [shard.name for shard, _ in rejected]
    plan_files.check_replaceable(out, made_plan, set(again))
    storage.delete(storage.join(out, "manifest.json"))
    for shard, status in rejected:
        finish.remove(out, shard.name)
        for entry in status["rejected"]:
            name = shards.rejected_name(shard.split, entry["key"])
            storage.delete(storage.join(out, name))
    plan_files.replace(out, raw, made_plan)
    return sorted(again)


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


def _refuse_lost_classes(lost: dict[str, int]) -> None:
    if lost:
        shown = ", ".join(f"{name} ({images:,} images)" for name, images in [*lost.items()][:5])
        raise BuildFailed(
            f"of {len(lost):,} class{'es' * (len(lost) > 1)} no image can be read: {shown}"
            f"{', …' * (len(lost) > 5)}; repair the images and pass --retry-quarantined, or build "
            "with --partial into another --out"
        )


def _remove_faulty(out: str, made_plan: Plan, reasons: dict[int, str]) -> None:
    for reason in sorted(set(reasons.values()) - {finish.NOT_MADE}):
        names = [made_plan.shards[n].name for n, why in reasons.items() if why == reason]
        print(f"{', '.join(names)}: rebuilt, because {reason}", file=sys.stderr, flush=True)
        for name in names:
            finish.remove(out, name)


def _digests(out: str) -> set[str]:
    """The data set's identity by its manifest and by SHA256SUMS; one of them may be damaged."""
    found = set()
    manifest, sums = (storage.join(out, name) for name in ("manifest.json", "SHA256SUMS"))
    if storage.exists(manifest):
        found.add(hashlib.sha256(storage.read(manifest)).hexdigest())
    if storage.exists(sums):
        for line in storage.read(sums).decode("utf-8", "replace").splitlines():
            if line.endswith("  manifest.json"):
                found.add(line.split()[0])
    return found


def _statuses(
    job: Job, made_plan: Plan, numbers: list[int], workers: int | None
) -> Generator[dict[str, Any]]:
    """What became of each shard, in order of completion."""
    from pipelines import cluster

    rows = [
        {"number": number, "name": shard.name, "shard_id": shard.id}
        for number in numbers
        for shard in (made_plan.shards[number],)
    ]
    with closing(cluster.each(rows, functools.partial(_task, job), workers)) as statuses:
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

    made, error, trace = Made(0, [], 0, 0, 0.0, 0.0), "", ""
    try:
        made = write_shard(job, row["number"], row["name"], row["shard_id"])
    except UserError as refused:
        error = str(refused)
    except MemoryError as full:
        error = f"out of memory ({full}); try fewer --workers"
    except Exception as failure:  # printed and raised by the driver, as BuildFailed
        error, trace = repr(failure), traceback.format_exc()
    rejected = [{"key": entry["key"], "reason": entry["reason"]} for entry in made.rejected]
    return {
        **asdict(made),
        "rejected": rejected,
        "shard": row["name"],
        "error": error,
        "traceback": trace,
    }
