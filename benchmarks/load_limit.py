"""Limits of a loader: decoding alone, and copying decoded pictures alone.

Threads of one process write pixels; nothing is read from files, mirrored or batched. Decoding
takes JPEGs out of memory in order, over one buffer. Copying takes decoded pictures, all of which
lie in memory, at random, into as many buffers in turn as a loader has that works ahead: what
`--cache ram` has to do at least. Into one buffer, which stays in the CPU's cache, it is faster by
half, but no batch outlives the next then.

    python -m benchmarks.load_limit '{"action": "run", "tars": […], "threads": …, "batch": …}'
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import simplejpeg

from benchmarks.peers import clock, tars

_AHEAD = 5  # buffers: a batch with its consumer, one going back, three being filled


def batches(request: dict[str, Any]) -> Iterator[tuple[np.ndarray, list[int]]]:
    """The pictures of a batch are the same memory each time."""
    samples = list(tars.samples(request["tars"]))
    jpegs, labels = [jpeg for jpeg, _ in samples], [label for _, label in samples]
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpegs[0])
    shape = (request["batch"], height, width, 3)
    buffers = itertools.cycle(
        [np.empty(shape, np.uint8) for _ in range(_AHEAD if request.get("copy") else 1)]
    )
    order = np.random.default_rng(0).permutation(len(jpegs))
    # Not zeros: untouched pages of them would all be one page, which stays in the CPU's cache.
    count = len(jpegs) if request.get("copy") else 0
    resident = np.ones((count, height, width, 3), np.uint8)

    def decode(first: int, pixels: np.ndarray, places: range) -> None:
        for place in places:
            simplejpeg.decode_jpeg(jpegs[first + place], "RGB", buffer=pixels[place])

    def copy(first: int, pixels: np.ndarray, places: range) -> None:
        rows = order[first + places.start : first + places.stop]
        np.take(resident, rows, axis=0, out=pixels[places.start : places.stop], mode="clip")

    work = copy if request.get("copy") else decode
    firsts = range(0, len(jpegs), request["batch"])
    with ThreadPoolExecutor(request["threads"]) as pool:
        for first in itertools.chain(*[firsts] * request.get("epochs", 1)):
            count = min(request["batch"], len(jpegs) - first)
            cuts = np.linspace(0, count, request["threads"] + 1, dtype=int).tolist()
            spans = [range(a, b) for a, b in itertools.pairwise(cuts)]
            pixels = next(buffers)
            list(pool.map(work, [first] * len(spans), [pixels] * len(spans), spans))
            yield pixels[:count], labels[first : first + count]


if __name__ == "__main__":
    clock.main(batches)
