"""From a registered version back to every picture that it learned from."""

import json
import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from alexnet.errors import UserError
from pipelines import shards
from training.registry.versions import resolve, run_of

_SPLITS = ("train", "val")


def lineage(
    client: MlflowClient, version: str | None, *, sample: str | None = None, data: str | None = None
) -> dict[str, Any]:
    """version: a number or an alias, None for the candidate. JSON-ready, the keys in order:

    version, run (id, name, status), config, commit, code_sha256, data (uri, manifest_sha256,
    plan_id, "gone": why, or None), shards (name, split, samples, sha256) and, with the key of a
    `sample`, where that picture lies: split, shard, offset, size, sha256 of the JPEG in the tar,
    source, source_offset, source_size, source_sha256 of the raw one (`shards.INDEX`).
    What is not known is None. `data`: where the shards are now, if they were moved.

    Raises UserError for an unknown version, and for a sample that none of the splits has.
    """
    found = resolve(client, version)
    run = run_of(client, found)
    tags = run.data.tags if run else {}
    uri = data or tags.get("data")
    manifest, gone = _manifest(uri, tags.get("manifest_sha256"))
    document: dict[str, Any] = {
        "version": str(found.version),
        "run": run
        and {"id": run.info.run_id, "name": run.info.run_name} | {"status": run.info.status},
        "config": run and _config(client, run),
        "commit": tags.get("mlflow.source.git.commit"),
        "code_sha256": tags.get("code_sha256"),
        "data": {
            "uri": uri,
            "manifest_sha256": tags.get("manifest_sha256"),
            "plan_id": tags.get("plan_id"),
            "gone": gone,
        },
        "shards": manifest and _shards(manifest),
    }
    if sample is not None:
        if manifest is None or uri is None:
            raise UserError(f"sample {sample} cannot be found: {gone}; pass --data")
        document["sample"] = _sample(uri, manifest, sample)
    return document


def _manifest(uri: str | None, digest: str | None) -> tuple[shards.Manifest | None, str | None]:
    """The manifest that the run learned from, or why there is none to read."""
    if uri is None:
        return None, "no run says which shards there were"
    try:
        manifest = shards.load_manifest(uri)
    except UserError as error:
        return None, str(error)
    if manifest.digest != digest:
        return None, (
            f"{uri} is another data set now (manifest {manifest.digest[:12]}, trained on "
            f"{str(digest)[:12]})"
        )
    return manifest, None


def _config(client: MlflowClient, run: Run) -> dict[str, Any] | None:
    """What the run was told to do; None where its artifacts are gone."""
    found = read_artifact(client, run.info.run_id, "config.json")
    if found is None:
        return None
    document: dict[str, Any] = json.loads(found)
    return document


def _shards(manifest: shards.Manifest) -> list[dict[str, Any]]:
    return [
        {"name": s.name, "split": s.split, "samples": s.samples, "sha256": s.sha256}
        for s in manifest.shards
    ]


def _sample(uri: str, manifest: shards.Manifest, key: str) -> dict[str, Any]:
    for split in _SPLITS:
        if not manifest.split_shards(split):
            continue
        index = shards.load_index(uri, split)
        rows = index.filter(pc.equal(index["key"], key)).to_pylist()
        if rows:
            return {"split": split, **rows[0]}
    first = manifest.shards[0].name if manifest.shards else "SHARD"
    raise UserError(
        f"no sample {key} in {uri}; `python -m pipelines inspect {first} --out {shlex.quote(uri)}` "
        "shows some"
    )


def text(found: dict[str, Any]) -> str:
    """What `lineage` found, for a terminal: from the version down to the shards or the sample."""
    run, data = found["run"], found["data"]
    rows = [
        ("version", found["version"]),
        ("run", f"{run['name']} ({run['status']}), {run['id']}" if run else None),
        ("config", found["config"] and _told_config(found["config"])),
        *((name, found[name]) for name in ("commit", "code_sha256")),
        ("data", data["uri"]),
        *((name, data[name]) for name in ("manifest_sha256", "plan_id")),
        *(_told_shards(found["shards"]) if found["shards"] else [("shards", data["gone"])]),
    ]
    if "sample" in found:
        rows += _told_sample(found["sample"])
    return "\n".join(f"{name:<18}{value or 'not recorded'}" for name, value in rows)


def _told_config(config: dict[str, Any]) -> str:
    model, optim = config["model"], config["optim"]
    return (
        f"recipe {config['recipe']}: {model['variant']} network, {optim['epochs']} epochs in "
        f"batches of {optim['batch_size']}, seed {config['seed']} (config.json of the run)"
    )


def _told_shards(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for split in dict.fromkeys(shard["split"] for shard in found):
        inside = [shard for shard in found if shard["split"] == split]
        total = sum(shard["samples"] for shard in inside)
        rows.append((f"{split} shards", f"{len(inside)} with {total:,} pictures"))
        told = [(f"  {shard['name']}", f"sha256 {shard['sha256']}") for shard in inside]
        # Of a thousand, the first and the last; --json has all.
        between = [("  …", f"{len(told) - 2:,} more")] if len(told) > 2 else []
        rows += [*told[:1], *between, *told[1:][-1:]]
    return rows


def _told_sample(sample: dict[str, Any]) -> list[tuple[str, str]]:
    # A parquet file's rows are counted, an archive's bytes.
    unit = "row" if sample["source"].endswith(".parquet") else "byte"
    return [
        ("sample", f"{sample['key']} ({sample['split']}), label {sample['label']}"),
        (
            "  in the shard",
            f"{sample['shard']}.tar from byte {sample['offset']:,}, {sample['size']:,} bytes",
        ),
        ("  sha256", sample["sha256"]),
        (
            "  in the source",
            f"{sample['source']} from {unit} {sample['source_offset']:,}, "
            f"{sample['source_size']:,} bytes",
        ),
        ("  sha256", sample["source_sha256"]),
    ]


def read_artifact(client: MlflowClient, run_id: str, path: str) -> bytes | None:
    """A file of the run, such as "card/facts.json"; None where there is none."""
    folder = path.rpartition("/")[0]
    if path not in [file.path for file in client.list_artifacts(run_id, folder or None)]:
        return None
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with tempfile.TemporaryDirectory() as here:
        return Path(client.download_artifacts(run_id, path, here)).read_bytes()
