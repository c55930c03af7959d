"""pipelines/finish.py, and sets that are repaired or were left half done: which shards count as
finished, and the undisturbed set in the end."""

import os
import shutil
import socket
from pathlib import Path

import pytest
from drawn import A, B, encoded, image, imagefolder, jpeg
from made import contents, made_shards

from alexnet.errors import UserError
from pipelines import build, finish, plan, plan_files, shards, sidecars, sources
from pipelines.cli import main
from pipelines.plan import Recipe
from pipelines.progress import BuildFailed, MaxRejected
from pipelines.write_shard import codec_versions, write_shard

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.mark.parametrize("name", codec_versions())
def test_shards_that_other_codecs_made_do_not_count(name, drawn_shards, monkeypatch):
    made = plan_files.load(drawn_shards)
    done, missing = finish.finished_shards(drawn_shards, made)
    assert ([shard for shard, _ in done], missing) == ([*made.shards], {})
    monkeypatch.setattr(finish, "codec_versions", lambda: codec_versions() | {name: "0.1"})
    done, missing = finish.finished_shards(drawn_shards, made)
    assert done == [] and len(missing) == len(made.shards)
    assert {why.partition(" (")[0] for why in missing.values()} == {finish.OTHER_CODECS}


def other_images(sidecar: Path) -> None:
    rows, status = sidecars.unpack(sidecar.read_bytes())
    sidecar.write_bytes(sidecars.pack(rows, status | {"shard_id": "0" * 64}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


TAR_OR_INDEX = "its tar or index was damaged or gone"


@pytest.mark.parametrize(
    ("file", "damage", "why"),
    [
        ("_meta/train-000001.parquet", Path.unlink, finish.NOT_MADE),
        ("_meta/train-000001.parquet", cut, "its sidecar was damaged"),
        ("_meta/train-000001.parquet", other_images, "it held other images"),
        ("train-000001.tar", cut, TAR_OR_INDEX),
        ("train-000001.tar", Path.unlink, TAR_OR_INDEX),
        ("train-000001.idx", Path.unlink, TAR_OR_INDEX),
    ],
)
def test_a_shard_counts_only_with_its_own_sidecar_tar_and_index(copy, file, damage, why):
    damage(copy / file)
    done, missing = finish.finished_shards(str(copy), plan_files.load(str(copy)))
    assert missing == {1: why}
    names = [shard.name for shard, _ in done]
    assert len(names) == 5 and "train-000001" not in names


def test_a_set_of_other_codecs_is_not_repaired_by_halves(copy, drawn_raw, monkeypatch):
    (copy / "train-000001.tar").write_bytes(b"cut")
    before = contents(str(copy))
    monkeypatch.setattr(finish, "codec_versions", lambda: codec_versions() | {"pillow": "0.1"})
    with pytest.raises(UserError, match=r"other codecs had made it .* install those versions, or"):
        build.repair(str(copy), ["train-000001.tar"], drawn_raw)
    assert contents(str(copy)) == before


def test_a_class_of_which_nothing_can_be_read_is_refused_or_recorded(tmp_path):
    bad = {f"train/b/b{n}.jpg": b"<html>" for n in range(3)}
    good = {f"train/a/a{n}.jpg": jpeg(n) for n in range(9)}
    raw, no_limit = str(imagefolder(tmp_path / "raw", good | bad)), MaxRejected(share=1.0)

    def made(out: str, partial: bool) -> plan.Plan:
        """With all its shards, and not finished."""
        recipe = plan.Recipe(splits=("train",), partial=partial)
        made = plan.make(sources.scan(raw, recipe.splits, partial), recipe)
        made = plan_files.begin(out, raw, made)
        write_shard(build.job_for(made, raw, out), 0, "train-000000", made.shards[0].id)
        return made

    whole, part = str(tmp_path / "whole"), str(tmp_path / "part")
    named = r"of 1 class no image can be read: train/b \(3 images\); repair .* --partial"
    with pytest.raises(BuildFailed, match=named):
        build.build(made(whole, False), raw, whole, max_rejected=no_limit)
    assert not Path(whole, "manifest.json").exists()
    manifest = build.build(made(part, True), raw, part, max_rejected=no_limit)
    assert manifest.document["lost_classes"] == {"train/b": 3}
    assert manifest.wnids == ("a", "b")
    assert shards.load_manifest(part) == manifest


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
        (),
    ],
)
def test_what_is_damaged_is_rebuilt_and_nothing_else(drawn_shards, copy, capsys, damaged):
    for name in damaged:
        data = bytearray((copy / name).read_bytes())
        # In a page of a parquet file: their footers have no checksum of their own.
        data[min(200, len(data) // 2)] ^= 255
        (copy / name).write_bytes(data)
    again = {name.removeprefix("_meta/").split(".")[0] for name in damaged}  # shards of theirs
    kept = {path: path.stat().st_mtime_ns for path in copy.glob("*.tar") if path.stem not in again}
    assert main(["verify", str(copy), "--full"]) == (1 if damaged else 0)
    assert main(["verify", str(copy), "--full", "--repair"]) == 0, capsys.readouterr()
    assert contents(str(copy)) == contents(drawn_shards)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_repair_from_other_images_is_told_by_another_identity(drawn_raw, copy, tmp_path, capsys):
    raw = shutil.copytree(drawn_raw, tmp_path / "raw")
    (copy / "train-000001.tar").write_bytes(b"cut")
    index = shards.load_index(str(copy), "train").to_pylist()
    row = next(row for row in index if row["shard"] == "train-000001")
    archive, start = bytearray((raw / row["source"]).read_bytes()), row["source_offset"]
    other = encoded(image(seed=99))[: row["source_size"]].ljust(row["source_size"], b"\0")
    archive[start : start + row["source_size"]] = other
    (raw / row["source"]).write_bytes(archive)
    assert main(["verify", str(copy), "--repair", "--raw", str(raw)]) == 1
    assert "but not the data set that it was" in capsys.readouterr().err


def test_mended_images_are_taken_in_and_nothing_else_that_changed(tmp_path, capsys):
    names = [f"{split}/{w}/{w}_{split}" for split in ("train", "val") for w in (A, B)]
    good = {f"{name}{n}.JPEG": jpeg(n) for name in names for n in range(4)}
    cut = f"train/{A}/{A}_train2.JPEG"
    bad = {cut: good[cut][:400], f"val/{B}/{B}_val0.JPEG": b""}
    raw, out, fresh = (tmp_path / name for name in ("raw", "out", "fresh"))
    imagefolder(raw, good | bad)
    argv = ["build", "--raw", str(raw), "--out", str(out), "--samples-per-shard", "4"]
    assert main([*argv, "--max-rejected", "2"]) == 0
    kept = (out / "train-000000.tar").stat().st_mtime_ns  # the cut one lies in the other
    (raw / cut).write_bytes(good[cut])
    capsys.readouterr()
    assert main(argv) == 2
    assert "source.table_sha256" in capsys.readouterr().err
    assert main([*argv, "--max-rejected", "2", "--retry-quarantined"]) == 0
    made_shards(str(raw), str(fresh), Recipe(samples_per_shard=4))
    assert contents(str(out)) == contents(str(fresh))
    assert shards.load_manifest(str(out)).document["rejected"] == {"zero_bytes": 1}
    assert (out / "train-000000.tar").stat().st_mtime_ns == kept
    imagefolder(raw, {f"{names[0]}0.JPEG": jpeg(50), f"val/{B}/{B}_val0.JPEG": jpeg(51)})
    assert main([*argv, "--retry-quarantined"]) == 2
    assert "more has changed than quarantined images" in capsys.readouterr().err
    assert contents(str(out)) == contents(str(fresh))


def build_of(raw: str, out: Path) -> list[str]:
    """The command that makes `drawn_shards`."""
    flags = ["--samples-per-shard", "8", "--max-rejected", "1"]
    return ["build", "--raw", raw, "--out", str(out), *flags]


def test_stopped_repair_goes_on_and_no_build_takes_the_damage(
    drawn_raw, drawn_shards, copy, capsys
):
    """It got as far as the manifest."""
    tar = copy / "train-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    for gone in ("_meta/train-000002.parquet", "manifest.json"):
        (copy / gone).unlink()
    assert main(build_of(drawn_raw, copy)) == 1
    told = "train-000002.tar already exists with different contents; delete it"
    assert told in capsys.readouterr().err
    assert main(["verify", str(copy), "--full", "--repair"]) == 0
    assert contents(str(copy)) == contents(drawn_shards)


def test_unfinished_set_is_ended_by_its_build_alone(drawn_raw, drawn_shards, tmp_path, capsys):
    """Only the build command knows how many rejected images are a success."""
    out = tmp_path / "out"
    argv = build_of(drawn_raw, out)
    assert main([*argv, "--only", "0-3"]) == 0
    assert main(["verify", str(out), "--repair"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out}: no finished shard set")
    (out / "_meta" / "plan.json").unlink()
    assert main([*argv, "--seed", "7"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out} is not empty")
    assert not (out / "_meta" / "plan.json").exists()
    assert main(argv) == 0
    assert "4 of 6 shards are already there" in capsys.readouterr().out
    assert contents(str(out)) == contents(drawn_shards)


def test_what_killed_writers_left_is_removed_when_a_command_starts(drawn_raw, copy, tmp_path):
    """At its end would be too late: a disk that is nearly full would fill up with it."""
    raw, host, nobody = tmp_path / "raw", socket.gethostname(), 2**22 + 1
    drawing = ["demo-raw", str(raw), "--classes", "2", "--per-class", "2", "--val-per-class", "1"]
    commands = {copy: build_of(drawn_raw, copy), copy / "report": ["report", str(copy)]}
    for folder, argv in (commands | {raw: drawing}).items():
        folder.mkdir(exist_ok=True)
        others = [f"{host}~{os.getpid()}~file.x", f"elsewhere~{nobody}~file.x", "some~thing"]
        dead, *alive = (folder / f".{name}.tmp" for name in (f"{host}~{nobody}~file.x", *others))
        for path in (dead, *alive):
            path.write_bytes(b"half")
        assert main(argv) == 0
        assert not dead.exists() and all(path.exists() for path in alive)
