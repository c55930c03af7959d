"""From a complete set of sidecars to a finished shard set: index, quarantine list, manifest.

What is finished is told by one listing and the ends of the sidecars. Their rows are read one shard
after the other, when the index is written, of which one file at a time is in memory.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alexnet.errors import UserError
from pipelines import plan_files, shards, sidecars, storage
from pipelines.plan import Plan, ShardPlan
from pipelines.write_shard import codec_versions

NOT_MADE = "it was not made yet"
OTHER_CODECS = "other codecs had made it"
DAMAGED = "its sidecar was damaged"
Done = tuple[ShardPlan, dict[str, Any]]  # with the status of its sidecar
_TABLES = 16
_GROUP = 1 << 18  # rows: few enough groups that a column is few reads, small enough for memory


class Faulty(Exception):
    """The sidecar of this shard is damaged where its rows are."""

    def __init__(self, shard: str) -> None:
        super().__init__(f"{shard}: {DAMAGED}")
        self.shard = shard


def finished_shards(out: str, plan: Plan) -> tuple[list[Done], dict[int, str]]:
    """(shards whose sidecar, tar and DALI index are there and agree, number → why not for others),
    but for the rows of sidecars, which `finish` reads.

    What another version of the codecs made does not count: half a set each would be no
    reproducible set.
    """
    sizes = dict(storage.list_files(out))
    present = [shard for shard in plan.shards if f"_meta/{shard.name}.parquet" in sizes]
    codecs = codec_versions()  # asked for once: it parses the packages' metadata
    lengths = {shard.name: sizes[f"_meta/{shard.name}.parquet"] for shard in present}
    statuses = zip(present, sidecars.load_statuses(out, lengths), strict=True)
    found = {shard: _judged(out, sizes, shard, status, codecs) for shard, status in statuses}
    faults = {shard: fault for shard, (_, fault) in found.items()}
    missing = {n: faults.get(shard, NOT_MADE) for n, shard in enumerate(plan.shards)}
    done = [(shard, status) for shard, (status, fault) in found.items() if fault is None]
    return done, {number: fault for number, fault in missing.items() if fault is not None}


def _judged(
    out: str,
    sizes: dict[str, int],
    shard: ShardPlan,
    status: dict[str, Any] | None,
    codecs: dict[str, str],
) -> tuple[dict[str, Any], str | None]:
    """The status, and why the shard has to be rebuilt, if so. sizes: as listed."""
    if status is None:
        return {}, DAMAGED
    if status.get("shard_id") != shard.id:
        return {}, "it held other images"
    if status["versions"] != codecs:
        return {}, f"{OTHER_CODECS} ({status['versions']})"
    tar, index = (f"{shard.name}.{suffix}" for suffix in ("tar", "idx"))
    if sizes.get(tar) == status["bytes"] and index in sizes:
        return status, None
    # Another builder may have published it since the listing passed their names.
    tar, index = storage.join(out, tar), storage.join(out, index)
    if storage.exists(tar) and storage.size(tar) == status["bytes"] and storage.exists(index):
        return status, None
    return {}, "its tar or index was damaged or gone"


def remove(out: str, shard: str) -> None:
    """So that it can be made again. The sidecar first: without it the rest counts for nothing."""
    storage.delete(sidecars.place(out, shard))
    storage.delete(storage.join(out, f"{shard}.idx"))
    storage.delete(storage.join(out, f"{shard}.tar"))


def lost_classes(out: str, done: list[Done]) -> dict[str, int]:
    """The classes of a split of which no image could be read: "SPLIT/CLASS" → its images."""
    rejected: dict[str, list[str]] = {}
    for _, status in done:
        keys = [str(entry["key"]) for entry in status["rejected"]]
        rejected[status["split"]] = rejected.get(status["split"], []) + keys
    return plan_files.lost_classes(out, rejected)


def finish(out: str, plan: Plan, done: list[Done]) -> shards.Manifest:
    """Write everything that is derived from the shards, the manifest last. Raises Faulty."""
    assert [shard for shard, _ in done] == list(plan.shards), "a shard is missing"
    hashes: dict[str, str] = {}
    for shard, status in done:
        assert status["samples"] + len(status["rejected"]) == shard.samples, f"{shard.name} lost"
        hashes[f"{shard.name}.tar"] = status["sha256"]
        hashes[f"{shard.name}.idx"] = status["dali_index_sha256"]
    for split in plan.identity["recipe"]["splits"]:
        statuses = [status for _, status in done if status["split"] == split]
        hashes |= _write_split(out, split, statuses)
    document = _manifest(plan, [status for _, status in done])
    if plan.entries is not None:  # a set from before these is finished as it would have been
        document["entries"] = plan.entries
        if lost := lost_classes(out, done):
            document["lost_classes"] = lost
    for name, data in (("_info.json", _timm_info(document)), ("README.md", _card(document))):
        storage.write(storage.join(out, name), data, below=out)
        if name != "README.md":  # which people edit
            hashes[name] = hashlib.sha256(data).hexdigest()
    manifest = shards.canonical_json(document, indent=1)
    hashes["manifest.json"] = hashlib.sha256(manifest).hexdigest()
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    storage.write(storage.join(out, "SHA256SUMS"), lines.encode(), below=out)
    if not storage.exists(storage.join(out, "_meta", "plan.json")):  # an empty mount point is there
        raise UserError(f"{out} was taken away meanwhile; the same command continues this build")
    storage.write_new(storage.join(out, "manifest.json"), manifest, below=out)
    storage.sweep(out)
    return shards.parse_manifest(out, manifest)


def _write_split(out: str, split: str, statuses: list[dict[str, Any]]) -> dict[str, str]:
    """Index, wids index and quarantine list of one split; returns name → sha256."""
    rejected = [entry for status in statuses for entry in status["rejected"]]
    rejected.sort(key=lambda entry: str(entry["key"]))
    wids = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": split,
        "shardlist": [
            {
                "url": f"{status['shard']}.tar",
                "md5sum": status["md5"],
                "nsamples": status["samples"],
                "filesize": status["bytes"],
            }
            for status in statuses
        ],
    }
    files: Iterable[tuple[str, bytes]] = (
        (f"shardindex-{split}.json", shards.canonical_json(wids, indent=1)),
        (f"quarantine/{split}.jsonl", b"".join(map(shards.canonical_json, rejected))),
    )
    hashes = {}
    for name, data in chain(_index(out, split, statuses), files):
        storage.write(storage.join(out, name), data, below=out)
        hashes[name] = hashlib.sha256(data).hexdigest()
    for entry in rejected:
        hashes[shards.rejected_name(split, entry["key"])] = entry["source_sha256"]
    return hashes


def _index(out: str, split: str, statuses: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of its files: the rows of all sidecars in large groups."""
    total = sum(status["samples"] for status in statuses)
    count = max(-(-total // shards.INDEX_ROWS), 1)
    groups = _groups(_sidecar_rows(out, statuses))
    for number in range(count):
        schema = shards.INDEX if number else shards.in_files(shards.INDEX, count)
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, schema, write_page_checksum=True) as writer:
            for rows in islice(groups, shards.INDEX_ROWS // _GROUP):
                writer.write_table(rows.replace_schema_metadata(schema.metadata))
        yield shards.index_name(split, number), buffer.getvalue()


def _groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, _GROUP at a time."""
    held, count = list[pa.Table](), 0
    while some := [*islice(tables, _TABLES)]:  # together: each takes 40 kB more than its rows
        held.append(pa.concat_tables(some).combine_chunks())
        count += held[-1].num_rows
        while count >= _GROUP:
            whole = pa.concat_tables(held)
            yield whole.slice(0, _GROUP).combine_chunks()
            held, count = [whole.slice(_GROUP)], count - _GROUP
    if count:
        yield pa.concat_tables(held).combine_chunks()


def _sidecar_rows(out: str, statuses: list[dict[str, Any]]) -> Iterator[pa.Table]:
    uris = [sidecars.place(out, status["shard"]) for status in statuses]
    for data, status in zip(storage.read_each(uris), statuses, strict=True):
        try:
            rows, found = sidecars.unpack(data)
        except ValueError as error:
            raise Faulty(status["shard"]) from error
        assert found == status, f"the sidecar of {status['shard']} changed meanwhile"
        yield rows


def _manifest(plan: Plan, statuses: list[dict[str, Any]]) -> dict[str, Any]:
    """No clock and no absolute path: equal input gives an equal manifest."""
    recipe = plan.identity["recipe"]
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
        "versions": codec_versions() | {"pyarrow": version("pyarrow")},  # writes the index
        "recipe": recipe,
        "seed": recipe["seed"],
        "ordering": plan.identity["ordering"],
        "source": plan.identity["source"],
        "labels_from": plan.labels_from,
        "partial": recipe["partial"],
        "official": plan.official,
        "announced": plan.announced,
        "classes": {"wnids": list(plan.wnids), "names": list(plan.class_names)},
        "pixels": {"split": stats_split}
        | pixel_stats([s["pixels"] for s in statuses if s["split"] == stats_split]),
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


def _timm_info(document: dict[str, Any]) -> bytes:
    """As timm's reader of `wds/` takes it (timm/data/readers/reader_wds.py), with the classes."""
    splits: dict[str, dict[str, Any]] = {
        split: {
            "name": split,
            "num_samples": total["samples"],
            "filenames": [],
            "shard_lengths": [],
        }
        for split, total in document["totals"].items()
    }
    for shard in document["shards"]:
        splits[shard["split"]]["filenames"].append(f"{shard['name']}.tar")
        splits[shard["split"]]["shard_lengths"].append(shard["samples"])
    info = {"class_names": document["classes"]["names"], "splits": splits}
    return shards.canonical_json(info, indent=1)


def _card(document: dict[str, Any]) -> bytes:
    """A dataset card, with the head that the Hugging Face Hub reads."""
    totals, classes = document["totals"], len(document["classes"]["wnids"])
    images = sum(total["samples"] for total in totals.values())
    power = min(max(len(str(images)) - 1, 2), 8)  # the Hub's classes begin with n<1K
    sizes = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B"]
    files = "".join(f"  - split: {split}\n    path: {split}-*.tar\n" for split in totals)
    rows = "".join(
        f"| {split} | {total['samples']:,} | "
        f"{sum(shard['split'] == split for shard in document['shards']):,} | "
        f"{total['bytes'] / 1e6:,.1f} MB |\n"
        for split, total in totals.items()
    )
    side, resize = document["geometry"]["crop"], document["geometry"]["resize"]
    return f"""---
license: other
task_categories:
- image-classification
size_categories:
- {sizes[power - 2]}
configs:
- config_name: default
  data_files:
{files}---

# {images:,} images of {classes:,} classes

WebDataset tars of KEY.jpg, KEY.cls and KEY.json. Images are RGB JPEGs of {side}×{side}, the centre
of the original with its shorter side resized to {resize}; a label is the 0-based rank of the WNID,
or the folder's name, among all. The terms of the images' owners hold.

| split | images | shards | bytes |
| --- | --- | --- | --- |
{rows}
`manifest.json` names the classes, the hash of every shard and all that decides their bytes (plan
`{document["plan_id"][:12]}`); `sha256sum -c SHA256SUMS` checks the files.
""".encode()


def pixel_stats(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and population covariance, RGB, units 0..255, from the `count`, `sums` (Σx) and
    `products` (Σxxᵀ) of each shard: integers, exact until the one division per number."""
    rgb = range(3)
    count = sum(part["count"] for part in parts)
    sums = [sum(part["sums"][i] for part in parts) for i in rgb]
    products = [[sum(part["products"][i][j] for part in parts) for j in rgb] for i in rgb]
    if count == 0:
        return {"count": 0, "mean": [0.0] * 3, "covariance": [[0.0] * 3] * 3}
    return {
        "count": count,
        "mean": [total / count for total in sums],
        "covariance": [
            [(count * products[i][j] - sums[i] * sums[j]) / count**2 for j in rgb] for i in rgb
        ],
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
