"""A run has one writer: who is refused, who takes over, and what the one that was left out does."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from made_checkpoints import made, steps_in
from waiting import wait_until

from alexnet.errors import UserError
from pipelines import storage
from training import lease
from training.lease import Superseded, Writer
from training.uploads import Uploader


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = re.sub(r"\W", "-", request.node.name)
    if request.param == "disk":
        return str(tmp_path / name)
    return f"{request.getfixturevalue('s3')}/leases/{name}"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("RENEW", 0.05), ("SILENT", 1.0), ("POLL", 0.05)):
        monkeypatch.setattr(lease, f"_{name}_SECONDS", seconds)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, of this machine."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def files(run: str) -> dict[str, Writer]:
    place = storage.join(run, "writer")
    return {
        name: Writer(**json.loads(storage.read(storage.join(place, name))))
        for name, _ in storage.list_files(place)
    }


def left(run: str, number: int = 1, **changes: object) -> Writer:
    """The file of a holder as this process would write it, but for `changes`."""
    writer = dataclasses.replace(lease._this_process(), **changes)
    place = storage.join(run, "writer", f"{number:06d}.json")
    storage.write(place, json.dumps(dataclasses.asdict(writer)).encode())
    return writer


def by(process: subprocess.Popen[bytes]) -> dict[str, object]:
    found = lease._process(process.pid)
    assert found is not None
    return {"pid": process.pid, "started": found[1]}


def test_second_writer_is_told_who_writes_since_when_and_what_to_do(run):
    with lease.held(run):
        (writer,) = files(run).values()
        with pytest.raises(UserError) as refused:
            lease.held(run)
        with pytest.raises(UserError, match="is being written by"):
            lease.holder(run)
    told = str(refused.value)
    for known in (writer.host, f"pid {os.getpid()}", writer.since, "another --name", "wait"):
        assert known in told
    assert "\n" not in told
    assert lease.holder(run) is None
    with lease.held(run) as second:
        assert list(files(run)) == ["000002.json"] and second.number == 2


def test_job_is_named_with_what_ends_it(tmp_path, monkeypatch):
    job = {"metadata": {"job_submission_id": "raysubmit_7"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    with (
        lease.held(str(tmp_path)),
        pytest.raises(UserError, match=r"job raysubmit_7\).*`ray job stop raysubmit_7`"),
    ):
        lease.held(str(tmp_path))


@pytest.mark.parametrize("before", ["nobody", "a dead one"])
def test_of_many_at_the_same_instant_one_writes(run, before, sleeper):
    if before == "a dead one":
        left(run, **by(sleeper))
        sleeper.kill()
        sleeper.wait()
    start = threading.Barrier(6)

    def take(_: int) -> lease.Lease | str:
        start.wait()
        try:
            return lease.held(run)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(take, range(6)))
    (taken,) = [answer for answer in answers if isinstance(answer, lease.Lease)]
    assert sum("is being written by" in str(answer) for answer in answers) == 5
    assert [writer.token for writer in files(run).values()] == [taken.token]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"[" * 100_000, b'{"pid": 1}', b"\xff"),
        *({"pid": "1"}, {"pid": 0}, {"pid": 10**30}, {"host": "a\nb"}, {"user": "\x1b[2J"}),
        *({"job": 7}, {"host": "h" * 1000}, {"another\nfield": 1}),
    ],
)
def test_file_that_is_no_lease_is_one_line_with_the_remedy(tmp_path, content):
    (tmp_path / "writer").mkdir()
    if isinstance(content, dict):
        whole = dataclasses.asdict(lease._this_process()) | content
        content = json.dumps(whole).encode()
    (tmp_path / "writer" / "000004.json").write_bytes(content)
    with pytest.raises(UserError, match=r"writer/000004.json is damaged.*delete it") as told:
        lease.held(str(tmp_path))
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


@pytest.mark.parametrize("now", ["a zombie", "another process"])
def test_killed_holder_of_this_machine_is_followed_at_once(run, sleeper, caplog, now):
    left(run, **by(sleeper) | ({"started": "1"} if now == "another process" else {}))
    if now == "a zombie":  # nobody has waited for it yet
        sleeper.kill()
        wait_until(lambda: lease._process(sleeper.pid)[0] == "Z")
    assert lease.held(run).number == 2
    assert list(files(run)) == ["000002.json"] and "waiting" not in caplog.text


@pytest.mark.parametrize("why", ["another machine", "suspended"])
def test_silent_holder_is_waited_for_and_followed(run, quick, caplog, why, sleeper):
    sleeper.send_signal(signal.SIGSTOP)
    wait_until(lambda: lease._process(sleeper.pid)[0] == "T")
    held = left(run, **by(sleeper) if why == "suspended" else {"system": "another", "host": "far"})
    assert lease.holder(run) == str(held)
    began = time.monotonic()
    assert lease.held(run).number == 2
    assert time.monotonic() - began >= 1.0
    assert caplog.text.count("waiting up to 1 s to see whether it is alive") == 1
    assert str(held) in caplog.text


def test_living_holder_on_another_machine_is_not_followed(run, quick, monkeypatch):
    with lease.held(run) as first:
        monkeypatch.setattr(lease, "_system", lambda: "another")
        with pytest.raises(UserError, match="is being written by"):
            lease.held(run)
        first.check()


def test_holder_that_was_silent_finds_it_taken_and_leaves_it(run, quick):
    with lease.held(run) as first:
        taken = left(run, number=2, host="far")
        wait_until(lambda: not first._thread.is_alive())
        with pytest.raises(Superseded, match="was taken over by far, pid"):
            first.check()
    assert files(run)["000002.json"] == taken


def test_another_writer_under_the_same_number_has_taken_it_too(tmp_path):
    """As after its file was deleted."""
    first = lease.held(str(tmp_path))
    lease.refuse_superseded(str(tmp_path), first.number, first.token)
    left(str(tmp_path), number=first.number, host="far")
    with pytest.raises(Superseded, match="was taken over by far, pid"):
        lease.refuse_superseded(str(tmp_path), first.number, first.token)


def test_run_is_not_lost_while_its_store_is_away_nor_when_the_file_was_deleted(
    tmp_path, quick, caplog, monkeypatch
):
    run, asked = str(tmp_path / "run"), []

    def refuse(uri: str) -> None:
        asked.append(uri)
        raise UserError("the store is away")

    with lease.held(run) as held:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "list_files", refuse)
            wait_until(lambda: len(asked) > 2)
        assert caplog.text.count("cannot be renewed for now: the store is away") == 1
        (tmp_path / "run" / "writer" / "000001.json").unlink()
        wait_until(lambda: list(files(run)) == ["000001.json"])
        before = files(run)["000001.json"].renewed
        wait_until(lambda: files(run)["000001.json"].renewed > before)
        held.check()
    assert files(run)["000001.json"].ended


def test_superseded_uploader_stores_and_deletes_nothing(tmp_path):
    run = str(tmp_path / "run")
    first = lease.held(run)
    check = partial(lease.refuse_superseded, run, first.number, first.token)
    uploads = Uploader(run, keep_last=1, keep_best=0, check=check)
    uploads.send(partial(made, tmp_path / "here", 1))
    uploads.wait()
    left(run, number=2)
    made(tmp_path / "run" / "checkpoint-00000003-other", 3)
    for action, what in (
        (uploads.send, partial(made, tmp_path / "here", 2)),
        (uploads.tidy, "checkpoint-00000001-any"),
    ):
        action(what)
        with pytest.raises(Superseded):
            uploads.wait()
    assert steps_in(run) == [1, 3]
