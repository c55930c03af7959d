"""pipelines/inspect.py: how far a build is, from what lies in OUT alone."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from alexnet.errors import UserError
from pipelines import shards
from pipelines.inspect import status, status_text


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


def test_a_finished_set_is_told_as_complete_with_the_numbers_of_its_manifest(
    drawn_shards: str,
) -> None:
    document = status(drawn_shards)
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
    text = status_text(document)
    assert "complete" in text.splitlines()[0] and "rejected: 1: 1 truncated" in text


def test_an_unfinished_build_is_told_by_its_sidecars(unfinished: Path) -> None:
    document = status(str(unfinished))
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
    assert "not complete; the same build command continues" in status_text(document)


def test_rate_and_eta_are_those_of_the_newest_shards(unfinished: Path) -> None:
    """Four of 8 images each, but for one of 6, are there; 44 are planned."""
    ages = {"train-000000": 90_000, "train-000002": 300, "train-000003": 200, "val-000000": 100}
    for name, age in ages.items():
        os.utime(unfinished / "_meta" / f"{name}.parquet", (time.time() - age,) * 2)
    document = status(str(unfinished))
    assert document["seconds_since_last_shard"] == pytest.approx(100, abs=20)
    assert document["images_per_second"] == pytest.approx((6 + 8) / 200, rel=0.01)
    assert document["eta_seconds"] == pytest.approx((44 - 30) / (14 / 200), rel=0.01)
    assert re.search(r"last shard: 0:0[12]:\d\d ago; 0 img/s, ETA 0:03:", status_text(document))
    assert status_text(document).count("complete") == 1


def test_a_tar_that_is_gone_or_cut_does_not_count(unfinished: Path, drawn_shards: str) -> None:
    (unfinished / "train-000000.tar").unlink()
    (unfinished / "train-000002.tar").write_bytes(b"cut")
    (unfinished / "_meta" / "train-000003.parquet").write_bytes(b"no parquet")
    document = status(str(unfinished))
    assert document["splits"]["train"]["shards"] == 0
    assert document["damaged"] == ["train-000000", "train-000002", "train-000003"]
    assert "the same build command rebuilds it" in status_text(document)
    shutil.copy(Path(drawn_shards, "manifest.json"), unfinished)
    text = status_text(status(str(unfinished)))
    assert "complete but damaged" in text and f"verify {unfinished}" in text


def test_a_shard_of_another_plan_is_neither_done_nor_damaged(unfinished: Path) -> None:
    sidecar = unfinished / "_meta" / "train-000000.parquet"
    rows, told = shards.unpack_sidecar(sidecar.read_bytes())
    sidecar.write_bytes(shards.pack_sidecar(rows, told | {"shard_id": "0" * 64}))
    document = status(str(unfinished))
    assert document["splits"]["train"]["shards"] == 2 and document["damaged"] == []


def test_where_nothing_was_begun_it_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^\S+: no build was begun here .* pipelines build --raw"):
        status(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '{"plan_id": 1}'])
def test_damaged_plan_is_one_line(copy: Path, text: str) -> None:
    (copy / "_meta" / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json is damaged"):
        status(str(copy))


def test_a_finished_set_that_lost_a_sidecar_is_damaged(copy: Path) -> None:
    (copy / "_meta" / "val-000001.parquet").unlink()
    document = status(str(copy))
    assert document["complete"] and document["damaged"] == ["val-000001"]
