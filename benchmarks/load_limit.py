"""The limit of a loader: decoding alone.

Threads of one process decode JPEGs out of memory in order, over one buffer; nothing is read from
files, mirrored or batched.

    python -m benchmarks.load_limit '{"action": "run", "tars": […], "threads": …, "batch": …}'
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import simplejpeg

from benchmarks.peers import clock, tars


def batches(request: dict[str, Any]) -> Iterator[tuple[np.ndarray, list[int]]]:
    """The images of a batch are the same memory each time."""
    samples = list(tars.samples(request["tars"]))
    jpegs, labels = [jpeg for jpeg, _ in samples], [label for _, label in samples]
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpegs[0])
    pixels = np.empty((request["batch"], height, width, 3), np.uint8)

    def decode(first: int, places: range) -> None:
        for place in places:
            simplejpeg.decode_jpeg(jpegs[first + place], "RGB", buffer=pixels[place])

    firsts = range(0, len(jpegs), request["batch"])
    with ThreadPoolExecutor(request["threads"]) as pool:
        for first in itertools.chain(*[firsts] * request.get("epochs", 1)):
            count = min(request["batch"], len(jpegs) - first)
            cuts = np.linspace(0, count, request["threads"] + 1, dtype=int).tolist()
            spans = [range(a, b) for a, b in itertools.pairwise(cuts)]
            list(pool.map(decode, [first] * len(spans), spans))
            yield pixels[:count], labels[first : first + count]


if __name__ == "__main__":
    clock.main(batches)
