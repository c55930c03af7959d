"""Decoded pictures that stay in memory, so that from the second epoch on nothing is read."""

import os
import weakref
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from alexnet.errors import UserError
from training.order import Ids

_SHARE = 0.8  # of what is free; the rest is for the network, the batches and the page cache
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")

# Host memory is taken page by page: what the residents of this process have yet to fill.
_promised: "weakref.WeakSet[Resident]" = weakref.WeakSet()


class Resident:
    """A place for every picture of a split: uint8 (N, side, side, 3) `pixels` on `device`, of
    which `filled` (bool (N,), on the CPU) tells the ones that are there."""

    def __init__(
        self, where: Literal["ram", "gpu"], count: int, side: int, device: torch.device
    ) -> None:
        """Raises UserError with the sizes where it does not fit."""
        self.filled = np.zeros(count, bool)
        self._picture_bytes = side * side * 3
        _check_fits(where, count, side, device)
        self.pixels = torch.empty((count, side, side, 3), dtype=torch.uint8, device=device)
        if device.type == "cpu":
            _promised.add(self)

    def missing(self, ids: Ids) -> Ids:
        return ids[~self.filled[ids]]

    def put(self, ids: Ids, arrived: torch.Tensor) -> None:
        """Keeps uint8 (B, side, side, 3) pictures: queued on the device, without waiting for it."""
        if not len(ids):
            return
        rows = torch.from_numpy(ids).to(self.pixels.device, non_blocking=True)
        self.pixels.index_copy_(0, rows, arrived.to(self.pixels.device, non_blocking=True))
        self.filled[ids] = True

    def take(self, ids: Ids) -> torch.Tensor:
        """A copy of the pictures of `ids`, uint8 (B, side, side, 3) on the device."""
        rows = torch.from_numpy(ids).to(self.pixels.device, non_blocking=True)
        return self.pixels.index_select(0, rows)

    def to_fill(self) -> int:
        """Bytes that are promised and not yet taken."""
        return int(np.count_nonzero(~self.filled)) * self._picture_bytes


def _check_fits(where: str, count: int, side: int, device: torch.device) -> None:
    needed, free = count * side * side * 3, _free_bytes(device)
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    if needed * workers > _SHARE * free:
        times = f" in each of {workers} workers" if workers > 1 else ""
        raise UserError(
            f"--cache {where} needs {needed / 1e9:.3g} GB for {count} pictures of {side} px{times}"
            f", {free / 1e9:.3g} GB are free on {device} and {1 - _SHARE:.0%} of that are kept for "
            "the rest; use --cache none or a larger machine"
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = min(_free_on_host(), _free_in_container())
    return max(0, free - sum(resident.to_fill() for resident in _promised))


def _free_on_host() -> int:
    if _MEMINFO.exists():
        rows = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_in_container() -> int:
    """What a limit of cgroup v2 leaves; cached files do not count, as they give way."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        rows = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:  # no container, or one of cgroup v1
        return 2**63
    if limit == "max":
        return 2**63
    usage = {name: int(value) for name, value in (row.split() for row in rows)}
    return int(limit) - used + usage["active_file"] + usage["inactive_file"]
