"""Shards of a finished set made again: damaged ones, and those with quarantined pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

from alexnet.errors import UserError
from pipelines import finish, plan_files, shards, storage
from pipelines.plan import Plan
from pipelines.progress import BuildFailed, MaxRejected
from pipelines.write_shard import codec_versions, quarantine_uri


def repair(
    out: str,
    bad_files: Collection[str],
    raw: str | None,
    *,
    shared_fs: bool = False,
    as_json: bool = False,
) -> shards.Manifest:
    """Make the shards of `bad_files` (names in `out`) again from `raw`, and all that is derived.

    raw: None for where the set was built from.
    Raises UserError when that is not known or other codecs are installed; BuildFailed when what
    was made is not what the set had been.
    """
    import pipelines.build  # loads Ray: not before every check that needs none

    if lost := sorted({"_meta/plan.json", "_meta/plan.parquet"} & set(bad_files)):
        raise UserError(
            f"{out}/{lost[0]} is damaged; delete it and start the build command of this set "
            "again: it writes the plan anew and keeps every good shard"
        )
    plan = plan_files.load(out)
    raw = raw or plan_files.raw_of(out)
    if raw is None:
        raise UserError(f"{out}: where it was built from is not known; pass --raw RAW")
    expected = _digests(out)
    done, _ = finish.finished_shards(out, plan)
    _check_versions(out, plan)
    names = _shards_of(bad_files, plan, done)
    # Whoever is killed below leaves a set that tells of every damaged shard: by its missing
    # sidecar, in a set that is complete or in one that is not.
    for name in names:
        storage.delete(shards.sidecar_uri(out, name))
    for split, key in _bins(bad_files):
        storage.delete(quarantine_uri(out, split, key))
    storage.delete(storage.join(out, "manifest.json"))  # from here on the set is not complete
    for name in names:
        finish.remove(out, name)
    no_limit = MaxRejected(number=plan.pictures)
    manifest = pipelines.build.build(
        plan, raw, out, max_rejected=no_limit, shared_fs=shared_fs, as_json=as_json, repairs=True
    )
    assert manifest is not None, "a build of all shards ends with a manifest"
    if expected and manifest.digest not in expected:
        raise BuildFailed(
            f"{out} is whole again, but not the data set that it was ({manifest.digest[:12]} "
            f"instead of {' or '.join(sorted(digest[:12] for digest in expected))}): has {raw} "
            f"changed? Compare {out}/SHA256SUMS with that of a copy"
        )
    return manifest


def left_undone(out: str) -> list[str] | None:
    """Files to be made again where a repair was stopped: of the shards without a sidecar. None
    where none was: SHA256SUMS without a manifest is what every repair begins and ends with."""
    files = {name for name, _ in storage.list_files(out)}
    if "manifest.json" in files or not {"SHA256SUMS", "_meta/plan.json"} <= files:
        return None
    names = [shard.name for shard in plan_files.load(out).shards]
    return [f"{name}.tar" for name in names if f"_meta/{name}.parquet" not in files]


def retry_quarantined(out: str, raw: str, plan: Plan) -> list[str]:
    """Take the shards with rejected pictures out of `out`, to be built by `plan` of the mended RAW.

    Returns their names. Raises UserError when more has changed in RAW than those pictures.
    """
    before = plan_files.load(out)
    done, missing = finish.finished_shards(out, before)
    rejected = [(shard, status) for shard, status in done if status["rejected"]]
    again = [before.shards[number].name for number in missing]
    again += [shard.name for shard, _ in rejected]
    plan_files.check_replaceable(out, plan, set(again))
    storage.delete(storage.join(out, "manifest.json"))
    for shard, status in rejected:
        finish.remove(out, shard.name)
        for entry in status["rejected"]:
            storage.delete(quarantine_uri(out, shard.split, entry["key"]))
    plan_files.replace(out, raw, plan)
    return sorted(again)


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


def _check_versions(out: str, plan: Plan) -> None:
    """Other codecs would make other bytes of the same pictures."""
    for shard in plan.shards:
        uri = shards.sidecar_uri(out, shard.name)
        if not storage.exists(uri):
            continue
        try:
            _, status = shards.unpack_sidecar(storage.read(uri))
        except ValueError:
            continue
        if status["versions"] != codec_versions():
            raise UserError(
                f"{out} was made with {status['versions']}, here are {codec_versions()}; install "
                "those versions, or build a new set"
            )
        return


def _shards_of(bad_files: Collection[str], plan: Plan, done: list[Any]) -> list[str]:
    named = {shard.name for shard in plan.shards}
    found = {name.removeprefix("_meta/").rsplit(".", 1)[0] for name in bad_files} & named
    bins = set(_bins(bad_files))
    for shard, status in done:
        if any((shard.split, entry["key"]) in bins for entry in status["rejected"]):
            found.add(shard.name)
    return sorted(found)


def _bins(bad_files: Collection[str]) -> list[tuple[str, str]]:
    """(split, key) of quarantine/SPLIT/KEY.bin."""
    parts = [name.split("/") for name in bad_files if name.endswith(".bin")]
    return [(split, name.removesuffix(".bin")) for _, split, name in parts]
