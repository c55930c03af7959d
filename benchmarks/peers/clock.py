"""One epoch of a loader, timed, or looked at. Python's own library and NumPy alone: the Python of
every peer runs this file.

A runner is a script that calls `main(prepare, batches)` and is started with a request as JSON:
{"action": "prepare" | "check" | "run", "shards": …, "work": …, "batch": …, "threads": …}; its
answer is the last line on stdout.
"""

import json
import os
import sys
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def main(batches, prepare=None):
    """batches(request) gives (images, labels): uint8 (B,H,W,3) or (B,3,H,W), and B integers.

    prepare(request) writes the peer's own format from the tars of request["shards"], untimed.
    """
    request = json.loads(sys.argv[1])
    if request["action"] == "prepare":
        answer = {"prepared": prepare is not None}
        if prepare is not None:
            prepare(request)
    elif request["action"] == "check":
        answer = looked_at(batches(request))
    else:
        answer = timed(lambda: batches(request))
    print(json.dumps(answer), flush=True)
    os._exit(0)  # some loaders hang in their threads at exit; nothing is left to be done


def timed(start):
    """first: seconds from the start of this process to the first batch, imports included. images,
    seconds and cpu (of this process and all below it) are of what came after the first batch."""
    batches = iter(start())
    first = len(next(batches)[0])
    age, cpu = _age(), tree_seconds()  # looking at all processes takes a while: not timed
    arrived = time.perf_counter()
    images = sum(len(batch) for batch, _ in batches)
    seconds = time.perf_counter() - arrived
    return {
        "first": age,
        "first_images": first,
        "images": images,
        "seconds": seconds,
        "cpu": tree_seconds() - cpu,
    }


def _age():
    """Seconds since this process was started."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / _TICKS
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def looked_at(batches):
    """What does not depend on order and mirroring: number, labels, and mean pixels by label."""
    import numpy as np

    images, labels, pixels, mixed, shapes = 0, 0, 0.0, 0.0, set()
    for batch, classes in batches:
        values, classes = np.asarray(batch), np.asarray(classes).reshape(-1).astype(np.int64)
        assert len(values) == len(classes), f"{len(values)} images, {len(classes)} labels"
        means = values.reshape(len(values), -1).mean(axis=1, dtype=np.float64)
        images, labels = images + len(values), labels + int(classes.sum())
        pixels, mixed = pixels + means.sum(), mixed + float((means * (classes + 1)).sum())
        shapes.add((str(values.dtype), *sorted(values.shape[1:])))
    return {
        "images": images,
        "labels": labels,
        "pixels": pixels / images,
        "mixed": mixed / images,
        "shapes": sorted(shapes),
    }


def tree_seconds():
    """CPU seconds of this process, those below it, and those of them that have been waited for."""
    return sum(own + waited for own, waited in tree(os.getpid()).values())


def tree(root, known=()):
    """(pid, start) → CPU seconds (its own, of children that it waited for), of the processes below
    `root` and below those of `known`, themselves included, that live now."""
    processes = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        own = (int(fields[11]) + int(fields[12])) / _TICKS
        waited = (int(fields[13]) + int(fields[14])) / _TICKS
        processes[int(entry.name)] = (int(fields[1]), int(fields[19]), own, waited)
    wanted = {root} | {pid for pid, start in known if processes.get(pid, (0, 0))[1] == start}
    found = {}
    for pid, (_, start, own, waited) in processes.items():
        line, above = [], pid
        while above in processes and above not in wanted:
            line.append(above)
            above = processes[above][0]
        if above in wanted:
            wanted.update(line)
            if pid in processes:
                found[pid, start] = (own, waited)
    return found
