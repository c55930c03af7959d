"""pipelines/write_shard.py: a shard holds what was planned, or is not published at all."""

import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn import A, B, archives, encoded, image, imagefolder, jpeg
from made import contents, made_shards

from alexnet.errors import UserError
from pipelines import finish, plan, plan_files, shards, sidecars, sources, storage, transform
from pipelines.build import job_for
from pipelines.sources import index
from pipelines.sources.ilsvrc import TRAIN_TAR
from pipelines.transform import Stored, to_stored
from pipelines.write_shard import Job, PixelSums, write_shard

PLAN = ("_meta/plan.json", "_meta/plan.parquet")
TWO = plan.Recipe(samples_per_shard=2, splits=("train",), partial=True)


def drawn(folder: Path) -> Path:
    return archives(folder / "raw", val=None, devkit=None)


def begun(raw: Path, out: Path) -> tuple[plan.Plan, Job]:
    """A build that is planned, and has not made a shard yet."""
    made = plan.make(sources.scan(str(raw), TWO.splits, partial=True), TWO)
    plan_files.begin(str(out), str(raw), made)
    return made, job_for(made, str(raw), str(out))


def write_each(made: plan.Plan, job: Job) -> None:
    for number, shard in enumerate(made.shards):
        write_shard(job, number, shard.name, shard.id)


def published(out: Path) -> set[str]:
    return {name for name, _ in storage.list_files(str(out))} - {"_meta/raw.json", *PLAN}


def test_worker_with_other_codecs_than_the_driver_makes_no_shard(tmp_path):
    made, job = begun(drawn(tmp_path), tmp_path / "out")
    for name in job.versions:
        other = replace(job, versions=job.versions | {name: "0.1"})
        with pytest.raises(UserError, match=rf"this worker has .*'{name}': '0\.1'.* install the s"):
            write_each(made, other)
    assert not published(tmp_path / "out")


def exchanged(archive: Path) -> bytes:
    """The archive of the same size, with another image, as good, at each place."""
    data = bytearray(archive.read_bytes())
    for row in index.nested(str(archive)).to_pylist():
        other = encoded(image(seed=row["offset"]), quality=40)
        assert len(other) <= row["size"]
        data[row["offset"] : row["offset"] + row["size"]] = other.ljust(row["size"], b"\0")
    return bytes(data)


def put(archive: Path, data: bytes) -> None:
    """In the place of the archive, and one nanosecond younger."""
    before = archive.stat()
    archive.write_bytes(data)
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize("what", ["other images", "damage"])
@pytest.mark.parametrize("when", ["while it is indexed", "before it is read", "while it is read"])
def test_archive_changed_behind_the_plan_gives_no_shard(when, what, tmp_path, home, monkeypatch):
    """Its size is the same: at the planned places now lie other images, or none."""
    raw, out = drawn(tmp_path), tmp_path / "out"
    archive = raw / TRAIN_TAR
    data = exchanged(archive) if what == "other images" else bytes(archive.stat().st_size)

    def afterwards(function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object) -> object:
            found = function(*args)
            put(archive, data)
            return found

        return wrapped

    if when == "while it is indexed":
        monkeypatch.setattr(index, "nested", afterwards(index.nested))
    made, job = begun(raw, out)
    if when == "before it is read":
        put(archive, data)
    elif when == "while it is read":
        monkeypatch.setattr(transform, "to_stored", afterwards(to_stored))
    with pytest.raises(UserError, match=rf"{TRAIN_TAR} has changed since this build began"):
        write_each(made, job)
    assert not published(out)


def test_image_that_grew_behind_the_plan_gives_no_shard(tmp_path):
    """Read to its planned end, it would be stored, or rejected, as a cut one."""
    files = {f"train/{wnid}/{wnid}_{n}.JPEG": jpeg(n) for wnid in (A, B) for n in range(2)}
    made, job = begun(imagefolder(tmp_path / "raw", files), tmp_path / "out")
    for name, data in files.items():
        imagefolder(tmp_path / "raw", {name: data + b"more"})
    with pytest.raises(UserError, match=r"\d\.JPEG has changed: it is longer than"):
        write_each(made, job)
    assert not published(tmp_path / "out")


def test_out_that_was_taken_away_does_not_come_back_with_a_part_of_the_set(tmp_path):
    raw, out, away = drawn(tmp_path), tmp_path / "out", tmp_path / "away"
    made, job = begun(raw, out)
    write_each(made, job)
    done, _ = finish.finished_shards(str(out), made)
    out.rename(away)
    for again in (lambda: write_each(made, job), lambda: finish.finish(str(out), made, done)):
        with pytest.raises(UserError, match="not there"):
            again()
    assert not out.exists()
    away.rename(out)
    finish.finish(str(out), made, done)
    made_shards(str(raw), str(tmp_path / "other"), TWO)
    assert contents(str(out)) == contents(str(tmp_path / "other"))


def test_what_names_a_file_is_published_after_it_and_the_manifest_last(tmp_path, monkeypatch):
    files = {f"train/{A}/{A}_{n}.JPEG": b"" if n == 4 else jpeg(n) for n in range(5)}
    raw, out = imagefolder(tmp_path / "raw", files), tmp_path / "out"
    order: list[str] = []

    def noted(write: Callable[..., None]) -> Callable[..., None]:
        def wrapped(uri: str, data: bytes, below: str | None = None) -> None:
            write(uri, data, below)
            order.append(uri.removeprefix(f"{out}/"))

        return wrapped

    for name in ("write", "write_new"):
        monkeypatch.setattr(storage, name, noted(getattr(storage, name)))
    made_shards(str(raw), str(out), TWO)
    for name in ("train-000000", "train-000001", "train-000002"):
        _, status = sidecars.unpack((out / "_meta" / f"{name}.parquet").read_bytes())
        kept = [shards.rejected_name("train", entry["key"]) for entry in status["rejected"]]
        files_of = [order.index(file) for file in (f"{name}.tar", f"{name}.idx", *kept)]
        assert order.index("_meta/plan.parquet") < min(files_of)
        assert max(files_of) < order.index(f"_meta/{name}.parquet")
    assert sum(name.endswith(".bin") for name in order) == 1
    assert order.index("manifest.json") == len(order) - 1 == order.index("SHA256SUMS") + 1


def test_rejected_images_are_listed_in_the_order_of_their_keys(tmp_path):
    keys = [f"{wnid}_{n}" for wnid in (A, B) for n in range(4)]  # each shard has one of both
    files = {f"train/{key[:-2]}/{key}.JPEG": f"<html>{key}".encode() for key in keys}
    out = str(tmp_path / "out")
    made_shards(str(imagefolder(tmp_path / "raw", files)), out, TWO)
    assert [row["key"] for row in shards.load_quarantine(out, "train")] == keys


def test_samples_lie_in_the_order_of_the_plan(drawn_shards):
    """Not in that of the archive, in which they are read."""
    made = plan_files.load(drawn_shards)
    rejected = {row["key"] for row in shards.load_quarantine(drawn_shards, "train")}
    for number, shard in enumerate(made.shards):
        rows = plan_files.read_rows(drawn_shards, made.plan_id, number)
        planned = [row["key"] for row in rows if row["key"] not in rejected]
        with tarfile.open(f"{drawn_shards}/{shard.name}.tar") as archive:
            names = [name.removesuffix(".jpg") for name in archive.getnames() if ".jpg" in name]
        assert names == planned
        places = [(row["source"], row["offset"]) for row in rows]
        assert places != sorted(places), "it would not be seen"


def test_pixel_statistics_are_those_of_the_train_pixels_before_encoding(drawn_raw, drawn_shards):
    pixels = []
    for row in sources.scan(drawn_raw, ["train"]).table.to_pylist():
        raw = storage.read(f"{drawn_raw}/{row['source']}", row["offset"], row["size"])
        made = to_stored(raw, 256, 227, 90)
        if isinstance(made, Stored):
            pixels.append(made.pixels.reshape(3, -1).astype(np.float64))
    everything = np.concatenate(pixels, axis=1)
    found = shards.load_manifest(drawn_shards).pixels
    assert found.count == everything.shape[1] == 31 * 227 * 227
    np.testing.assert_allclose(found.mean, everything.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(everything, bias=True), rtol=1e-9)


@pytest.mark.parametrize("side", [227, 256, 258, 259])
def test_pixel_sums_are_exact_for_every_side(side):
    white = np.full((3, side, side), 255, np.uint8)
    drawn = np.random.default_rng(side).integers(0, 256, (3, side, side), dtype=np.uint8)
    sums = PixelSums()
    for pixels in (white, drawn):
        sums.add(pixels)
    flat = np.concatenate([white.reshape(3, -1), drawn.reshape(3, -1)], axis=1).astype(np.int64)
    assert sums.to_json() == {
        "count": flat.shape[1],
        "sums": flat.sum(axis=1).tolist(),
        "products": (flat @ flat.T).tolist(),
    }


def test_without_train_the_pixel_statistics_are_those_of_the_first_split(tmp_path):
    raw, out = str(archives(tmp_path / "raw")), str(tmp_path / "out")
    manifest = made_shards(raw, out, plan.Recipe(splits=("val",)))
    assert manifest.document["pixels"]["split"] == "val"
