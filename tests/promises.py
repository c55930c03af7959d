"""What pipelines/storage.py promises of any place, checked where a test says."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from alexnet.errors import UserError
from pipelines import storage


def check_that_new_names_keep_their_bytes(place: str) -> None:
    uri = storage.join(place, "file")
    storage.write_new(uri, b"first")
    storage.write_new(uri, b"first")  # a retry
    with pytest.raises(UserError, match="already exists with different contents"):
        storage.write_new(uri, b"other")
    assert storage.read(uri) == b"first"
    storage.write(uri, b"other")
    assert storage.read(uri) == b"other"


def check_that_one_writer_wins(place: str, writers: int = 8, num_bytes: int = 1 << 20) -> None:
    """Of several that write other bytes under one name at the same time."""
    uri, start = storage.join(place, "contested"), threading.Barrier(writers)

    def content(number: int) -> bytes:
        return np.random.default_rng(number).bytes(num_bytes)

    def write(number: int) -> str:
        start.wait()
        try:
            storage.write_new(uri, content(number))
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(writers) as pool:
        answers = list(pool.map(write, range(writers)))
    (winner,) = [number for number, answer in enumerate(answers) if not answer]
    assert storage.read(uri) == content(winner)
    assert storage.list_files(place) == [("contested", num_bytes)]
    for answer in answers[:winner] + answers[winner + 1 :]:
        assert "already exists with different contents" in answer
