"""Whether the disks that a training uses have room for it, before it starts."""

import tempfile

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import Manifest
from training.config import TrainConfig


def check_storage(config: TrainConfig, each: int) -> None:
    """Raises UserError where the checkpoints that stay, of `each` bytes, do not fit; one more than
    those is there while it is written."""
    place = str(config.storage)
    free = storage.free_bytes(place)
    wanted = each * (config.keep_last + config.keep_best + 1)
    if free is not None and free < wanted:
        raise UserError(
            f"{place} has {gb(free)} free and the checkpoints of this run take {gb(wanted)}; make "
            "room, lower --keep-last, or pass another --storage"
        )


def check_node(config: TrainConfig, manifest: Manifest, each: int) -> None:
    """Raises UserError where this node's own disk is too full: for the cache of shards on S3, of
    which `--cache-gb` or all are kept, or for two checkpoints on their way to storage."""
    spool = tempfile.gettempdir()
    free = storage.free_bytes(spool)
    if free is not None and free < 2 * each:
        raise UserError(
            f"{spool} has {gb(free)} free and two checkpoints on their way take {gb(2 * each)}; "
            "make room on this node, or set TMPDIR to another disk"
        )
    if config.synthetic or not storage.is_s3(str(config.data)):
        return
    whole = sum(shard.num_bytes for shard in manifest.shards)
    wanted = min(round(config.cache_gb * 1e9), whole)
    cache = str(storage.home() / "cache")
    free = storage.free_bytes(cache)
    room = (free or 0) + sum(size for _, size in storage.list_files(cache))
    if free is not None and room < wanted:
        raise UserError(
            f"{cache} has room for {gb(room)} and the shards kept there take {gb(wanted)}; make "
            f"room on this node, set ALEXNET_HOME to another disk, or pass --cache-gb "
            f"{int(room / 1e8) / 10:g}"
        )


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
