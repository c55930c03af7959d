"""Limits of a loader: decoding alone, and copying decoded images alone.

Threads of one process write pixels, ahead of who takes the batches; nothing is read from files,
mirrored or batched. Decoding takes JPEGs out of memory in order, copying ("copy") decoded images,
all of which lie in memory, at random, into as many buffers in turn as a loader has.

    python -m benchmarks.load_limit '{"action": "run", "tars": […], "threads": …, "batch": …}'
"""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import simplejpeg

from benchmarks.peers import clock, tars

_BUFFERS = 5  #: a batch with its consumer, one going back, three being filled


def batches(request: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The images of a batch are the same memory again after _BUFFERS batches."""
    samples = list(tars.samples(request["tars"]))
    jpegs, labels = [jpeg for jpeg, _ in samples], np.array([label for _, label in samples])
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpegs[0])
    order, shape = np.arange(len(jpegs)), (request["batch"], height, width, 3)
    copy = bool(request.get("copy"))
    buffers = itertools.cycle([np.empty(shape, np.uint8) for _ in range(_BUFFERS)])
    if copy:
        decoded = np.stack([simplejpeg.decode_jpeg(jpeg, "RGB") for jpeg in jpegs])
        np.random.default_rng(0).shuffle(order)

    def fill(rows: np.ndarray, pixels: np.ndarray) -> None:
        for row, image in zip(rows.tolist(), pixels, strict=True):
            if copy:
                image[:] = decoded[row]
            else:
                simplejpeg.decode_jpeg(jpegs[row], "RGB", buffer=image)

    firsts = range(0, len(jpegs), request["batch"])
    begun = deque[tuple[np.ndarray, np.ndarray, list[Future[None]]]]()
    with ThreadPoolExecutor(request["threads"]) as pool:
        for first in itertools.chain(*[firsts] * request.get("epochs", 1)):
            rows, pixels = order[first : first + request["batch"]], next(buffers)
            cuts = np.linspace(0, len(rows), request["threads"] + 1, dtype=int).tolist()
            spans = [slice(a, b) for a, b in itertools.pairwise(cuts)]
            begun.append((rows, pixels, [pool.submit(fill, rows[s], pixels[s]) for s in spans]))
            if len(begun) == _BUFFERS - 1:  # one is with the consumer
                yield _filled(*begun.popleft(), labels)
        while begun:
            yield _filled(*begun.popleft(), labels)


def _filled(
    rows: np.ndarray, pixels: np.ndarray, parts: list[Future[None]], labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    for part in parts:
        part.result()
    return pixels[: len(rows)], labels[rows]


if __name__ == "__main__":
    clock.main(batches)
