"""pipelines/build.py with a real Ray: same bytes from any number of workers, resume, failures."""

import json
from pathlib import Path

import numpy as np
import pytest
from drawn import A, B, C, archives, imagefolder, jpeg, tar
from made import contents

from alexnet.errors import UserError
from pipelines import build, plan, plan_files, shards, sources, storage
from pipelines.progress import BuildFailed, MaxRejected
from pipelines.transform import Stored, to_stored
from pipelines.write_shard import _PixelSums, write_shard

# Ray Data warns of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
FIVE_PERCENT = MaxRejected(share=0.05)


def built(
    raw: str,
    out: str,
    recipe: plan.Recipe,
    limit: MaxRejected = FIVE_PERCENT,
    workers: int | None = None,
    only: set[int] | None = None,
) -> shards.Manifest | None:
    made = plan.make(sources.scan(raw, recipe.splits, recipe.partial), recipe)
    plan_files.begin(out, raw, made)
    return build.build(made, raw, out, max_rejected=limit, workers=workers, only=only)


EIGHT = plan.Recipe(samples_per_shard=8)


def test_one_and_four_workers_and_no_ray_at_all_give_the_same_bytes(
    local_ray: str, drawn_raw: str, drawn_shards: str, tmp_path: Path
) -> None:
    one, four = str(tmp_path / "one"), str(tmp_path / "four")
    built(drawn_raw, one, EIGHT, workers=1)
    built(drawn_raw, four, EIGHT, workers=4)
    assert contents(one) == contents(four) == contents(drawn_shards)


def test_only_missing_or_damaged_shards_are_built_again_with_the_same_bytes(
    local_ray: str, drawn_raw: str, drawn_shards: str, tmp_path: Path
) -> None:
    for name, data in contents(drawn_shards).items():
        storage.write(f"{tmp_path}/{name}", data)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "_meta" / "train-000000.parquet").unlink()  # killed before the sidecar
    (tmp_path / "train-000001.tar").write_bytes(b"cut")
    (tmp_path / "_meta" / "train-000002.parquet").write_bytes(b"no sidecar")
    kept = {
        name: (tmp_path / name).stat().st_mtime_ns
        for name in ("train-000003.tar", "val-000000.tar")
    }
    built(drawn_raw, str(tmp_path), EIGHT)
    assert contents(str(tmp_path)) == contents(drawn_shards)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept


def test_from_s3_to_s3_is_the_same_as_on_disk(
    local_ray: str, s3: str, drawn_raw: str, drawn_shards: str
) -> None:
    for name, _ in storage.list_files(drawn_raw):
        storage.write(f"{s3}/raw/{name}", Path(drawn_raw, name).read_bytes())
    manifest = built(f"{s3}/raw", f"{s3}/out", EIGHT)
    assert contents(f"{s3}/out") == contents(drawn_shards)
    assert shards.load_manifest(f"{s3}/out") == manifest
    assert shards.load_index(f"{s3}/out", "val").equals(shards.load_index(drawn_shards, "val"))


def test_a_failing_task_fails_the_build_with_its_shard_and_the_rest_resumes(
    local_ray: str, tmp_path: Path
) -> None:
    raw, out = archives(tmp_path / "raw"), str(tmp_path / "out")
    recipe = plan.Recipe(samples_per_shard=3, splits=("train",))
    made = plan.make(sources.scan(str(raw), recipe.splits), recipe)
    plan_files.begin(out, str(raw), made)
    whole = (raw / "ILSVRC2012_img_train.tar").read_bytes()
    (raw / "ILSVRC2012_img_train.tar").write_bytes(whole[:3000])  # cut behind the plan's back
    with pytest.raises(BuildFailed, match=r"^shard train-00000[01]: .* has changed: .* continues"):
        build.build(made, str(raw), out, max_rejected=FIVE_PERCENT)
    (raw / "ILSVRC2012_img_train.tar").write_bytes(whole)
    again = plan.make(sources.scan(str(raw), recipe.splits), recipe)  # as the same command does
    assert again.plan_id == made.plan_id
    manifest = build.build(again, str(raw), out, max_rejected=FIVE_PERCENT)
    assert manifest.num_samples("train") == 6


def test_too_many_rejected_images_fail_with_share_and_examples_and_no_manifest(
    local_ray: str, tmp_path: Path
) -> None:
    names = [(f"{A}_1.JPEG", jpeg(1)), (f"{A}_2.JPEG", b""), (f"{A}_3.JPEG", b"<html>")]
    raw = str(archives(tmp_path / "raw", train=tar([(f"{A}.tar", tar(names))]), devkit=None))
    out, recipe = str(tmp_path / "out"), plan.Recipe(splits=("train",), partial=True)
    with pytest.raises(BuildFailed) as failure:
        built(raw, out, recipe, MaxRejected(number=1))
    for part in ("2 of 3 images (67%)", f"{A}_2 (zero_bytes), {A}_3 (not_an_image)"):
        assert part in str(failure.value)
    assert not storage.exists(f"{out}/manifest.json")

    manifest = built(raw, out, recipe, MaxRejected(share=0.7))
    assert manifest.document["totals"]["train"]["samples"] == 1
    assert manifest.document["rejected"] == {"zero_bytes": 1, "not_an_image": 1}
    listed = [
        json.loads(line)
        for line in storage.read(f"{out}/quarantine/train.jsonl").split(b"\n")
        if line
    ]
    assert [(entry["key"], entry["reason"]) for entry in listed] == [
        (f"{A}_2", "zero_bytes"),
        (f"{A}_3", "not_an_image"),
    ]
    assert storage.read(f"{out}/quarantine/train/{A}_3.bin") == b"<html>"


def test_a_class_of_which_nothing_can_be_read_is_refused_or_recorded(tmp_path: Path) -> None:
    bad = {f"train/b/b{n}.jpg": b"<html>" for n in range(3)}
    good = {f"train/a/a{n}.jpg": jpeg(n) for n in range(9)}
    raw = str(imagefolder(tmp_path / "raw", good | bad))
    for partial in (False, True):
        out, recipe = (
            str(tmp_path / f"out{partial}"),
            plan.Recipe(splits=("train",), partial=partial),
        )
        made = plan.make(sources.scan(raw, recipe.splits, partial), recipe)
        made = plan_files.begin(out, raw, made)
        write_shard(build.job_for(made, raw, out), 0, "train-000000", made.shards[0].id)
        if not partial:
            named = r"of 1 class no image can be read: train/b \(3 images\); repair .* --partial"
            with pytest.raises(BuildFailed, match=named):
                build.build(made, raw, out, max_rejected=MaxRejected(share=1.0))
            assert not storage.exists(f"{out}/manifest.json")
    manifest = build.build(made, raw, out, max_rejected=MaxRejected(share=1.0))
    assert manifest.document["lost_classes"] == {"train/b": 3}
    assert manifest.wnids == ("a", "b")


def test_single_shards_first_and_the_rest_later_is_the_same_set(
    local_ray: str, drawn_raw: str, drawn_shards: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    assert built(drawn_raw, out, EIGHT, only={1, 4}) is None
    made = {name for name, _ in storage.list_files(out) if name.endswith(".tar")}
    assert made == {"train-000001.tar", "val-000000.tar"}
    assert built(drawn_raw, out, EIGHT, only={1, 4}) is None  # nothing to do, and no Ray needed
    assert built(drawn_raw, out, EIGHT, only={0, 2, 3, 5}) is not None
    assert contents(out) == contents(drawn_shards)


def test_several_nodes_with_local_paths_are_refused_unless_shared(
    local_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}, {"Alive": True}])
    raw, out = str(archives(tmp_path / "raw")), str(tmp_path / "out")
    with pytest.raises(UserError, match="--shared-fs"):
        built(raw, out, plan.Recipe(splits=("train",)))


def test_pixel_statistics_are_those_of_the_train_pixels_before_encoding(
    drawn_raw: str, drawn_shards: str
) -> None:
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


@pytest.mark.parametrize("side", [227, 256, 258, 400])
def test_pixel_sums_are_exact_for_every_side(side: int) -> None:
    white = np.full((3, side, side), 255, np.uint8)
    drawn = np.random.default_rng(side).integers(0, 256, (3, side, side), dtype=np.uint8)
    sums = _PixelSums()
    for pixels in (white, drawn):
        sums.add(pixels)
    flat = np.concatenate([white.reshape(3, -1), drawn.reshape(3, -1)], axis=1).astype(np.int64)
    assert sums.to_json() == {
        "count": flat.shape[1],
        "sums": flat.sum(axis=1).tolist(),
        "products": (flat @ flat.T).tolist(),
    }


def test_labels_reach_the_shards(local_ray: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    built(str(archives(tmp_path / "raw")), out, plan.Recipe(splits=("val",)))
    rows = shards.load_index(out, "val").to_pylist()
    assert {row["key"][-1]: row["wnid"] for row in rows} == {"1": B, "2": C, "3": A}
    assert {row["wnid"]: row["label"] for row in rows} == {A: 0, B: 1, C: 2}
    assert shards.load_manifest(out).document["pixels"]["split"] == "val"
