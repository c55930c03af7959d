"""Processes that fill a file of decoded images and are killed leave no torn one that is served."""

import os
import signal
from typing import Any

import numpy as np
import pytest
from decoded_files import ALL, filled, opened, served, worker
from shard_sets import SIZES, open_loader, write_shard_set

from training import decoded

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("decoded") / "set", train=SIZES, val=(3,))


@pytest.fixture(scope="module")
def pixels(uri: str) -> np.ndarray:
    """All train images, by the decoder: uint8 (N,H,W,3)."""
    with open_loader(uri) as loader:
        return loader.read(ALL).images.permute(0, 2, 3, 1).numpy().copy()


def killed_while_filling(uri: str, pixels: np.ndarray, at: int, mark_first: bool = False) -> None:
    """A process fills the file and gets SIGKILL within its `at`-th write, half of it done."""
    pid = os.fork()
    if not pid:
        write, calls = os.pwrite, []

        def dying(handle: int, data: Any, offset: int) -> int:
            calls.append(offset)
            if len(calls) == at:
                half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
                write(handle, half, offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return write(handle, data, offset)

        file = opened(uri)
        os.pwrite = dying
        for sample in ALL.tolist():
            if mark_first:
                write(file._handle, b"\1", 4096 + sample)
            file.keep(sample, pixels[sample])
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def torn(uri: str, pixels: np.ndarray) -> list[int]:
    return [n for n, row in served(uri).items() if not np.array_equal(row, pixels[n])]


@pytest.mark.parametrize("at", [1, 2, 3, 2 * len(ALL)])
def test_no_torn_image_is_served_after_a_kill_and_the_whole_ones_stay(uri, pixels, at, caplog):
    killed_while_filling(uri, pixels, at)
    assert torn(uri, pixels) == []
    assert len(served(uri)) == (at - 1) // 2 and caplog.text == ""
    with worker(uri) as loader:
        loader.read(ALL)
    assert torn(uri, pixels) == [] and len(served(uri)) == len(ALL)


def test_torn_image_would_be_found(uri, pixels):
    killed_while_filling(uri, pixels, 5, mark_first=True)
    assert torn(uri, pixels) == [2]


def test_marks_from_before_a_reboot_count_only_after_a_clean_end(uri, pixels, monkeypatch, caplog):
    filled(uri)
    monkeypatch.setattr(decoded, "_boot", lambda: "second")
    assert len(served(uri)) == len(ALL) and caplog.text == ""
    killed_while_filling(uri, pixels, 3)
    monkeypatch.setattr(decoded, "_boot", lambda: "third")
    assert served(uri) == {}
    assert "was not closed before the machine started anew; it is rebuilt" in caplog.text
