r"""A shard set of any size whose tars are empty files: what bookkeeping sees, without its images.

Its plan, sidecars and DALI indices are as the builder leaves them; the tars are sparse, of the
size that their sidecars say. Also the steps whose time and memory `benchmarks.growth` measures, one
after the other, each in a process of its own, forked from one that only imported what they need:

    python -m benchmarks.grown \
        '[{"step": "plan", "images": …, "per_shard": …, "classes": …, "out": …}, …]'
"""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import finish, plan, plan_files, shards, sidecars, sources, storage
from pipelines.plan import Recipe, ShardPlan
from pipelines.sources.table import Source, labelled, part
from pipelines.verify import verify
from pipelines.write_shard import codec_versions
from training.loader import Loader
from training.order import epoch_order, global_batch, steps_per_epoch

_BATCH = 256  # of `baseline`
_JPEG_BYTES = 20_000
_STRIDE = 23_040  # bytes of a sample in a tar: three headers, the padded JPEG, label and JSON
_RAW = "made-up.tar"


def main() -> None:
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(measured, json.loads(sys.argv[1]), chunksize=1)))


def measured(request: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a step, without what is prepared for it, and the peak memory of both in MB."""
    prepared = STEPS[request["step"]](request)
    began = time.perf_counter()
    prepared()
    seconds = time.perf_counter() - began
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def _plan(request: dict[str, Any]) -> Callable[[], None]:
    """The plan and its claim, from a table of the images."""
    Path(request["out"]).mkdir()
    source = _source(request)
    return lambda: plan_files.begin(request["out"], _RAW, _planned(source, request))


def _tasks(request: dict[str, Any]) -> Callable[[], None]:
    """What tasks would have left; not measured, and only once for each set."""
    return lambda: _pretend(request["out"], _planned(_source(request), request))


def _finish(request: dict[str, Any]) -> Callable[[], None]:
    """Index, checksums and manifest from the sidecars."""
    (Path(request["out"]) / "manifest.json").unlink(missing_ok=True)

    def finished() -> None:
        made = plan_files.load(request["out"])
        done, missing = finish.finished_shards(request["out"], made)
        assert not missing, missing
        finish.finish(request["out"], made, done)

    return finished


def _resume(request: dict[str, Any]) -> Callable[[], None]:
    """What a build that goes on looks at before its first task."""

    def resumed() -> None:
        _, missing = finish.finished_shards(request["out"], plan_files.load(request["out"]))
        assert not missing, missing

    return resumed


def _verify(request: dict[str, Any]) -> Callable[[], None]:
    def verified() -> None:
        found = verify(request["out"])
        assert not found.problems, found.problems[:3]

    return verified


def _load(request: dict[str, Any]) -> Callable[[], None]:
    """Until the first batch could be asked for: manifest and index."""

    def loaded() -> None:
        manifest = shards.load_manifest(request["out"])
        with Loader(request["out"], manifest, "train", threads=1) as loader:
            assert loader.num_samples == request["images"]

    return loaded


def _order(request: dict[str, Any]) -> Callable[[], None]:
    """The batches of an epoch, as the training asks its loader for them."""
    whole, rest = divmod(request["images"], request["per_shard"])
    sizes = [request["per_shard"]] * whole + [rest] * bool(rest)

    def ordered() -> None:
        order = epoch_order(sizes, seed=0, epoch=1)
        steps = steps_per_epoch(len(order), _BATCH)
        batches = [global_batch(order, step, steps) for step in range(steps)]
        assert sum(map(len, batches)) == request["images"]

    return ordered


STEPS: dict[str, Callable[[dict[str, Any]], Callable[[], None]]] = {
    "plan": _plan,
    "tasks": _tasks,
    "resume": _resume,
    "finish": _finish,
    "verify": _verify,
    "load": _load,
    "order": _order,
}


def _source(request: dict[str, Any]) -> Source:
    """As scanning archives leaves it: one container, classes of equal size one after another."""
    images = request["images"]
    classes = min(request["classes"], images)
    wnids = [f"n{label:08d}" for label in range(classes)]
    labels = np.sort(np.arange(images) % classes)
    of_rows = pa.array(wnids).take(pa.array(labels))
    names = pa.array([f"{wnids[label]}_{row}.JPEG" for row, label in enumerate(labels)])
    offsets = pa.array(np.arange(images) * 110_592 + 512)
    rows = part("train", names, of_rows, _RAW, offsets, 110_000)
    return Source(
        raw=_RAW,
        layout="made up",
        table=labelled([rows], wnids),
        wnids=tuple(wnids),
        class_names=tuple(wnids),
        labels_from={"train": "made up"},
        containers=((_RAW, images * 110_592),),
        announced=None,
        notes=(),
    )


def _planned(source: sources.Source, request: dict[str, Any]) -> plan.Plan:
    recipe = Recipe(samples_per_shard=request["per_shard"], splits=("train",), partial=True)
    return plan.make(source, recipe)


def _pretend(out: str, made: plan.Plan) -> None:
    versions = codec_versions()
    for shard, rows in _rows(made):
        offsets = np.arange(shard.samples) * _STRIDE + 1536
        index = b"v1.2 %d\n" % shard.samples
        size = shard.samples * _STRIDE
        digest = hashlib.sha256(shard.name.encode()).hexdigest()
        with Path(storage.join(out, f"{shard.name}.tar")).open("wb") as tar:
            tar.truncate(size)
        Path(storage.join(out, f"{shard.name}.idx")).write_bytes(index)
        status = {
            "shard_id": shard.id,
            "shard": shard.name,
            "split": shard.split,
            "samples": shard.samples,
            "bytes": size,
            "sha256": digest,
            "md5": digest[:32],
            "dali_index_sha256": hashlib.sha256(index).hexdigest(),
            "pixels": {"count": 2, "sums": [250] * 3, "products": _PRODUCTS},
            "fixes": {},
            "rejected": [],
            "versions": versions,
        }
        sidecar = sidecars.pack(_indexed(shard, rows, offsets), status)
        Path(sidecars.place(out, shard.name)).write_bytes(sidecar)


_PRODUCTS = [[40_000 if i == j else 35_000 for j in range(3)] for i in range(3)]


def _rows(made: plan.Plan) -> Iterator[tuple[ShardPlan, pa.Table]]:
    assert made.table is not None, "just made"
    start = 0
    for shard in made.shards:
        yield shard, made.table.slice(start, shard.samples)
        start += shard.samples


def _indexed(shard: ShardPlan, rows: pa.Table, offsets: np.ndarray) -> pa.Table:
    """Rows of shards.INDEX. Hashes of images are as long as true ones, and as random."""
    count = rows.num_rows
    digests = pa.array(
        [hashlib.sha256(key.encode()).hexdigest() for key in rows["key"].to_pylist()]
    )
    constant = {"size": _JPEG_BYTES, "width": 500, "height": 375}
    columns = {
        **{name: rows[name] for name in ("key", "label", "wnid", "source")},
        **{name: pa.array(np.full(count, value)) for name, value in constant.items()},
        "shard": pa.array([shard.name] * count),
        "offset": pa.array(offsets),
        "sha256": digests,
        "source_offset": rows["offset"],
        "source_size": rows["size"],
        "source_sha256": digests,
        "fixes": pa.array([[]] * count, pa.list_(pa.string())),
    }
    return pa.table([columns[name] for name in shards.INDEX.names], schema=shards.INDEX)


if __name__ == "__main__":
    main()
