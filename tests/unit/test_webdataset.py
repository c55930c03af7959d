"""pipelines/sources/webdataset.py: people's labelled tars, and a finished shard set, as RAW."""

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from drawn import A, B, C, encoded, image, imagefolder, jpeg, tar
from labelled_tars import TRAIN, VAL, WNIDS, Files, numbered, sample, timm, written
from made import made_shards

from alexnet.errors import UserError
from pipelines import recount, shards, sources, storage
from pipelines.cli import main
from pipelines.plan import Recipe
from pipelines.verify import verify

BOTH = ("train", "val")


def truth(raw: Path) -> dict[tuple[str, str], tuple[bytes, int, str]]:
    """(tar, key) → image, label of its .cls, split: read by tarfile."""
    found = {}
    for path in sorted(raw.glob("*.tar")):
        with tarfile.open(path) as archive:
            files = {info.name: archive.extractfile(info).read() for info in archive}
        for name, data in files.items():
            key, _, kind = name.partition(".")
            if kind in ("jpg", "png", "webp", "jpeg"):
                split = "train" if "train" in path.name else "val"
                found[path.name, key] = (data, int(files[f"{key}.cls"]), split)
    return found


def scanned(raw: str, source: sources.Source) -> dict[tuple[str, str], tuple[bytes, int, str]]:
    return {
        (row["source"], row["name"].rpartition(".")[0]): (
            storage.read(f"{raw}/{row['source']}", row["offset"], row["size"]),
            row["label"],
            row["split"],
        )
        for row in source.table.to_pylist()
    }


# People's tars


def test_timms_layout_gives_the_images_and_labels_that_tarfile_finds(tmp_path: Path) -> None:
    raw = timm(tmp_path / "raw")
    source = sources.scan(str(raw), BOTH)
    assert scanned(str(raw), source) == truth(raw)
    assert source.wnids == source.class_names == WNIDS
    for row in source.table.to_pylist():
        assert row["wnid"] == WNIDS[row["label"]] and row["key"] == row["name"].split(".")[0]
        assert row["split"] == "val" or row["key"].startswith(row["wnid"])
    assert source.announced == {"train": 8, "val": 3}
    assert (source.accounts.total, source.accounts.used, source.notes) == (4, 4, ())
    assert (source.layout, source.shuffle, source.stored) == ("webdataset", "source", None)


def test_labels_do_not_depend_on_the_splits_asked_for(tmp_path: Path) -> None:
    raw = str(timm(tmp_path / "raw"))
    both = sources.scan(raw, BOTH)
    val = sources.scan(raw, ["val"])
    assert val.table.equals(both.table.slice(8)) and val.wnids == both.wnids
    assert val.accounts.ignored == {"other_splits": 2}


def test_a_build_has_each_image_once_under_its_class(tmp_path: Path) -> None:
    raw, out = timm(tmp_path / "raw"), str(tmp_path / "out")
    manifest = made_shards(str(raw), out, Recipe(samples_per_shard=3))
    assert manifest.document["entries"]["used"] == 4
    stored = {key: label for (_, key), (_, label, _) in truth(Path(out)).items()}
    assert stored == {key: label for (_, key), (_, label, _) in truth(raw).items()}
    assert verify(out, full=True, raw=str(raw)).problems == ()


def test_each_tar_is_indexed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = timm(tmp_path / "raw")
    first = sources.scan(str(raw), BOTH)
    reads: list[str] = []
    read = storage.read
    monkeypatch.setattr(storage, "read", lambda uri, *at: reads.append(uri) or read(uri, *at))
    assert sources.scan(str(raw), BOTH).table.equals(first.table)
    assert not [uri for uri in reads if uri.endswith(".tar")]
    written(raw, VAL, sample("ILSVRC2012_val_00000009", jpeg(9), 2))
    assert sources.scan(str(raw), ["val"], partial=True).table["label"].to_pylist() == [2]


def test_numbers_alone_stay_the_labels_that_they_are(tmp_path: Path) -> None:
    labels = {"a-train.tar": [*range(11)], "a-val.tar": [10, 3]}
    source = sources.scan(str(numbered(tmp_path / "raw", labels)), BOTH)
    assert source.wnids == source.class_names == tuple(f"{n:02d}" for n in range(11))
    assert source.table["label"].to_pylist() == [*range(11), 10, 3]
    assert source.wnids == tuple(sorted(source.wnids))


def test_class_names_are_those_of_the_numbers(tmp_path: Path) -> None:
    labels = {"train_0.tar": [2, 0, 1, 0], "val_0.tar": [1]}
    raw = numbered(tmp_path / "raw", labels, "zebra\ncrane\ncrane\n")
    source = sources.scan(str(raw), BOTH)
    assert (source.wnids, source.class_names) == (("0", "1", "2"), ("zebra", "crane", "crane"))
    assert source.table["label"].to_pylist() == [2, 0, 1, 0, 1]
    named = timm(tmp_path / "timm", class_names=["tench", "jacamar", "yurt"])
    assert sources.scan(str(named), BOTH).class_names == ("tench", "jacamar", "yurt")


def test_holes_in_the_numbers_are_refused_and_with_partial_shift_no_label(tmp_path: Path) -> None:
    raw = str(numbered(tmp_path / "raw", {"train.tar": [0, 3], "val.tar": [3]}))
    with pytest.raises(UserError, match=r"2 of the classes 0 to 3 have no image, first 1; .*--par"):
        sources.scan(raw, BOTH)
    source = sources.scan(raw, BOTH, partial=True)
    assert source.table["label"].to_pylist() == [0, 3, 3] and source.wnids == tuple("0123")


def test_keys_that_several_tars_share_become_unique(tmp_path: Path) -> None:
    labels = {"train-0.tar": [0, 1], "train-1.tar": [1, 0], "val.tar": [0, 1]}
    raw = numbered(tmp_path / "raw", labels)
    source = sources.scan(str(raw), BOTH)
    assert len({(row["split"], row["key"]) for row in source.table.to_pylist()}) == 6
    assert scanned(str(raw), source) == truth(raw)


def test_tars_that_are_sorted_by_class_are_mixed(tmp_path: Path) -> None:
    labels = {"train.tar": [0] * 12 + [1] * 12, "val.tar": [0, 1]}
    assert sources.scan(str(numbered(tmp_path / "raw", labels)), BOTH).shuffle == "classes"


def test_every_kind_of_image_label_and_key_is_read(tmp_path: Path) -> None:
    kinds = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG", "JPG": "JPEG"}
    members = [(f"deep/er/{k}.{k}", encoded(image(), form)) for k, form in kinds.items()]
    members += [(f"deep/er/{k}.json", b'{"label": %d}' % n) for n, k in enumerate(kinds)]
    members += [("deep/er/png.txt", b"a caption"), ("deep/._x.jpg", b"x"), ("README", b"x")]
    raw = imagefolder(tmp_path / "raw", {"my.Train.tar": tar(members)})
    source = sources.scan(str(raw), ["train"])
    found = {row["name"]: row["label"] for row in source.table.to_pylist()}
    assert found == {"png.png": 0, "webp.webp": 1, "jpeg.jpeg": 2, "JPG.JPG": 3}
    assert source.accounts.ignored_members == {"my.Train.tar": 3}
    assert source.notes == (
        "ignored 3 members of 1 tars that are neither images nor labels, first deep/er/png.txt in "
        "my.Train.tar",
    )
    for row in source.table.to_pylist():
        data = storage.read(str(raw / row["source"]), row["offset"], row["size"])
        assert data == dict(members)[f"deep/er/{row['name']}"]


def test_test_images_may_have_no_label(tmp_path: Path) -> None:
    raw = timm(tmp_path / "raw")
    written(raw, "x-test-0.tar", [*sample("t1", jpeg(1)), *sample("t2", jpeg(2), -1)])
    source = sources.scan(str(raw), ["val", "test"])
    rows = source.table.slice(3).to_pylist()
    assert [(row["key"], row["label"], row["wnid"]) for row in rows] == [
        ("t1", -1, ""),
        ("t2", -1, ""),
    ]
    assert source.labels_from["test"] == "none: the images are unlabelled"
    alone = imagefolder(tmp_path / "alone", {"test.tar": tar(sample("t1", jpeg(1)))})
    assert sources.scan(str(alone), ["test"]).wnids == ()


def test_an_independent_count_finds_what_is_overlooked(tmp_path: Path) -> None:
    source = sources.scan(str(timm(tmp_path / "raw")), BOTH)
    assert list(recount.unaccounted(source, BOTH, ())) == []
    fewer = replace(source, table=source.table.slice(1))
    assert list(recount.unaccounted(fewer, BOTH, ())) == [("train", "8 images counted, 7 found")]


def test_a_tar_that_was_unpacked_beside_itself_is_not_another_layout(tmp_path: Path) -> None:
    files = {f"{split}/{w}/{w}_1.JPEG": b"x" for split in BOTH for w in WNIDS}
    source = sources.scan(str(imagefolder(tmp_path, files | {"train.tar": b"x"})), BOTH)
    assert (source.layout, source.accounts.ignored) == ("imagefolder", {"unused": 1})


GOOD = [*sample(f"{A}_1", jpeg(1), 0), *sample(f"{B}_1", jpeg(2), 1)]


def with_info(**changes: Any) -> Callable[[Path], object]:
    """The first train tar of timm's layout as _info.json tells it, but with changes."""

    def make(raw: Path) -> None:
        document = json.loads((raw / "_info.json").read_text())
        document["splits"]["train"] |= changes
        (raw / "_info.json").write_text(json.dumps(document))

    return make


def with_train(members: Files) -> Callable[[Path], object]:
    return lambda raw: (raw / TRAIN).write_bytes(tar(members))


def cut(raw: Path) -> None:
    data = (raw / TRAIN).read_bytes()
    (raw / TRAIN).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_train(sample(f"{A}_1", jpeg())), rf"{A}_1\.jpg has no label \(1 such images\)"),
        (with_train(sample(f"{A}_1", jpeg(), -1)), rf"{A}_1\.jpg has no label"),
        (with_train(sample("x", jpeg(), "tench")), r"x\.cls is 'tench', not the number of a class"),
        (with_train(sample("x", jpeg(), "1.0")), r"x\.cls is '1\.0', not the number"),
        (with_train(sample("x", jpeg(), label="tench")), r"label in .*x\.json is 'tench', not"),
        (with_train(sample("x", jpeg(), label=[1, 2])), r"x\.json is '\[1, 2\]', not the number"),
        (with_train(sample("x", jpeg(), label=True)), r"x\.json is 'True', not the number"),
        (with_train([("x.jpg", jpeg()), ("x.json", b"{")]), r"x\.json is not valid JSON"),
        (with_train(sample("x", jpeg(), 0, label=1)), "x is of two classes, 0 and 1"),
        (
            with_train(sample(f"{A}_1", jpeg(), 0, filename=f"{B}/{B}_1.JPEG")),
            f"{A}_1 is of two classes, {A} and {B}",
        ),
        (
            with_train([*GOOD, ("x.jpg", jpeg()), ("x.png", jpeg()), ("x.cls", b"0")]),
            r"two images in one sample, x\.jpg and x\.png; keep one",
        ),
        (with_train([*GOOD, ("x.cls", b"0")]), "holds a label of x, but no image of it"),
        (with_train([*GOOD, ("x.CLS", b"0"), ("x.cls", b"0")]), r"x\.cls twice"),
        (with_train([("notes.txt", b"x")]), r"holds no image KEY\.jpg"),
        (with_train(sample(f"{A}_1", jpeg(), 1)), f"{A} with label 0.*{A} with label 1"),
        (with_train(sample(f"{C}_9", jpeg(), 0)), f"{A} with label 0.*{C} with label 0"),
        (with_train(sample("n00000001_1", jpeg(), 3)), "labels must be ranks of sorted WNIDs"),
        (with_train(sample("n00000040_1", jpeg(), 9)), "4 classes have images, .* go to 9"),
        (with_train(sample("x", jpeg(), 3)), r"x\.jpg has label 3, and no image .* its WNID"),
        (with_train(GOOD), r"0000\.tar holds 2 images, _info\.json says 4; fetch .* --partial"),
        (with_info(shard_lengths=[3, 4]), r"0000\.tar holds 4 images, _info\.json says 3; fetch"),
        (cut, r"0000\.tar is truncated: .*; fetch it again"),
        (lambda raw: (raw / TRAIN).unlink(), r"0000\.tar of _info\.json is not there \(1 of 3"),
        (lambda raw: (raw / VAL).unlink(), "needs tars with val in their names, not there"),
        (lambda raw: (raw / "_info.json").write_text("[]"), r"_info\.json is not what timm writes"),
        (with_info(shard_lengths=[4]), r"_info\.json is not what timm writes"),
        (with_info(alt_label="other"), r"the labels are 'other' of each JSON"),
    ],
)
def test_what_is_no_sound_set_is_refused_in_one_line_and_nothing_is_written(
    change: Callable[[Path], object],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw, out = timm(tmp_path / "raw"), tmp_path / "out"
    change(raw)
    with pytest.raises(UserError, match=reason) as refused:
        sources.scan(str(raw), BOTH)
    assert "\n" not in str(refused.value)
    assert main(["build", "--raw", str(raw), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"error: {refused.value}\n" and not out.exists()


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([0, 1, 2], r"00002\.jpg has label 2, but there are names of 2 classes"),
        ([0], "1 of the classes 0 to 1 have no image, first 1"),
    ],
)
def test_numbers_and_names_must_fit(labels: list[int], reason: str, tmp_path: Path) -> None:
    raw = numbered(tmp_path / "raw", {"train.tar": labels, "val.tar": [0]}, "cat\ndog\n")
    with pytest.raises(UserError, match=reason):
        sources.scan(str(raw), BOTH)


# A finished set of this program


@pytest.fixture
def copied(drawn_shards: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn_shards, tmp_path / "set"))


def test_every_row_is_the_jpeg_that_tarfile_extracts_with_its_label(drawn_shards: str) -> None:
    source = sources.scan(drawn_shards, BOTH)
    expected = {}
    for path in Path(drawn_shards).glob("*.tar"):
        with tarfile.open(path) as tar:
            files = {info.name: tar.extractfile(info).read() for info in tar}
        for name, data in files.items():
            if name.endswith(".jpg"):
                label = int(files[name.replace(".jpg", ".cls")])
                expected[path.name, name] = (data, label, path.name.split("-")[0])
    found = {}
    for row in source.table.to_pylist():
        data = storage.read(f"{drawn_shards}/{row['source']}", row["offset"], row["size"])
        found[row["source"], row["name"]] = (data, row["label"], row["split"])
    assert found == expected


def test_geometry_classes_and_origin_come_from_the_manifest(drawn_shards: str) -> None:
    source = sources.scan(drawn_shards, ["val"])
    manifest = shards.load_manifest(drawn_shards)
    assert source.stored == sources.StoredAs(256, 227, 90, manifest.digest)
    assert source.shuffle == "source"
    assert (source.wnids, source.class_names) == (manifest.wnids, manifest.class_names)
    assert source.announced == {"val": manifest.num_samples("val")} == {"val": source.count("val")}
    assert source.labels_from["val"].startswith(f"shard set {manifest.digest[:12]}, there: number")
    assert source.containers == tuple(
        (f"{shard.name}.tar", Path(drawn_shards, f"{shard.name}.tar").stat().st_size)
        for shard in manifest.split_shards("val")
    )
    assert "1 images were rejected" in source.notes[0]  # demo-raw draws one that is cut


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_tar_of_another_size_is_refused_with_the_remedy(copied: Path, damage: str) -> None:
    tar = copied / "train-000001.tar"
    data = tar.read_bytes()
    tar.unlink()
    if damage == "cut":
        tar.write_bytes(data[:-512])
    found = f"{len(data) - 512:,} bytes" if damage == "cut" else "not there"
    with pytest.raises(UserError, match=rf"{tar.name} is {found}, .* {len(data):,} .*verify .*rep"):
        sources.scan(str(copied), BOTH)
    assert sources.scan(str(copied), ["val"]).count("val") > 0


def test_an_index_that_contradicts_the_manifest_is_refused(copied: Path) -> None:
    path = copied / "index" / "train.parquet"
    index = shards.load_index(str(copied), "train")
    swapped = index.set_column(1, "label", pa.array(index["label"].to_pylist()[::-1]))
    for wrong in (swapped, index.slice(1), index.take([*range(len(index)), 0])):
        path.write_bytes(shards.parquet_bytes(wrong))
        with pytest.raises(UserError, match=r"index/train\.parquet contradicts manifest\.json"):
            sources.scan(str(copied), BOTH)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"index/train\.parquet is damaged"):
        sources.scan(str(copied), BOTH)


def test_an_unfinished_set_and_an_absent_split_are_refused(copied: Path) -> None:
    with pytest.raises(UserError, match="needs test shards, not there"):
        sources.scan(str(copied), ["train", "test"])
    (copied / "manifest.json").unlink()
    with pytest.raises(UserError, match="no finished shard set"):
        sources.scan(str(copied), BOTH)
