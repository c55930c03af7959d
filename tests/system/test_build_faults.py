"""Builders that are killed or race, and sets that are damaged: the same set in the end."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from drawn import A, B, encoded, image, imagefolder, jpeg
from made import contents, made_shards, started
from own_ray import own_ray

from pipelines import shards, storage
from pipelines.cli import main
from pipelines.plan import Recipe
from pipelines.verify import verify

if TYPE_CHECKING:
    from seaweed import Seaweed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

FOUR = Recipe(samples_per_shard=4)
FLAGS = ["--samples-per-shard", "4", "--max-rejected", "3%"]


@pytest.fixture(scope="module")
def undisturbed(drawn_raw: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("undisturbed") / "out")
    made_shards(drawn_raw, out, FOUR)
    return out


@pytest.fixture(scope="module")
def seaweed_ray(seaweed: "Seaweed") -> Iterator[dict[str, str]]:
    """A Ray whose workers find the SeaweedFS server; gives what a driver's environment needs."""
    with own_ray(seaweed.environment()) as environment:
        yield environment


@pytest.fixture(params=["disk", "seaweed"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """Where to build, and the environment of who builds there."""
    if request.param == "disk":
        return str(tmp_path / "out"), {"RAY_ADDRESS": request.getfixturevalue("local_ray")}
    bucket = request.getfixturevalue("seaweed_bucket")
    return f"{bucket}/out", request.getfixturevalue("seaweed_ray")


def test_a_build_killed_again_and_again_ends_with_the_same_bytes(
    place: tuple[str, dict[str, str]], drawn_raw: str, undisturbed: str, tmp_path: Path
) -> None:
    out, environment = place
    argv = ["build", "--raw", drawn_raw, "--out", out, "--workers", "1", *FLAGS]
    moments = random.Random(0)
    for tars in (0, 2, 5):
        run = started(argv, tmp_path, environment)
        _wait_for_tars(out, tars, run)
        time.sleep(moments.uniform(0, 0.2))
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        assert not storage.exists(f"{out}/manifest.json")
        whole = contents(undisturbed)
        found = {name: data for name, data in contents(out).items() if name in whole}
        assert all(whole[name] == data for name, data in found.items()), "a part was published"
    run = started(argv, tmp_path, environment)
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert " shards are already there" in said
    assert contents(out) == contents(undisturbed)
    assert not storage.is_s3(out) or not _uploads_under_way(out)


def test_two_builders_of_one_set_end_with_one_good_set(
    place: tuple[str, dict[str, str]], drawn_raw: str, undisturbed: str, tmp_path: Path
) -> None:
    out, environment = place
    argv = ["build", "--raw", drawn_raw, "--out", out, *FLAGS]
    runs = [started(argv, tmp_path, environment) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    assert contents(out) == contents(undisturbed)
    assert verify(out, full=True).problems == ()


def _wait_for_tars(out: str, number: int, run: subprocess.Popen[str]) -> None:
    """Until so many are published, or for number 0 until the plan is."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and run.poll() is None:
        names = [name for name, _ in storage.list_files(out)]
        if "_meta/plan.json" in names and sum(n.endswith(".tar") for n in names) >= number:
            return
        time.sleep(0.01)
    raise AssertionError(f"fewer than {number} shards: {run.communicate()}")


def _uploads_under_way(out: str) -> list[object]:
    import boto3

    bucket = out.removeprefix("s3://").split("/")[0]
    client = boto3.session.Session().client("s3")  # not the default one with its kept keys
    return list(client.list_multipart_uploads(Bucket=bucket).get("Uploads", []))


@pytest.mark.parametrize(
    "damaged",
    [
        ("train-000001.tar",),
        ("train-000003.idx", "val-000000.tar"),
        ("index/train.parquet", "shardindex-val.json"),
        ("quarantine/train.jsonl",),
        ("manifest.json",),
        ("SHA256SUMS",),
        ("_meta/train-000002.parquet",),
    ],
)
def test_repair_makes_what_is_damaged_again_and_nothing_else(
    local_ray: str,
    drawn_raw: str,
    undisturbed: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damaged: tuple[str, ...],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    for name in damaged:
        data = bytearray((out / name).read_bytes())
        # In a page of a parquet file: their footers have no checksum of their own.
        data[min(200, len(data) // 2)] ^= 255
        (out / name).write_bytes(data)
    again = {name.removeprefix("_meta/").split(".")[0] for name in damaged}  # shards of theirs
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if path.stem not in again}
    assert main(["verify", str(out), "--full"]) == 1
    assert main(["verify", str(out), "--full", "--repair"]) == 0, capsys.readouterr()
    assert contents(str(out)) == contents(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_repair_from_other_images_is_told_by_the_changed_identity(
    local_ray: str,
    drawn_raw: str,
    undisturbed: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, raw = tmp_path / "out", tmp_path / "raw"
    shutil.copytree(undisturbed, out)
    shutil.copytree(drawn_raw, raw)
    (out / "train-000001.tar").write_bytes(b"cut")
    row = next(
        row
        for row in shards.load_index(str(out), "train").to_pylist()
        if row["shard"] == "train-000001"
    )
    archive = bytearray((raw / row["source"]).read_bytes())
    replacement = encoded(image(seed=99))[: row["source_size"]].ljust(row["source_size"], b"\0")
    archive[row["source_offset"] :][: row["source_size"]] = replacement
    place = slice(row["source_offset"], row["source_offset"] + row["source_size"])
    archive[place] = replacement
    (raw / row["source"]).write_bytes(archive)
    assert main(["verify", str(out), "--repair", "--raw", str(raw)]) == 1
    assert "but not the data set that it was" in capsys.readouterr().err


def test_mended_images_are_taken_in_and_the_set_is_that_of_the_mended_source(
    local_ray: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {
        f"{split}/{wnid}/{wnid}_{split}{n}.JPEG": jpeg(n)
        for split in ("train", "val")
        for wnid in (A, B)
        for n in range(4)
    }
    cut = f"train/{A}/{A}_train2.JPEG"
    raw = imagefolder(
        tmp_path / "raw", good | {cut: good[cut][:400], f"val/{B}/{B}_val0.JPEG": b""}
    )
    out, fresh = str(tmp_path / "out"), str(tmp_path / "fresh")
    argv = ["build", "--raw", str(raw), "--out", out, "--samples-per-shard", "4"]
    assert main([*argv, "--max-rejected", "2"]) == 0
    kept = Path(out, "train-000000.tar").stat().st_mtime_ns  # the cut one lies in the other
    (raw / cut).write_bytes(good[cut])
    capsys.readouterr()
    assert main(argv) == 2
    assert "source.table_sha256" in capsys.readouterr().err
    assert main([*argv, "--max-rejected", "2", "--retry-quarantined"]) == 0
    made_shards(str(raw), fresh, Recipe(samples_per_shard=4))
    assert contents(out) == contents(fresh)
    assert shards.load_manifest(out).document["rejected"] == {"zero_bytes": 1}
    assert Path(out, "train-000000.tar").stat().st_mtime_ns == kept


def test_more_than_mended_images_needs_another_folder(
    local_ray: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"train/{A}/{A}_{n}.JPEG": jpeg(n) for n in range(8)}
    raw = imagefolder(tmp_path / "raw", files | {f"train/{A}/{A}_0.JPEG": b""})
    argv = ["build", "--raw", str(raw), "--out", str(tmp_path / "out"), "--samples-per-shard", "4"]
    argv += ["--splits", "train", "--max-rejected", "1"]
    assert main(argv) == 0
    before = contents(str(tmp_path / "out"))
    for n in (0, 7):
        imagefolder(raw, {f"train/{A}/{A}_{n}.JPEG": jpeg(50)})
    capsys.readouterr()
    assert main([*argv, "--retry-quarantined"]) == 2
    assert "more has changed than quarantined images" in capsys.readouterr().err
    assert contents(str(tmp_path / "out")) == before
