"""Batches on their way to the device: on GPUs the next one is copied while a step runs.

No step waits for the host, nor the host for a step: draws are made ahead by a thread, everything
travels from pinned memory on a stream of its own, and a step's stream waits for its batch alone.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from training.loader import Batch, Loader
from training.order import Ids

Draw = Callable[[Tensor], Tensor]

_DRAWN_AHEAD = 4  # batches
# Steps that the host may be ahead of a GPU, each with a batch on the device: enough to hide what
# the host does now and then, and no more memory than that.
_STEPS_AHEAD = 3


@dataclass(frozen=True)
class Sent:
    """batch: as the loader made it. tensors: its images, its labels and what was drawn for it, on
    the device from `copied` on; None where there was nothing to copy."""

    batch: Batch
    tensors: tuple[Tensor, ...]
    copied: torch.cuda.Event | None = None

    def received(self) -> tuple[Tensor, ...]:
        """`tensors`, for which all work waits that the caller launches from here on."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.tensors[0].device)
            stream.wait_event(self.copied)
            for tensor in self.tensors:
                tensor.record_stream(stream)  # its memory is not used again before this work ends
        return self.tensors


def sent(
    loader: Loader,
    ids_of_batches: Sequence[Ids],
    device: torch.device,
    draw: Draw | None = None,
) -> Generator[Sent]:
    """The batches of these ids. draw: a function of sample ids, int64 (B,), to a tensor on the CPU
    that is sent along. Raises what reading raises."""
    if device.type != "cpu":
        yield from _copied_ahead(loader, ids_of_batches, device, draw)
        return
    with contextlib.closing(loader.batches(ids_of_batches)) as batches:
        for batch in batches:
            yield Sent(batch, (batch.images, batch.labels, *_drawn(draw, batch.sample_ids)))


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, from pinned memory, without waiting: the allocator of that memory knows of the
    copy, which comes after the work of the present stream, and keeps the source until then."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _copied_ahead(
    loader: Loader, ids_of_batches: Sequence[Ids], device: torch.device, draw: Draw | None
) -> Iterator[Sent]:
    side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    held = None
    under_way = deque[torch.cuda.Event]()  # the ends of the last steps
    with (
        contextlib.closing(loader.batches(ids_of_batches, pin=True)) as batches,
        contextlib.closing(_drawn_ahead(draw, ids_of_batches)) as drawn,
    ):
        for batch, extra in zip(batches, drawn, strict=True):
            with torch.cuda.stream(side):
                tensors = [copied(part, device) for part in (batch.images, batch.labels, *extra)]
                following = Sent(batch, tuple(tensors), side.record_event())
            if held is not None:
                yield held
                under_way.append(torch.cuda.current_stream(device).record_event())
                if len(under_way) > _STEPS_AHEAD:
                    under_way.popleft().synchronize()
            held = following
        if held is not None:
            yield held


def _drawn(draw: Draw | None, sample_ids: Tensor) -> tuple[Tensor, ...]:
    return () if draw is None else (draw(sample_ids),)


def _drawn_ahead(draw: Draw | None, ids_of_batches: Sequence[Ids]) -> Generator[tuple[Tensor, ...]]:
    begun = deque[Future[tuple[Tensor, ...]]]()
    with ThreadPoolExecutor(1, thread_name_prefix="draw") as pool:
        for ids in ids_of_batches:
            begun.append(pool.submit(_drawn, draw, torch.from_numpy(ids)))
            if len(begun) > _DRAWN_AHEAD:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
