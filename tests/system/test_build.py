"""pipelines/build.py with a real Ray: same bytes from any number of workers, resume, failures."""

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from drawn import archives
from made import contents, started
from waiting import wait_until

from pipelines import build, plan, plan_files, shards, sidecars, sources, storage
from pipelines.cli import main
from pipelines.progress import BuildFailed, MaxRejected

# Ray Data warns of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
FIVE_PERCENT = MaxRejected(share=0.05)
EIGHT = plan.Recipe(samples_per_shard=8)


def built(raw: str, out: str, recipe: plan.Recipe = EIGHT, **how: Any) -> shards.Manifest | None:
    made = plan.make(sources.scan(raw, recipe.splits, recipe.partial), recipe)
    plan_files.begin(out, raw, made)
    return build.build(made, raw, out, max_rejected=FIVE_PERCENT, **how)


def test_one_and_four_workers_and_no_ray_at_all_give_the_same_bytes(
    local_ray, drawn_raw, drawn_shards, tmp_path
):
    one, four = str(tmp_path / "one"), str(tmp_path / "four")
    built(drawn_raw, one, on=build.OnRay(workers=1))
    built(drawn_raw, four, on=build.OnRay(workers=4))
    assert contents(one) == contents(four) == contents(drawn_shards)


def test_only_shards_that_are_missing_damaged_or_of_other_codecs_are_built_again(
    local_ray, drawn_raw, drawn_shards, copy, capsys
):
    (copy / "manifest.json").unlink()
    (copy / "_meta" / "train-000000.parquet").unlink()  # killed before the sidecar
    (copy / "train-000001.tar").write_bytes(b"cut")
    (copy / "_meta" / "train-000002.parquet").write_bytes(b"no sidecar")
    within = copy / "_meta" / "val-000000.parquet"  # among its rows, which are read at the end
    within.write_bytes(within.read_bytes()[:40] + b"\0" * 40 + within.read_bytes()[80:])
    other = copy / "_meta" / "val-000001.parquet"
    rows, status = sidecars.unpack(other.read_bytes())
    status["versions"]["pillow"] = "0.1"
    other.write_bytes(sidecars.pack(rows, status))
    kept = copy / "train-000003.tar"
    before = kept.stat().st_mtime_ns
    built(drawn_raw, str(copy))
    assert contents(str(copy)) == contents(drawn_shards)
    assert kept.stat().st_mtime_ns == before
    err = capsys.readouterr().err
    assert "val-000001: rebuilt, because other codecs had made it" in err
    assert "val-000000: rebuilt, because its sidecar was damaged" in err


def test_a_cluster_reads_every_byte_and_finds_what_one_machine_finds(local_ray, copy, capsys):
    tar, listed = copy / "train-000001.tar", copy / "_meta" / "val-000001.parquet"
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)
    listed.write_bytes(b"no sidecar")
    (copy / "val-000000.tar").unlink()
    command, said = ["verify", str(copy), "--full"], list[str]()
    for on in ([], ["--address", "auto", "--workers", "2"]):
        assert main([*command, *on]) == 1
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "bytes have another sha256" in said[0]


def test_everybody_can_check_the_sums(drawn_shards, copy):
    command = ["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"]
    assert subprocess.run(command, cwd=drawn_shards, capture_output=True).returncode == 0
    (copy / "val-000000.tar").write_bytes(b"")
    assert subprocess.run(command, cwd=copy, capture_output=True).returncode == 1


def test_from_s3_to_s3_is_the_same_as_on_disk(local_ray, s3, drawn_raw, drawn_shards):
    for name, _ in storage.list_files(drawn_raw):
        storage.write(f"{s3}/raw/{name}", Path(drawn_raw, name).read_bytes())
    manifest = built(f"{s3}/raw", f"{s3}/out")
    assert contents(f"{s3}/out") == contents(drawn_shards)
    assert shards.load_manifest(f"{s3}/out") == manifest
    assert shards.load_index(f"{s3}/out", "val").equals(shards.load_index(drawn_shards, "val"))


def test_a_failing_task_fails_the_build_with_its_shard_and_the_rest_resumes(local_ray, tmp_path):
    raw, out = archives(tmp_path / "raw"), str(tmp_path / "out")
    recipe = plan.Recipe(samples_per_shard=3, splits=("train",))
    made = plan.make(sources.scan(str(raw), recipe.splits), recipe)
    plan_files.begin(out, str(raw), made)
    whole = (raw / "ILSVRC2012_img_train.tar").read_bytes()
    (raw / "ILSVRC2012_img_train.tar").write_bytes(whole[:3000])  # cut behind the plan's back
    with pytest.raises(BuildFailed, match=r"^shard train-00000[01]: .* has changed: .* continues"):
        build.build(made, str(raw), out, max_rejected=FIVE_PERCENT)
    (raw / "ILSVRC2012_img_train.tar").write_bytes(whole)
    manifest = built(str(raw), out, recipe)  # the same plan again
    assert (manifest.plan_id, manifest.num_samples("train")) == (made.plan_id, 6)


def test_single_shards_first_and_the_rest_later_is_the_same_set(
    local_ray, drawn_raw, drawn_shards, tmp_path
):
    out = str(tmp_path / "out")
    for _ in range(2):  # the second time there is nothing to do
        assert built(drawn_raw, out, only={1, 4}) is None
        made = {name for name, _ in storage.list_files(out) if name.endswith(".tar")}
        assert made == {"train-000001.tar", "val-000000.tar"}
    assert built(drawn_raw, out, only={0, 2, 3, 5}) is not None
    assert contents(out) == contents(drawn_shards)


def test_ctrl_c_says_how_to_continue_and_exits_130(local_ray, drawn_raw, tmp_path):
    flags = ["--raw", drawn_raw, "--samples-per-shard", "1", "--workers", "1"]
    for attempt in range(5):
        out = tmp_path / f"out{attempt}"
        argv = ["build", *flags, "--out", str(out), "--max-rejected", "3%"]
        run = started(argv, tmp_path, {"RAY_ADDRESS": local_ray})
        first = out / "train-000000.tar"
        wait_until(lambda run=run, first=first: first.exists() or run.poll() is not None)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=120)
        if run.returncode != 0:  # a busy machine may be too late for so short a build
            break
    assert run.returncode == 130, errors
    assert "the same command continues" in errors.splitlines()[-1]
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.tmp"))
