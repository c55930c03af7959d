"""Single objects on a bad store: published once, whole, and by whom the store says."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from bad_store import weather_of
from store_proxy import FAULTS, FLIPS, PAGE, Weather

from alexnet.errors import UserError
from pipelines import s3, storage

WRITERS, NAMES = 4, 3


def content(name: int, writer: int) -> bytes:
    return np.random.default_rng([name, writer]).bytes(30_000)


def told(action: Callable[[], object]) -> str:
    """The one line of the error, "" where there was none."""
    try:
        action()
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def test_of_racing_writers_one_wins_however_the_store_errs(attack, bucket, proxy):
    proxy.foul(weather_of(attack, [*FAULTS, FLIPS[1]]))
    pairs = [(name, writer) for writer in range(WRITERS) for name in range(NAMES)]
    attack.draw.shuffle(pairs)

    def write(pair: tuple[int, int]) -> str:
        return told(lambda: storage.write_new(f"{bucket}/{pair[0]}", content(*pair)))

    with ThreadPoolExecutor(6) as pool:
        answers = dict(zip(pairs, pool.map(write, pairs), strict=True))
    assert proxy.faults or attack.seed  # later runs have a single kind
    proxy.fair()
    for name in range(NAMES):
        found = storage.read(f"{bucket}/{name}")
        (winner,) = [writer for writer in range(WRITERS) if content(name, writer) == found]
        for writer in range(WRITERS):
            assert (answers[name, writer] == "") == (writer == winner), answers


def test_what_is_read_listed_replaced_and_deleted_is_right(attack, bucket, proxy):
    names = [f"{number:02d}" for number in range(12)]
    for number, name in enumerate(names):
        storage.write(f"{bucket}/set/{name}", content(number, 0))
    proxy.foul(weather_of(attack, [*FAULTS, *FLIPS]))
    assert storage.list_files(f"{bucket}/set") == [(name, 30_000) for name in names]
    found = storage.read_each([f"{bucket}/set/{name}" for name in names])
    assert list(found) == [content(number, 0) for number in range(12)]
    for _ in range(10):
        start, length = attack.draw.randrange(30_100), attack.draw.randrange(1, 9_000)
        found = storage.read(f"{bucket}/set/00", start, length)
        assert found == content(0, 0)[start : start + length]
    for number in (1, 5):
        storage.write(f"{bucket}/set/{names[number]}", content(number, 1))
        assert storage.read(f"{bucket}/set/{names[number]}") == content(number, 1)
        storage.delete(f"{bucket}/set/{names[number + 1]}")
        assert not storage.exists(f"{bucket}/set/{names[number + 1]}")
    assert proxy.faults or attack.seed  # later runs have a single kind
    proxy.fair()
    left = [name for name, _ in storage.list_files(f"{bucket}/set")]
    assert left == [name for name in names if name not in ("02", "06")]


@pytest.mark.parametrize("fault", ["done, then reset", "done, then 500"])
def test_an_own_write_whose_answer_was_lost_is_no_stranger(fault, bucket, proxy):
    proxy.foul(Weather(0, 0.5, [fault]))
    for number in range(10):
        storage.write_new(f"{bucket}/{number}", content(number, 0))
    assert proxy.faults[fault] > 3


def test_an_answer_that_stays_damaged_is_one_line(bucket, proxy, monkeypatch):
    monkeypatch.setattr(s3, "_PATIENCE", 0.5)
    monkeypatch.setattr(s3, "_TRIES", 2)
    storage.write(f"{bucket}/file", content(0, 0))
    for fault, action, expected in (
        ("answer cut", lambda: storage.read(f"{bucket}/file"), "check "),
        ("reset in the answer", lambda: storage.read(f"{bucket}/file"), "check "),
        (FLIPS[0], lambda: storage.read(f"{bucket}/file"), "check "),
        (PAGE, lambda: storage.list_files(bucket), "answered 500"),
        (FLIPS[1], lambda: storage.write_new(f"{bucket}/new", content(0, 0)), "answered "),
    ):
        proxy.foul(Weather(0, 1.0, [fault]))
        assert expected in told(action), fault
    proxy.fair()
    assert not storage.exists(f"{bucket}/new")
