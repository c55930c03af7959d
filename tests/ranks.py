"""Real processes that meet over gloo, for claims about several ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Job = Callable[..., Any]


def run_ranks(world_sizes: list[int], job: Job, folder: Path, *args: Any) -> dict[int, list[Any]]:
    """`job(rank, world_size, *args)` on each rank of each world size; what they returned, by rank.

    One start of processes serves all world sizes, since importing torch takes seconds.
    """
    mp.spawn(_serve, (world_sizes, job, folder, args), nprocs=max(world_sizes))
    return {
        world_size: [torch.load(_answer(folder, world_size, rank)) for rank in range(world_size)]
        for world_size in world_sizes
    }


def _serve(rank: int, world_sizes: list[int], job: Job, folder: Path, args: tuple[Any]) -> None:
    torch.set_num_threads(1)
    for world_size in world_sizes:
        if rank >= world_size:
            continue
        meeting = f"file://{folder / f'meeting-{world_size}'}"
        dist.init_process_group("gloo", meeting, rank=rank, world_size=world_size)
        torch.save(job(rank, world_size, *args), _answer(folder, world_size, rank))
        dist.barrier()
        dist.destroy_process_group()


def _answer(folder: Path, world_size: int, rank: int) -> Path:
    return folder / f"answer-{world_size}-{rank}.pt"
