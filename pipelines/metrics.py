"""What a build tells Prometheus, through Ray: each node's metrics port has it as ray_NAME_total.

Counted by the driver, where the status row of each finished shard arrives, and not by the tasks:
Ray runs a task again whose node was lost, and may run it though its first attempt had published the
shard, while the row of a shard arrives once. Shards that were there before are no work of this
build and not counted. Ray hands the last counts over when the driver leaves; its agent keeps them
for as long as the node lives, with or without anybody who asks for them.

Ray takes ASCII alone as labels, so names are escaped (`label`). A figure that Ray refuses is warned
of once and ends nothing (`never_fatal`).
"""

import functools
import hashlib
import logging
import threading
from collections import Counter as Tally
from collections.abc import Callable
from typing import Any, ParamSpec
from urllib.parse import quote

from ray.util.metrics import Counter

LONGEST_LABEL = 200  # characters; each is kept for every series, by Ray and by Prometheus
_OUT = ("out",)
_PLAIN = " !#$&'()*+,/:;<=>?@[]^`{|}"  # beside letters, digits and "_.-~", which stay by themselves
_P = ParamSpec("_P")
_log = logging.getLogger(__name__)
_warned = threading.Event()


def label(name: str) -> str:
    """`name` as the value of a label: as it is where it is short and of ASCII that needs no escape,
    else percent-encoded as in URLs (ö is %C3%B6). What is longer than LONGEST_LABEL keeps its start
    and its end, around "~" and the first 16 digits of the SHA-256 of the whole."""
    value = quote(name, safe=_PLAIN, errors="surrogatepass")
    if len(value) > LONGEST_LABEL:
        digest = hashlib.sha256(value.encode()).hexdigest()[:16]
        half = (LONGEST_LABEL - len(digest) - 2) // 2
        value = f"{value[:half]}~{digest}~{value[-half:]}"
    return value


def never_fatal(tell: Callable[_P, None]) -> Callable[_P, None]:
    """`tell`, which hands figures to Ray, without its failures: the first is a warning. Whatever
    Ray's metrics raise, in whichever version, they are about the work and not of it."""

    @functools.wraps(tell)
    def told(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            tell(*args, **kwargs)
        except Exception as error:  # told once: figures are no reason to end the work
            if not _warned.is_set():
                _warned.set()
                _log.warning("no figures for Prometheus: %r", error)

    return told


@never_fatal
def count(out: str, row: dict[str, Any]) -> None:
    """One finished shard of the set at `out`, a URI, with its status row."""
    counters, out = _counters(), label(out)
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
        counters["rejected"].inc(number, {"out": out, "reason": label(reason)})


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
