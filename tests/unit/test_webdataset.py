"""pipelines/sources/webdataset.py: people's labelled tars, and a finished shard set, as RAW."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from drawn import A, B, C, encoded, image, imagefolder, jpeg, tar
from labelled_tars import TRAIN, VAL, WNIDS, Files, numbered, sample, timm, written

from alexnet.errors import UserError
from pipelines import shards, sources, storage
from pipelines.sources import tars
from pipelines.sources.table import order_that_mixes

BOTH = ("train", "val")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return timm(tmp_path / "raw")


def truth(raw: Path | str) -> dict[tuple[str, str], tuple[bytes, int, str]]:
    """(tar, key) → image, label of its .cls, split: read by tarfile."""
    found = {}
    for path in sorted(Path(raw).glob("*.tar")):
        with tarfile.open(path) as archive:
            files = {info.name: archive.extractfile(info).read() for info in archive}
        split = "train" if "train" in path.name else "val"
        for key in {name.partition(".")[0] for name in files}:
            found[path.name, key] = (files[f"{key}.jpg"], int(files[f"{key}.cls"]), split)
    return found


def scanned(raw: Path | str, source: sources.Source) -> dict[tuple[str, str], Any]:
    return {
        (row["source"], row["name"].rpartition(".")[0]): (
            storage.read(f"{raw}/{row['source']}", row["offset"], row["size"]),
            row["label"],
            row["split"],
        )
        for row in source.table.to_pylist()
    }


# People's tars


def test_timms_layout_gives_the_images_and_labels_that_tarfile_finds(raw):
    source = sources.scan(str(raw), BOTH)
    assert scanned(raw, source) == truth(raw)
    assert source.wnids == source.class_names == WNIDS
    for row in source.table.to_pylist():
        assert row["wnid"] == WNIDS[row["label"]] and row["key"] == row["name"].split(".")[0]
        assert row["split"] == "val" or row["key"].startswith(row["wnid"])
    assert source.announced == {"train": 8, "val": 3}
    assert (source.accounts.total, source.accounts.used, source.notes) == (4, 4, ())
    assert (source.layout, source.shuffle, source.stored) == ("webdataset", "source", None)
    val = sources.scan(str(raw), ["val"])  # labels do not depend on the splits asked for
    assert val.table.equals(source.table.slice(8)) and val.wnids == source.wnids
    assert val.accounts.ignored == {"other_splits": 2}


def test_each_tar_is_indexed_once(raw, home, monkeypatch):
    first = sources.scan(str(raw), BOTH)
    with monkeypatch.context() as patch:
        patch.setattr(tars, "members", lambda *_, **__: pytest.fail("read again"))
        assert sources.scan(str(raw), BOTH).table.equals(first.table)
    written(raw, VAL, sample("ILSVRC2012_val_00000009", jpeg(9), 2))
    assert sources.scan(str(raw), ["val"], partial=True).table["label"].to_pylist() == [2]


def test_numbers_alone_stay_the_labels_that_they_are(tmp_path):
    labels = {"a-train.tar": [*range(11)], "a-val.tar": [10, 3]}
    source = sources.scan(str(numbered(tmp_path, labels)), BOTH)
    assert source.wnids == source.class_names == tuple(f"{n:02d}" for n in range(11))
    assert source.table["label"].to_pylist() == [*range(11), 10, 3]


def test_class_names_are_those_of_the_numbers(tmp_path):
    labels = {"train_0.tar": [2, 0, 1, 0], "val_0.tar": [1]}
    source = sources.scan(str(numbered(tmp_path, labels, "zebra\ncrane\ncrane\n")), BOTH)
    assert (source.wnids, source.class_names) == (("0", "1", "2"), ("zebra", "crane", "crane"))
    assert source.table["label"].to_pylist() == [2, 0, 1, 0, 1]
    named = timm(tmp_path / "timm", class_names=["tench", "jacamar", "yurt"])
    assert sources.scan(str(named), BOTH).class_names == ("tench", "jacamar", "yurt")


@pytest.mark.parametrize(
    ("labels", "names", "reason"),
    [
        ([0, 1, 2], "cat\ndog\n", r"00002\.jpg has label 2, but there are names of 2 classes"),
        ([0], "cat\ndog\n", "1 of the classes 0 to 1 have no image, first 1"),
        ([0, 3], "", r"2 of the classes 0 to 3 have no image, first 1; .*--partial"),
    ],
)
def test_numbers_and_names_must_fit(labels, names, reason, tmp_path):
    raw = numbered(tmp_path, {"train.tar": labels, "val.tar": [0]}, names)
    with pytest.raises(UserError, match=reason):
        sources.scan(str(raw), BOTH)
    if not names:
        source = sources.scan(str(raw), BOTH, partial=True)  # no label is shifted
        assert source.table["label"].to_pylist() == [0, 3, 0] and source.wnids == tuple("0123")


def test_keys_that_several_tars_share_become_unique(tmp_path):
    labels = {"train-0.tar": [0, 1], "train-1.tar": [1, 0], "val.tar": [0, 1]}
    source = sources.scan(str(numbered(tmp_path, labels)), BOTH)
    assert len({(row["split"], row["key"]) for row in source.table.to_pylist()}) == 6
    assert scanned(tmp_path, source) == truth(tmp_path)


def test_tars_that_are_sorted_by_class_are_mixed(tmp_path):
    labels = {"train.tar": [0] * 12 + [1] * 12, "val.tar": [0, 1]}
    assert sources.scan(str(numbered(tmp_path, labels)), BOTH).shuffle == "classes"


def of_labels(labels: np.ndarray, split: str = "train") -> pa.Table:
    return pa.table({"split": [split] * len(labels), "label": labels})


@pytest.mark.parametrize("classes", [2, 10, 300])
def test_the_order_of_a_source_is_kept_only_where_it_mixes_the_classes(classes):
    """In a random order, which has to be kept; in a round, as even as can be; sorted; and in groups
    of classes that are mixed within each alone, as with one tar for every few classes."""
    labels, rng = np.arange(6000) % classes, np.random.default_rng(0)
    for _ in range(50):
        assert order_that_mixes(of_labels(rng.permutation(labels))) == "source"
    assert order_that_mixes(of_labels(labels)) == "source"
    assert order_that_mixes(of_labels(np.sort(labels))) == "classes"
    assert order_that_mixes(of_labels(np.sort(labels), split="val")) == "source"
    if classes > 2:
        half = labels < classes // 2
        groups = [rng.permutation(labels[part]) for part in (half, ~half)]
        assert order_that_mixes(of_labels(np.concatenate(groups))) == "classes"


def test_every_kind_of_image_label_and_key_is_read(tmp_path):
    kinds = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG", "JPG": "JPEG"}
    members = [(f"deep/er/{k}.{k}", encoded(image(), form)) for k, form in kinds.items()]
    members += [(f"deep/er/{k}.json", b'{"label": %d}' % n) for n, k in enumerate(kinds)]
    members += [("deep/er/png.txt", b"a caption"), ("deep/._x.jpg", b"x"), ("README", b"x")]
    raw = imagefolder(tmp_path, {"my.Train.tar": tar(members)})
    source = sources.scan(str(raw), ["train"])
    for n, (row, kind) in enumerate(zip(source.table.to_pylist(), kinds, strict=True)):
        assert (row["name"], row["label"]) == (f"{kind}.{kind}", n)
        data = storage.read(str(raw / row["source"]), row["offset"], row["size"])
        assert data == dict(members)[f"deep/er/{row['name']}"]
    assert source.accounts.ignored_members == {"my.Train.tar": 3}
    told = "ignored 3 members of 1 tars that are neither images nor labels, first deep/er/png.txt"
    assert source.notes == (f"{told} in my.Train.tar",)


def test_test_images_may_have_no_label(raw, tmp_path):
    written(raw, "x-test-0.tar", [*sample("t1", jpeg(1)), *sample("t2", jpeg(2), -1)])
    source = sources.scan(str(raw), ["val", "test"])
    rows = source.table.slice(3).select(["key", "label", "wnid"]).to_pylist()
    assert rows == [{"key": key, "label": -1, "wnid": ""} for key in ("t1", "t2")]
    assert source.labels_from["test"] == "none: the images are unlabelled"
    alone = imagefolder(tmp_path / "alone", {"test.tar": tar(sample("t1", jpeg(1)))})
    assert sources.scan(str(alone), ["test"]).wnids == ()


def test_a_tar_that_was_unpacked_beside_itself_is_not_another_layout(tmp_path):
    files = {f"{split}/{w}/{w}_1.JPEG": b"x" for split in BOTH for w in WNIDS}
    source = sources.scan(str(imagefolder(tmp_path, files | {"train.tar": b"x"})), BOTH)
    assert (source.layout, source.accounts.ignored) == ("imagefolder", {"unused": 1})


def with_info(**changes: Any) -> Callable[[Path], object]:
    """The first train tar of timm's layout as _info.json tells it, but with changes."""

    def make(raw: Path) -> None:
        document = json.loads((raw / "_info.json").read_text())
        document["splits"]["train"] |= changes
        (raw / "_info.json").write_text(json.dumps(document))

    return make


def train(*members: tuple[str, bytes]) -> Callable[[Path], object]:
    return lambda raw: (raw / TRAIN).write_bytes(tar([*members]))


def of(key: str, *label: object, **more: object) -> Callable[[Path], object]:
    return train(*sample(key, jpeg(), *label, **more))


JPG, GOOD = jpeg(), [*sample(f"{A}_1", jpeg(1), 0), *sample(f"{B}_1", jpeg(2), 1)]
TWO: Files = [("x.jpg", JPG), ("x.png", JPG), ("x.cls", b"0")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (of(f"{A}_1"), rf"{A}_1\.jpg has no label \(1 such images\)"),
        (of("x", "tench"), r"x\.cls is 'tench', not the number of a class"),
        (of("x", "1.0"), r"x\.cls is '1\.0', not the number"),
        (of("x", label="tench"), r"label in .*x\.json is 'tench', not"),
        (of("x", label=True), r"x\.json is 'True', not the number"),
        (train(("x.jpg", JPG), ("x.json", b"{")), r"x\.json is not valid JSON"),
        (of("x", 0, label=1), "x is of two classes, 0 and 1"),
        (of(f"{A}_1", 0, filename=f"{B}/1.JPEG"), f"{A}_1 is of two classes, {A} and {B}"),
        (train(*GOOD, *TWO), r"two images in one sample, x\.jpg and x\.png; keep one"),
        (train(*GOOD, ("x.cls", b"0")), "holds a label of x, but no image of it"),
        (train(*GOOD, ("x.CLS", b"0"), ("x.cls", b"0")), r"x\.cls twice"),
        (train(("notes.txt", b"x")), r"holds no image KEY\.jpg"),
        (of(f"{A}_1", 1), f"{A} with label 0.*{A} with label 1"),
        (of(f"{C}_9", 0), f"{A} with label 0.*{C} with label 0"),
        (of("n00000001_1", 3), "labels must be ranks of sorted WNIDs"),
        (of("n00000040_1", 9), "4 classes have images, .* go to 9"),
        (of("x", 3), r"x\.jpg has label 3, and no image .* its WNID"),
        (train(*GOOD), r"0000\.tar holds 2 images, _info\.json says 4; fetch .* --partial"),
        (with_info(shard_lengths=[3, 4]), r"0000\.tar holds 4 images, _info\.json says 3; fetch"),
        (lambda raw: (raw / TRAIN).unlink(), r"0000\.tar of _info\.json is not there \(1 of 3"),
        (lambda raw: (raw / VAL).unlink(), "needs tars with val in their names, not there"),
        (lambda raw: (raw / "_info.json").write_text("[]"), r"_info\.json is not what timm writes"),
        (with_info(shard_lengths=[4]), r"_info\.json is not what timm writes"),
        (with_info(alt_label="other"), r"the labels are 'other' of each JSON"),
    ],
)
def test_what_is_no_sound_set_is_refused_in_one_line(change, reason, raw):
    change(raw)
    with pytest.raises(UserError, match=reason) as refused:
        sources.scan(str(raw), BOTH)
    assert "\n" not in str(refused.value)


# A finished set of this program


def test_rows_are_those_of_tarfile_and_all_else_that_of_the_manifest(drawn_shards):
    both = sources.scan(drawn_shards, BOTH)
    assert scanned(drawn_shards, both) == truth(drawn_shards)
    source, manifest = sources.scan(drawn_shards, ["val"]), shards.load_manifest(drawn_shards)
    assert source.stored == sources.StoredAs(256, 227, 90, manifest.digest)
    assert source.shuffle == "source"
    assert (source.wnids, source.class_names) == (manifest.wnids, manifest.class_names)
    assert source.announced == {"val": manifest.num_samples("val")} == {"val": source.count("val")}
    assert source.labels_from["val"].startswith(f"shard set {manifest.digest[:12]}, there: number")
    tars = [f"{shard.name}.tar" for shard in manifest.split_shards("val")]
    sizes = [(name, Path(drawn_shards, name).stat().st_size) for name in tars]
    assert source.containers == tuple(sizes)
    assert "1 images were rejected" in source.notes[0]  # demo-raw draws one that is cut


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_tar_of_another_size_is_refused_with_the_remedy(copy, damage):
    tar = copy / "train-000001.tar"
    data = tar.read_bytes()
    tar.unlink()
    if damage == "cut":
        tar.write_bytes(data[:-512])
    found = f"{len(data) - 512:,} bytes" if damage == "cut" else "not there"
    with pytest.raises(UserError, match=rf"{tar.name} is {found}, .* {len(data):,} .*verify .*rep"):
        sources.scan(str(copy), BOTH)
    assert sources.scan(str(copy), ["val"]).count("val") > 0


def test_an_index_that_contradicts_the_manifest_is_refused(copy):
    path, index = copy / "index" / "train.parquet", shards.load_index(str(copy), "train")
    swapped = index.set_column(1, "label", pa.array(index["label"].to_pylist()[::-1]))
    for wrong in (swapped, index.slice(1), index.take([*range(len(index)), 0])):
        path.write_bytes(shards.parquet_bytes(wrong))
        with pytest.raises(UserError, match=r"index/train\.parquet contradicts manifest\.json"):
            sources.scan(str(copy), BOTH)


def test_an_unfinished_set_and_an_absent_split_are_refused(copy):
    with pytest.raises(UserError, match="needs test shards, not there"):
        sources.scan(str(copy), ["train", "test"])
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="no finished shard set"):
        sources.scan(str(copy), BOTH)
