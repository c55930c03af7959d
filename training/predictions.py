"""A shard set's predictions as a folder of parquet parts, one per shard, made shard by shard.

    OUT/_predictions.json     what they are of: weights, manifest, split, classes
    OUT/val-000000.parquet    a row per picture of that shard (`COLUMNS`), there once it is whole

pandas, pyarrow and others read the folder as one table; they pass over names that begin with "_".
"""

import hashlib
import json
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from alexnet.errors import UserError
from pipelines import shards, storage
from training import scoring
from training.evaluate import Metrics
from training.network import LoadedModel, check_fits
from training.shard_scores import first_of_each

COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),  # its place in `classes` of _predictions.json
        ("wnid", pa.string()),  # of the label
        ("predicted", pa.int32()),  # the label of the likeliest class
        ("top5", pa.list_(pa.int32())),  # labels, the likeliest first; all, where there are fewer
        ("probabilities", pa.list_(pa.float32())),  # of these, 0..1
        ("correct", pa.bool_()),
        ("place", pa.int32()),  # how many classes stand before the true one
        ("loss", pa.float64()),  # nats
    ]
)
_IDENTITY = "_predictions.json"
_FORMAT = 1


@dataclass(frozen=True)
class Predicted:
    """metrics: over the whole split, of all parts; made: how many of the parts are new."""

    metrics: Metrics
    parts: int
    made: int


def write_predictions(
    model: LoadedModel,
    data: str,
    out: str,
    *,
    split: str,
    workers: int | None = None,
    shared_fs: bool = False,
) -> Predicted:
    """Predicts on Ray what is missing in `out` of the split, and publishes each shard's part when
    it is whole; `workers` None takes all CPUs.

    Raises UserError as `scoring.score`, and for an `out` that holds anything else or a part that
    cannot be read.
    """
    out = storage.absolute(out)
    manifest = shards.load_manifest(data)
    check_fits(model, manifest, data)
    scoring.refuse_empty(data, manifest, split)
    names = [f"{info.name}.parquet" for info in manifest.split_shards(split)]
    there = _opened(out, _identity(model, data, manifest, split), names)
    missing = [number for number, name in enumerate(names) if name not in there]
    if missing:
        _make(model, data, manifest, split, out, missing, workers, shared_fs)
    return Predicted(_metrics(out, names, manifest, split), len(names), len(missing))


def _identity(
    model: LoadedModel, data: str, manifest: shards.Manifest, split: str
) -> dict[str, Any]:
    """The first five decide whether parts belong together; the rest is for readers."""
    return {
        "format": _FORMAT,
        "weights_sha256": _weights_sha256(model.network),
        "manifest_sha256": manifest.digest,
        "split": split,
        "input_spec": model.input_spec.to_json(),
        "model": model.name,
        "data": data,
        "classes": [
            {"wnid": wnid, "name": name}
            for wnid, name in zip(manifest.wnids, manifest.class_names, strict=True)
        ],
    }


_DECIDING = ("format", "weights_sha256", "manifest_sha256", "split", "input_spec")


def _weights_sha256(network: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _opened(out: str, identity: dict[str, Any], names: list[str]) -> set[str]:
    """Names of the parts that are in `out` already, which is marked as the place of these."""
    storage.sweep(out)
    marker = storage.join(out, _IDENTITY)
    files = {name for name, _ in storage.list_files(out)}
    if _IDENTITY in files:
        before = shards.read_json(marker)
        for field in _DECIDING:
            if before.get(field) != identity[field]:
                raise UserError(
                    f"{out} holds predictions with {field} {_short(before.get(field))}, these have "
                    f"{_short(identity[field])} (it is of {before.get('model')} on "
                    f"{before.get('data')}); choose another --out, or delete that one"
                )
        files.remove(_IDENTITY)
    if other := sorted(files - set(names)):
        raise UserError(f"{out} holds other files ({other[0]}); choose another --out")
    if _IDENTITY not in files:
        # Of two that begin at the same time with different predictions, one is refused.
        storage.write_new(marker, (json.dumps(identity, indent=1) + "\n").encode())
    return files


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 12 else f"{text[:12]}…"


def _make(
    model: LoadedModel,
    data: str,
    manifest: shards.Manifest,
    split: str,
    out: str,
    missing: list[int],
    workers: int | None,
    shared_fs: bool,
) -> None:
    infos = manifest.split_shards(split)
    ends = np.cumsum([info.samples for info in infos]).tolist()
    keys = shards.load_index(data, split)["key"]
    workers = scoring.EVERY_CPU if workers is None else workers
    tell = scoring.terminal_line("predictions")
    found = scoring.score_shards(model, data, manifest, split, missing, workers, shared_fs, tell)
    with closing(found):
        for number, rows in found:
            samples = infos[number].samples
            part = _part(keys.slice(ends[number] - samples, samples), rows, manifest)
            uri = storage.join(out, f"{infos[number].name}.parquet")
            storage.write(uri, shards.parquet_bytes(part))


def _part(keys: pa.ChunkedArray, rows: pa.Table, manifest: shards.Manifest) -> pa.Table:
    labels = rows["label"].to_numpy()
    predicted = first_of_each(rows["likeliest"]) if len(rows) else labels
    columns = {
        "key": keys,
        "label": rows["label"],
        "wnid": pa.array([manifest.wnids[label] for label in labels], pa.string()),
        "predicted": predicted,
        "top5": rows["likeliest"],
        "probabilities": rows["probabilities"],
        "correct": rows["place"].to_numpy() == 0,
        "place": rows["place"],
        "loss": rows["loss"],
    }
    return pa.table(columns, schema=COLUMNS)


def _metrics(out: str, names: list[str], manifest: shards.Manifest, split: str) -> Metrics:
    """From the parts as they lie there, those of earlier runs too."""
    images = correct1 = correct5 = 0
    loss = 0.0
    contents = storage.read_each([storage.join(out, name) for name in names])
    for name, info, content in zip(names, manifest.split_shards(split), contents, strict=True):
        try:
            part = shards.read_parquet(content)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{storage.join(out, name)} is damaged; delete it, and the same command makes it "
                "again"
            ) from error
        assert part.schema.equals(COLUMNS) and len(part) == info.samples, f"{name} is not whole"
        images += len(part)
        correct1 += pc.sum(part["correct"]).as_py() or 0
        correct5 += pc.sum(pc.less(part["place"], 5)).as_py() or 0
        loss += pc.sum(part["loss"]).as_py() or 0.0
    return Metrics(images, correct1 / images, correct5 / images, loss / images, correct1, correct5)
