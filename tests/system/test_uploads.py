"""Checkpoints that are uploaded: whole, one at a time, kept or deleted, through outages."""

import random
import threading
from functools import partial

import pytest
from made_checkpoints import made, steps_in
from waiting import wait_until

from alexnet.errors import UserError
from pipelines import storage
from training import checkpoint
from training.uploads import Uploader, prune


def uploader(run: str, **changes) -> Uploader:
    return Uploader(run, **{"keep_last": 2, "keep_best": 1, "patience": 0.5} | changes)


# Uploads


@pytest.mark.parametrize("where", ["local", "s3"])
def test_uploaded_checkpoint_is_the_newest_good_one_and_its_folder_is_gone(where, tmp_path, s3):
    run = f"{s3}/uploads/run" if where == "s3" else str(tmp_path / "run")
    folder = made(tmp_path / "here", 7)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with uploader(run) as uploads:
        uploads.send(lambda: folder)
    assert not folder.exists()
    with checkpoint.newest_good(run) as found:
        assert {path.name: path.read_bytes() for path in found.iterdir()} == files


def test_hashes_are_written_last_and_each_checkpoint_is_told_once_it_is_whole(
    tmp_path, monkeypatch
):
    run, told, written, write = str(tmp_path / "run"), [], [], storage.write
    monkeypatch.setattr(storage, "write", lambda uri, data: (written.append(uri), write(uri, data)))
    with uploader(run, stored=lambda step: told.append((step, steps_in(run)))) as uploads:
        for step in (7, 9):
            uploads.send(partial(made, tmp_path / f"here-{step}", step))
    assert told == [(7, [7]), (9, [7, 9])]
    names = [uri.rsplit("/", 1)[1] for uri in written]
    assert len(names) == 8 and names[3] == names[7] == "hashes.json"


def test_training_goes_on_during_an_upload_and_waits_before_a_second(tmp_path, monkeypatch):
    store, write = threading.Event(), storage.write

    def slowly(uri: str, data: bytes) -> None:
        assert store.wait(120)
        write(uri, data)

    monkeypatch.setattr(storage, "write", slowly)
    run = str(tmp_path / "run")
    with uploader(run) as uploads:
        uploads.send(partial(made, tmp_path / "first", 1))  # returns: the store stands still
        second = threading.Thread(target=uploads.send, args=[partial(made, tmp_path / "second", 2)])
        second.start()
        second.join(0.2)
        assert second.is_alive() and steps_in(run) == []
        store.set()
        second.join(120)
    assert steps_in(run) == [1, 2]


def test_store_that_comes_back_within_the_patience_loses_nothing(tmp_path, monkeypatch, caplog):
    run, write = tmp_path / "run", storage.write
    run.write_text("a file where the folder should be")

    def away_once(uri: str, data: bytes) -> None:
        try:
            write(uri, data)
        except (UserError, OSError):
            run.unlink()  # it is back before the next try
            raise

    monkeypatch.setattr(storage, "write", away_once)
    with uploader(str(run), patience=120) as uploads:
        uploads.send(partial(made, tmp_path / "here", 3))
    assert steps_in(str(run)) == [3]
    assert caplog.text.count("trying again") == 1


def test_store_that_stays_away_ends_with_one_line_at_the_next_checkpoint(tmp_path):
    run = tmp_path / "run"
    uploads = uploader(str(run))
    uploads.send(partial(made, tmp_path / "first", 1))
    uploads.wait()
    for path in run.iterdir():
        path.rename(tmp_path / path.name)
    run.rmdir()
    run.write_text("")
    uploads.send(partial(made, tmp_path / "second", 2))
    with pytest.raises(UserError) as told:
        uploads.send(partial(made, tmp_path / "third", 3))
    assert "could not be stored for 0 s" in str(told.value) or "for 1 s" in str(told.value)
    assert "step 1 is stored" in str(told.value)
    assert not (tmp_path / "second").exists() and not (tmp_path / "third").exists()


def test_full_disk_is_waited_for_and_leaves_no_half_written_files(small_disk, tmp_path, caplog):
    (small_disk / "filler").write_bytes(bytes(60_000))
    run = small_disk / "run"
    with uploader(str(run), patience=120) as uploads:
        uploads.send(partial(made, tmp_path / "here", 3))
        wait_until(lambda: "No space left on device" in caplog.text)
        (small_disk / "filler").unlink()
    assert steps_in(str(run)) == [3]
    files = [path.name for path in run.rglob("*") if path.is_file()]
    assert len(files) == 4 and not any(name.startswith(".") for name in files)


def test_what_ended_the_training_is_not_hidden_by_a_failed_upload(tmp_path, caplog):
    (tmp_path / "run").write_text("")
    with pytest.raises(ZeroDivisionError), uploader(str(tmp_path / "run")) as uploads:
        uploads.send(partial(made, tmp_path / "here", 1))
        raise ZeroDivisionError
    assert "could not be stored" in caplog.text


# What is kept


@pytest.mark.parametrize("seed", range(20))
def test_last_and_best_are_kept_as_plain_sorting_has_them(seed, tmp_path):
    rng, run = random.Random(seed), tmp_path / "run"
    keep_last, keep_best, total = rng.randint(1, 3), rng.randint(0, 2), rng.randint(1, 8)
    top1 = [rng.choice([None, 0.1, 0.2, 0.3]) for _ in range(total)]
    for step, value in enumerate(top1):
        made(run / f"checkpoint-{step}-a", step, value)
    prune(str(run), f"checkpoint-{total - 1}-a", keep_last=keep_last, keep_best=keep_best)
    ranked = sorted((v, step) for step, v in enumerate(top1) if v is not None)
    best = {step for _, step in ranked[::-1][:keep_best]}
    kept = best | {*range(max(0, total - keep_last), total)}
    assert {path.name for path in run.iterdir()} == {f"checkpoint-{step}-a" for step in kept}
    assert {*steps_in(str(run))} == kept


def test_best_is_the_checkpoint_that_was_measured_not_a_later_one_of_its_epoch(tmp_path):
    run = tmp_path / "run"
    for step, top1, at in [(10, 0.5, 10), (13, 0.5, 10), (20, 0.4, 20), (23, 0.4, 20)]:
        made(run / f"checkpoint-{step}-a", step, top1, at)
    prune(str(run), "checkpoint-23-a", keep_last=1, keep_best=1)
    assert steps_in(str(run)) == [10, 23]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_leftovers_go_and_what_is_no_checkpoint_stays(where, tmp_path, s3):
    run = f"{s3}/leftovers/run" if where == "s3" else str(tmp_path / "run")
    made(tmp_path / "set" / "checkpoint-5-a", 5)
    made(tmp_path / "set" / "checkpoint-3-killed", 3).joinpath("hashes.json").unlink()
    made(tmp_path / "set" / "checkpoint-4-torn", 4).joinpath("state.json").write_text("{")
    made(tmp_path / "set" / "checkpoint-9-behind-which-it-went-back", 9)
    made(tmp_path / "set" / "checkpoint-5-before", 5)
    (tmp_path / "set" / "notes").mkdir()
    (tmp_path / "set" / "notes" / "mine.txt").write_text("kept")
    for path in (tmp_path / "set").rglob("*.*"):
        storage.write(storage.join(run, str(path.relative_to(tmp_path / "set"))), path.read_bytes())
    if where == "local":  # of one that was killed in its first file nothing is listed
        killed = tmp_path / "run" / "checkpoint-2-killed"
        killed.mkdir()
        (killed / ".another-host~1~hashes.json.x.tmp").write_bytes(b"half")
    prune(run, "checkpoint-5-a", keep_last=3, keep_best=1)
    folders = {name.split("/")[0] for name, _ in storage.list_files(run)}
    assert folders == {"checkpoint-5-a", "notes"}
    assert where == "s3" or not killed.exists()


def test_deletion_begins_with_what_makes_a_folder_a_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        made(tmp_path / f"checkpoint-{step}-a", step)
    deleted = []
    monkeypatch.setattr(storage, "delete", lambda uri: deleted.append(uri.rsplit("/", 1)[1]))
    prune(str(tmp_path), "checkpoint-2-a", keep_last=1, keep_best=0)
    assert deleted[0] == "hashes.json" and len(deleted) == 4


def refuse(uri: str) -> None:
    raise UserError(f"{uri}: Access Denied")


def test_upload_survives_a_store_that_cannot_delete(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(storage, "delete", refuse)
    run = str(tmp_path / "run")
    with uploader(run, keep_last=1) as uploads:
        for step in (1, 2, 3):
            uploads.send(partial(made, tmp_path / f"here-{step}", step))
            uploads.wait()
    assert steps_in(run) == [1, 2, 3]
    assert caplog.text.count("old checkpoints stay for now") == 1


def test_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    for step in (1, 2):
        made(tmp_path / f"checkpoint-{step}-a", step)
    monkeypatch.setattr(storage, "read", refuse)
    with pytest.raises(UserError, match="Access Denied"):
        prune(str(tmp_path), "checkpoint-2-a", keep_last=1, keep_best=0)
    assert steps_in(str(tmp_path)) == [1, 2]
