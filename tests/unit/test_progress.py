"""pipelines/progress.py: what a build reports while it runs, and when it is given up."""

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from waiting import wait_until

from alexnet.errors import UserError
from pipelines import progress
from pipelines.progress import BuildFailed, MaxRejected, Progress

NONE = MaxRejected(number=0)


def row(samples: int, *rejected: str, **numbers: float) -> dict[str, Any]:
    nothing = dict.fromkeys(("read_bytes", "stored_bytes", "wait_seconds", "work_seconds"), 0.0)
    entries = [{"key": key, "reason": "truncated"} for key in rejected]
    return {"samples": samples, "rejected": entries, **nothing, **numbers}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still until it is told to go on."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.append(now.pop() + seconds)


@pytest.mark.parametrize(
    ("text", "official", "images", "allowed"),
    [
        (None, True, 1_281_167, 0),
        (None, False, 1000, 10),
        ("25", True, 1000, 25),
        ("0.5%", False, 1000, 5),
        ("60%", False, 14, 8),
        ("100%", False, 3, 3),
        ("0", False, 1000, 0),
    ],
)
def test_so_many_rejected_images_are_allowed_and_not_one_more(text, official, images, allowed):
    limit = MaxRejected.parse(text, official)
    assert not limit.exceeded(allowed, images)
    assert limit.exceeded(allowed + 1, images)


@pytest.mark.parametrize("text", ["", "%", "-1", "-1%", "101%", "nan%", "inf%", "1.5", "a few"])
def test_a_limit_that_makes_no_sense_is_refused_in_one_line(text):
    with pytest.raises(UserError, match=r"^--max-rejected .*: give a number such as 25 or a share"):
        MaxRejected.parse(text)


def test_too_many_rejected_fail_with_the_share_the_limit_and_examples():
    told = Progress(3, 300, MaxRejected.parse("1%"))
    told.count(row(97, "d", "c", "b"), before=True)  # by an earlier build
    with pytest.raises(BuildFailed) as failure:
        told.count(row(99, "a"))
    assert str(failure.value) == (
        "4 of 300 images (1.3%) are unusable, more than --max-rejected 1%: a (truncated), "
        "b (truncated), c (truncated); repair them or raise the limit"
    )


def test_rates_and_eta_follow_from_what_this_build_has_done(clock):
    told = Progress(100, 100_000, MaxRejected(number=5))
    told.count(row(10_000, read_bytes=9e9, wait_seconds=9, work_seconds=9), before=True)
    with told.running():
        assert told.json_line()["eta_seconds"] is None
        clock(10)
        told.count(row(999, "a", read_bytes=50e6, wait_seconds=1, work_seconds=4))
        facts = told.json_line()
    assert facts["pictures"] == 11_000 and facts["shards"] == 2
    assert facts["images_per_second"] == 100 and facts["read_bytes_per_second"] == 5e6
    assert facts["eta_seconds"] == pytest.approx(89_000 / 100)
    assert facts["rejected"] == 1 and facts["reasons"] == {"truncated": 1}
    assert told.line() == (
        "shards 2/100  images 11,000/100,000  100 img/s  5.0 MB/s  ETA 0:14:50  rejected 1  "
        "waiting for reads 25%"
    )


def test_the_rate_is_of_the_last_minute_and_the_eta_of_the_whole_run(clock):
    told = Progress(1000, 100_000, NONE)
    with told.running():
        for second in range(0, 300, 5):
            clock(5)
            told.count(row(1000 if second < 150 else 100))
            facts = told.json_line()
    assert facts["images_per_second"] == 20
    assert facts["eta_seconds"] == pytest.approx((100_000 - 33_000) / (33_000 / 300))


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "done"),
        (KeyboardInterrupt(), "stopped"),
        (BuildFailed("shard train-000001: full"), "failed"),
        (AssertionError(), "failed"),
    ],
)
def test_the_last_line_of_json_says_how_the_build_ended(monkeypatch, error, state):
    monkeypatch.setattr(progress, "_SECONDS", 0.001)
    told = Progress(2, 14, MaxRejected(number=1), as_json=True)
    said = []
    monkeypatch.setattr(progress.command, "say", said.append)
    try:
        with told.running():
            wait_until(lambda: said)
            told.count(row(6, "a", read_bytes=5))
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error  # passed on as it was
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    *lines, last = map(json.loads, said)
    assert lines[0]["state"] == "building"
    assert (last["state"], last["shards"], last["pictures"]) == (state, 1, 7)
    assert (last["rejected"], last["waiting_share"]) == (1, None)


def test_on_a_terminal_one_line_is_renewed(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    with (told := Progress(1, 7, NONE)).running():
        told._say()
    first, *lines, end = capsys.readouterr().out.split("\r\x1b[K")
    assert first == "" and len(lines) >= 1 and end.endswith("\n")
    assert all(len(line) == 39 and line.startswith("shards 0/1") for line in lines)


def test_a_reader_that_goes_away_does_not_end_the_build(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", closefd=False) as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        with (told := Progress(1, 7, NONE)).running():  # says something at its end
            pass
        patch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # for what the file still holds
    os.close(writing)
    assert told.json_line()["state"] == "done"
