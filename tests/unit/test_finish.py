"""pipelines/finish.py: which shards count as finished, and what is made of them."""

from pathlib import Path

import pytest
from drawn import imagefolder, jpeg
from made import contents

from alexnet.errors import UserError
from pipelines import build, finish, plan, plan_files, shards, sources
from pipelines.progress import BuildFailed, MaxRejected
from pipelines.write_shard import codec_versions, write_shard


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
    rows, status = shards.unpack_sidecar(sidecar.read_bytes())
    sidecar.write_bytes(shards.pack_sidecar(rows, status | {"shard_id": "0" * 64}))


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
