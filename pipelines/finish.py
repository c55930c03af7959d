"""From a complete set of sidecars to a finished shard set: index, quarantine list, manifest."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import pyarrow as pa

from pipelines import shards, storage
from pipelines.plan import Plan, ShardPlan
from pipelines.produce import codec_versions, quarantine_uri
from pipelines.sources import Source

Done = tuple[ShardPlan, pa.Table, dict[str, Any]]  # what its sidecar says


def finished_shards(out: str, plan: Plan) -> tuple[list[Done], list[int]]:
    """Shards whose sidecar and tar are there and agree, and the numbers of all others.

    A sidecar or tar that was damaged from outside is removed, to be built again. So is what
    another version of the codecs made: half a set each would be no reproducible set.
    """
    sizes = dict(storage.list_files(out))
    done, missing = [], []
    for number, shard in enumerate(plan.shards):
        uri = shards.sidecar_uri(out, shard.name)
        if f"_meta/{shard.name}.parquet" not in sizes:
            missing.append(number)
            continue
        try:
            index, status = shards.unpack_sidecar(storage.read(uri))
        except (ValueError, pa.ArrowException):
            index, status = None, {}
        if (
            status.get("plan_id") == plan.plan_id
            and status["bytes"] == sizes.get(f"{shard.name}.tar")
            and status["versions"] == codec_versions()
        ):
            done.append((shard, index, status))
            continue
        storage.delete(uri)
        storage.delete(storage.join(out, f"{shard.name}.tar"))
        missing.append(number)
    return done, missing


def finish(out: str, source: Source, plan: Plan, done: list[Done]) -> shards.Manifest:
    """Write everything that is derived from the shards, the manifest last."""
    assert [shard for shard, _, _ in done] == list(plan.shards), "a shard is missing"
    for shard, index, status in done:
        assert index.num_rows + len(status["rejected"]) == shard.samples, f"{shard.name} lost some"
    hashes = {f"{shard.name}.tar": status["sha256"] for shard, _, status in done}
    for split in plan.identity["recipe"]["splits"]:
        hashes |= _write_split(out, split, [entry for entry in done if entry[0].split == split])
    document = _manifest(source, plan, done)
    manifest = shards.canonical_json(document, indent=1)
    digest = hashes["manifest.json"] = hashlib.sha256(manifest).hexdigest()
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    storage.write(storage.join(out, "SHA256SUMS"), lines.encode())
    storage.write_new(storage.join(out, "manifest.json"), manifest)
    return shards.parse_manifest(document, digest)


def _write_split(out: str, split: str, done: list[Done]) -> dict[str, str]:
    """Index, wids index and quarantine list of one split; returns name → sha256."""
    index = pa.concat_tables([index for _, index, _ in done]).combine_chunks()
    rejected = [entry for _, _, status in done for entry in status["rejected"]]
    rejected.sort(key=lambda entry: str(entry["key"]))
    wids = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": split,
        "shardlist": [
            {
                "url": f"{shard.name}.tar",
                "md5sum": status["md5"],
                "nsamples": status["samples"],
                "filesize": status["bytes"],
            }
            for shard, _, status in done
        ],
    }
    files = {
        f"index/{split}.parquet": shards.parquet_bytes(index),
        f"shardindex-{split}.json": shards.canonical_json(wids, indent=1),
        f"quarantine/{split}.jsonl": b"".join(map(shards.canonical_json, rejected)),
    }
    for name, data in files.items():
        storage.write(storage.join(out, name), data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    for entry in rejected:
        hashes[quarantine_uri("", split, entry["key"]).lstrip("/")] = entry["source_sha256"]
    return hashes


def _manifest(source: Source, plan: Plan, done: list[Done]) -> dict[str, Any]:
    """No clock and no absolute path: equal input gives an equal manifest."""
    recipe = plan.identity["recipe"]
    statuses = [status for _, _, status in done]
    stats_split = recipe["splits"][0]  # train where there is one: the network must not see val
    fixes: Counter[str] = Counter()
    for status in statuses:
        fixes.update(status["fixes"])
    return {
        "format": shards.FORMAT,
        "format_version": shards.FORMAT_VERSION,
        "plan_id": plan.plan_id,
        "geometry": {"resize": recipe["resize"], "crop": recipe["crop"]},
        "codec": {"name": plan.identity["codec"], "quality": recipe["quality"]},
        "versions": codec_versions(),
        "seed": recipe["seed"],
        "samples_per_shard": recipe["samples_per_shard"],
        "ordering": plan.identity["ordering"],
        "source": plan.identity["source"],
        "labels_from": source.labels_from,
        "partial": recipe["partial"],
        "announced": source.announced,
        "classes": {"wnids": list(source.wnids), "names": list(source.class_names)},
        "pixels": {"split": stats_split} | _pixel_stats(statuses, stats_split),
        "shards": [
            {
                "name": status["shard"],
                "split": status["split"],
                "samples": status["samples"],
                "bytes": status["bytes"],
                "sha256": status["sha256"],
            }
            for status in statuses
        ],
        "totals": {split: _totals(statuses, split) for split in recipe["splits"]},
        "rejected": dict(
            Counter(entry["reason"] for status in statuses for entry in status["rejected"])
        ),
        "fixes": dict(fixes),
    }


def _pixel_stats(statuses: list[dict[str, Any]], split: str) -> dict[str, Any]:
    parts = [status["pixels"] for status in statuses if status["split"] == split]
    stats = shards.PixelStats.from_sums(
        count=sum(part["count"] for part in parts),
        sums=[sum(part["sums"][i] for part in parts) for i in range(3)],
        products=[
            [sum(part["products"][i][j] for part in parts) for j in range(3)] for i in range(3)
        ],
    )
    return {
        "count": stats.count,
        "mean": list(stats.mean),
        "covariance": [list(row) for row in stats.covariance],
    }


def _totals(statuses: list[dict[str, Any]], split: str) -> dict[str, int]:
    parts = [status for status in statuses if status["split"] == split]
    samples = sum(part["samples"] for part in parts)
    rejected = sum(len(part["rejected"]) for part in parts)
    return {
        "pictures": samples + rejected,
        "samples": samples,
        "rejected": rejected,
        "bytes": sum(part["bytes"] for part in parts),
    }
