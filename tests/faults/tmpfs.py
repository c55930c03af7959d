"""Small disks: full, write-protected, and larger again."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Disk:
    path: Path

    def resize(self, num_bytes: int) -> None:
        self._remount(f"size={num_bytes}")

    def write_protect(self, on: bool = True) -> None:
        self._remount("ro" if on else "rw")

    def _remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.path)], check=True)

    def fill(self, left: int = 0) -> Path:
        """The file that takes all free bytes but so many."""
        filler = self.path / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
            file.truncate(max(0, file.tell() - left))
        return filler


@contextlib.contextmanager
def tmpfs(path: Path, num_bytes: int) -> Iterator[Disk]:
    """A file system of so many bytes, in pages of 4 KiB. Skips where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)]
    if subprocess.run(command).returncode != 0:
        pytest.skip("this machine mounts nothing")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
