"""What a build tells Prometheus, through Ray: each node's metrics port has it as ray_NAME_total.

Counted by the driver, where the status row of each finished shard arrives, and not by the tasks:
Ray runs a task again whose node was lost, and may run it though its first attempt had published the
shard, while the row of a shard arrives once. Shards that were there before are no work of this
build and not counted. Ray hands the last counts over when the driver leaves; its agent keeps them
for as long as the node lives, with or without anybody who asks for them.
"""

import functools
from collections import Counter as Tally
from typing import Any

from ray.util.metrics import Counter

_OUT = ("out",)


def count(out: str, row: dict[str, Any]) -> None:
    """One finished shard of the set at `out`, a URI, with its status row."""
    counters = _counters()
    for name, value in [
        ("images", row["samples"] + len(row["rejected"])),
        ("shards", 1),
        ("read_bytes", row["read_bytes"]),
        ("stored_bytes", row["stored_bytes"]),
        ("wait_seconds", row["wait_seconds"]),
        ("work_seconds", row["work_seconds"]),
    ]:
        if value > 0:  # Ray refuses to add nothing
            counters[name].inc(value, {"out": out})
    for reason, number in Tally(entry["reason"] for entry in row["rejected"]).items():
        counters["rejected"].inc(number, {"out": out, "reason": reason})


@functools.cache
def _counters() -> dict[str, Counter]:
    """By the last words of their names; made at the first use, since importing does nothing."""
    return {
        "images": Counter(
            "alexnet_build_images", "Pictures with a fate: stored or quarantined.", _OUT
        ),
        "rejected": Counter(
            "alexnet_build_rejected", "Pictures quarantined, by reason.", (*_OUT, "reason")
        ),
        "shards": Counter("alexnet_build_shards", "Shards made and published.", _OUT),
        "read_bytes": Counter("alexnet_build_read_bytes", "Bytes read from RAW.", _OUT),
        "stored_bytes": Counter("alexnet_build_stored_bytes", "Bytes of finished shards.", _OUT),
        "wait_seconds": Counter(
            "alexnet_build_wait_seconds",
            "Seconds that shard tasks, each on a CPU of its own, waited for bytes of RAW.",
            _OUT,
        ),
        "work_seconds": Counter(
            "alexnet_build_work_seconds",
            "Seconds that shard tasks took in all, waiting included.",
            _OUT,
        ),
    }
