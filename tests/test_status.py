"""pipelines/status.py: how far a build is, from what lies in OUT alone."""

import json
import shutil
import time
from pathlib import Path

import pytest

from alexnet.errors import UserError
from pipelines import journal, shards, status, storage
from pipelines.journal import Journal, Point


@pytest.fixture
def unfinished(drawn_shards: str, tmp_path: Path) -> Path:
    """`drawn_shards` as it was when two of its six shards were still to be made."""
    out = tmp_path / "out"
    shutil.copytree(drawn_shards, out)
    (out / "manifest.json").unlink()
    for name in ("train-000001", "val-000001"):
        (out / "_meta" / f"{name}.parquet").unlink()
        (out / f"{name}.tar").unlink()
    return out


def builder(out: str, pid: int, state: journal.State = "building", silent: float = 0.0) -> None:
    """A journal of 20 pictures per second over 100 s, and 10 in its last minute."""
    now = time.time() - silent
    entry = Journal(6, 44, host="here", pid=pid, started=now - 100, state=state)
    for seconds, pictures in ((0, 8), (40, 1408), (100, 2008)):
        journal.add(entry, Point(seconds, 1 + seconds // 10, pictures, 0, 0, 0))
    entry.pictures = 3008
    journal.save(out, entry)
    path = storage.join(out, "_meta", "progress", f"{entry.builder}.json")
    updated = storage.read(path).decode().split('"updated":')[1].split("}")[0]
    storage.write(path, storage.read(path).replace(updated.encode(), str(now).encode()))


def test_a_finished_set_is_told_as_complete_with_the_numbers_of_its_manifest(
    drawn_shards: str,
) -> None:
    document = status.status(drawn_shards)
    totals = shards.load_manifest(drawn_shards).document["totals"]
    assert document["complete"] and document["damaged"] == []
    for split, part in document["splits"].items():
        assert part["shards"] == part["shards_total"]
        assert (part["samples"], part["bytes"]) == (
            totals[split]["samples"],
            totals[split]["bytes"],
        )
        assert part["pictures_total"] == totals[split]["pictures"]
    assert document["rejected"] == {"truncated": 1}
    text = status.text(document)
    assert "complete" in text.splitlines()[0] and "rejected: 1: 1 truncated" in text


def test_an_unfinished_build_is_told_by_its_sidecars(unfinished: Path) -> None:
    document = status.status(str(unfinished))
    train, val = document["splits"]["train"], document["splits"]["val"]
    assert not document["complete"]
    assert (train["shards"], train["shards_total"], train["pictures_total"]) == (3, 4, 32)
    assert (val["shards"], val["shards_total"], val["pictures_total"]) == (1, 2, 12)
    sidecars = {
        path.stem: shards.unpack_sidecar(path.read_bytes())[1]
        for path in (unfinished / "_meta").glob("*-*.parquet")
    }
    assert train["samples"] + val["samples"] == sum(row["samples"] for row in sidecars.values())
    assert train["bytes"] == sum(path.stat().st_size for path in unfinished.glob("train-*.tar"))
    rejected = [entry["reason"] for row in sidecars.values() for entry in row["rejected"]]
    assert document["rejected"] == {reason: rejected.count(reason) for reason in set(rejected)}
    assert "nobody builds; the same build command continues" in status.text(document)


def test_a_living_builder_is_told_with_rate_and_eta(unfinished: Path) -> None:
    builder(str(unfinished), 7, silent=3)
    document = status.status(str(unfinished))
    (found,) = document["builders"]
    assert (found["host"], found["pid"], found["state"]) == ("here", 7, "building")
    assert 3 <= found["seconds_since_sign_of_life"] < 30
    assert (found["shards"], found["pictures"]) == (10, 2000)  # what it made itself
    assert found["images_per_second"] == 10  # in its last minute
    assert found["eta_seconds"] == pytest.approx(1000 / 20)  # at its average
    assert not found["silent"]
    text = status.text(document)
    assert "being built" in text.splitlines()[0]
    assert "builder on here (pid 7): building, last sign of life 3 s ago" in text
    assert "10 img/s, ETA 0:00:50" in text


def test_a_silent_builder_is_probably_dead(unfinished: Path) -> None:
    builder(str(unfinished), 7, silent=180)
    document = status.status(str(unfinished))
    assert document["builders"][0]["silent"] and document["builders"][0]["eta_seconds"] is None
    assert (
        "(pid 7): silent for 3 min: probably dead; the same build command continues"
        in status.text(document)
    )
    assert "being built" not in status.text(document)


def test_a_builder_that_ended_says_how(unfinished: Path) -> None:
    builder(str(unfinished), 7, "stopped", silent=7300)
    entry = Journal(6, 44, host="there", pid=8, state="failed", message="shard train-000001: full")
    journal.save(str(unfinished), entry)
    text = status.text(status.status(str(unfinished)))
    assert "(pid 7): stopped 2 h ago" in text
    assert "there (pid 8): failed 0 s ago: shard train-000001: full" in text


def test_only_the_newest_builders_are_read(unfinished: Path) -> None:
    for number in range(25):
        journal.save(str(unfinished), Journal(6, 44, host="h", pid=number, started=float(number)))
    (unfinished / "_meta" / "progress" / "h-99-99.json").write_text("no journal")
    document = status.status(str(unfinished))
    assert [found["pid"] for found in document["builders"]] == list(range(16, 25))
    assert document["builders_in_all"] == 26


def test_a_tar_that_is_gone_or_cut_does_not_count(unfinished: Path, drawn_shards: str) -> None:
    (unfinished / "train-000000.tar").unlink()
    (unfinished / "train-000002.tar").write_bytes(b"cut")
    (unfinished / "_meta" / "train-000003.parquet").write_bytes(b"no parquet")
    document = status.status(str(unfinished))
    assert document["splits"]["train"]["shards"] == 0
    assert document["damaged"] == ["train-000000", "train-000002", "train-000003"]
    assert "the same build command makes it anew" in status.text(document)
    shutil.copy(Path(drawn_shards, "manifest.json"), unfinished)
    text = status.text(status.status(str(unfinished)))
    assert "complete but damaged" in text and f"verify {unfinished}" in text


def test_more_shards_than_are_looked_into_are_told(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "_MAX_SIDECARS", 2)
    document = status.status(str(unfinished))
    assert document["sidecars_read"] == 2 and document["splits"]["train"]["shards"] == 3
    assert document["splits"]["train"]["samples"] is None
    assert "(in 2 of 4 shards)" in status.text(document)


def test_a_store_is_asked_for_one_listing_and_footers_only(
    s3: str, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{s3}/status"
    for name, _ in storage.list_files(str(unfinished)):
        storage.write(f"{out}/{name}", (unfinished / name).read_bytes())
    builder(out, 7)
    local = status.status(str(unfinished))
    asked: list[str] = []
    real_list, real_read = storage.list_files, storage.read

    def list_files(uri: str) -> list[tuple[str, int]]:
        asked.append("list")
        return real_list(uri)

    def read(uri: str, offset: int = 0, length: int | None = None) -> bytes:
        asked.append(uri)
        return real_read(uri, offset, length)

    monkeypatch.setattr(storage, "list_files", list_files)
    monkeypatch.setattr(storage, "read", read)
    document = status.status(out)
    assert {**local, "out": out} | {
        "builders": document["builders"],
        "builders_in_all": 1,
    } == document
    assert asked.count("list") == 1 and len(asked) <= 2 + 1 + 2 * 4
    assert not [uri for uri in asked if uri.endswith(".tar")]


def test_where_nothing_was_begun_it_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^\S+: no build was begun here .* pipelines build --raw"):
        status.status(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '{"plan_id": 1}'])
def test_damaged_plan_is_one_line(copy: Path, text: str) -> None:
    (copy / "_meta" / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json is damaged"):
        status.status(str(copy))


@pytest.mark.parametrize(
    "change", [{"pid": "x"}, {"points": [[1e999, 0, 0, 0, 0, 0]]}, {"state": 3}, {"updated": None}]
)
def test_journal_with_odd_values_is_passed_over(change: dict[str, object]) -> None:
    document = {"shards": 5, "pictures": 40, "points": [], "builder": "h-1-2.0"}
    assert journal.parse(json.dumps(document).encode()) is not None
    assert journal.parse(json.dumps(document | change).encode()) is None
