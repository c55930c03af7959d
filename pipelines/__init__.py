"""Raw ImageNet to sharded WebDataset tars, and those as a Ray dataset: `read`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data


def read(out: str, split: str) -> ray.data.Dataset:
    """The samples of a finished set: `out` is a folder or s3:// prefix, `split` such as "train".

    Columns: `image` (bytes of a JPEG), `label` (int), `key` and `wnid` (strings). One block is one
    shard, with its samples in their order; it is read, and its SHA-256 checked, when it is needed.
    Starts or joins Ray as `ray.data` does. Raises UserError for a set that is not whole or has no
    such split, and in its tasks for a shard that is damaged.
    """
    import ray.data

    from alexnet.errors import UserError
    from pipelines import shards, storage

    out = storage.absolute(out)
    manifest = shards.load_manifest(out)
    rows = [{"name": shard.name, "sha256": shard.sha256} for shard in manifest.split_shards(split)]
    if not rows:
        raise UserError(f"{out} has no split {split!r}; it has {', '.join(manifest.splits)}")
    return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _samples, batch_size=None, batch_format="pyarrow", fn_args=(out,)
    )


def _samples(shard: pa.Table, out: str) -> pa.Table:
    import hashlib

    import pyarrow as pa

    from alexnet.errors import UserError
    from pipelines import sidecars, storage

    [row] = shard.to_pylist()
    file = f"{row['name']}.tar"
    tar = storage.read(storage.join(out, file))
    if hashlib.sha256(tar).hexdigest() != row["sha256"]:
        raise UserError(
            f"{storage.join(out, file)} has another sha256 than in the manifest; run `python -m "
            f"pipelines verify {out}`"
        )
    samples, _ = sidecars.unpack(storage.read(sidecars.place(out, row["name"])))
    places = zip(samples["offset"].to_pylist(), samples["size"].to_pylist(), strict=True)
    image = pa.array([tar[offset : offset + size] for offset, size in places], pa.large_binary())
    return samples.select(["label", "key", "wnid"]).add_column(0, "image", image)
