"""pipelines/sources/official.py: the published archives are known by size, count and MD5."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from drawn import A, B, C, archives, devkit, imagefolder, jpeg, tar

from alexnet.errors import UserError
from pipelines import sources, storage
from pipelines.sources import devkit as kits
from pipelines.sources import official

VAL, TRAIN = "ILSVRC2012_img_val.tar", "ILSVRC2012_img_train.tar"
FULL_SIZES = {TRAIN: 147_897_477_120, VAL: 6_744_924_160}


def published_as(monkeypatch: pytest.MonkeyPatch, raw: Path, *names: str) -> None:
    """Let these drawn archives pass for the published ones."""
    contents = {name: (raw / name).read_bytes() for name in names}
    known = {
        name: official.Published(hashlib.md5(data).hexdigest(), len(data))
        for name, data in contents.items()
    }
    monkeypatch.setattr(official, "ARCHIVES", known)


def test_official_means_known_sizes_and_a_devkit_that_announces_the_published_set(tmp_path):
    drawn = kits.load(str(archives(tmp_path) / kits.NAME))
    train = {A: 1_000_000, B: 281_000, C: 167}
    kit = replace(drawn, train_images=train, val_wnids=(A,) * 50_000)
    assert official.is_official(FULL_SIZES, [TRAIN, VAL], kit)
    assert official.is_official(FULL_SIZES, [TRAIN], None)
    others = (drawn, replace(kit, val_wnids=(A,) * 49_999), replace(kit, year=2010))
    assert not any(official.is_official(FULL_SIZES, [TRAIN, VAL], other) for other in others)
    assert not official.is_official(FULL_SIZES | {VAL: 5}, [TRAIN, VAL], kit)
    # The size of the test archive is not known for certain.
    test = "ILSVRC2012_img_test_v10102019.tar"
    assert not official.is_official(FULL_SIZES | {test: 5}, [TRAIN, test], kit)


def test_another_size_or_count_is_refused_with_both_numbers():
    table = pa.table({"split": ["val"] * 50_001})
    official.check_sizes("RAW", FULL_SIZES, [TRAIN, VAL])
    official.check_counts("RAW", 2012, table.slice(1), {"val": VAL})
    for step, size, count in ((-1, "159", "49,999"), (1, "161", "50,001")):
        message = rf"^RAW/{VAL} has 6,744,924,{size} bytes, the published one 6,744,924,160; fetch"
        with pytest.raises(UserError, match=rf"{message} it again, or pass --p"):
            official.check_sizes("RAW", FULL_SIZES | {VAL: FULL_SIZES[VAL] + step}, [TRAIN, VAL])
        with pytest.raises(UserError, match=rf"RAW/{VAL} holds {count} images, .*one 50,000"):
            official.check_counts("RAW", 2012, table.slice(0, 50_000 + step), {"val": VAL})


def test_a_set_of_the_published_size_is_official_and_its_counts_are_checked(tmp_path, monkeypatch):
    published_as(monkeypatch, archives(tmp_path, devkit=None, val=None), TRAIN)
    with pytest.raises(UserError, match=r"img_train\.tar holds 6 images, .* one 1,281,167"):
        sources.scan(str(tmp_path), ["train"])
    monkeypatch.setitem(official.IMAGES, 2012, {"train": 6, "val": 3, "test": 1})
    assert sources.scan(str(tmp_path), ["train"]).official
    # now with a devkit that announces 6 and 3, and a val tar
    published_as(monkeypatch, archives(tmp_path), TRAIN, VAL)
    assert sources.scan(str(tmp_path), ("train", "val")).official
    test = tar([(f"ILSVRC2012_test_{n:08d}.JPEG", jpeg(n)) for n in (1, 2)])
    imagefolder(tmp_path, {"ILSVRC2012_img_test.tar": test})
    with pytest.raises(UserError, match=r"test has 2 images, the published set has 1; add"):
        sources.scan(str(tmp_path), ("val", "test"))


def test_md5_sums_are_read_and_compared(tmp_path, monkeypatch):
    raw, data = str(tmp_path), bytes(range(256)) * 1000
    published_as(monkeypatch, imagefolder(tmp_path, {VAL: data, TRAIN: b"train"}), VAL, TRAIN)
    monkeypatch.setattr(official, "_PIECE", 10_000)
    files = dict(storage.list_files(raw))
    digest, other = (hashlib.md5(part).hexdigest() for part in (data, data[:-1] + b"x"))
    line = f"{VAL}: MD5 {digest} as published (256,000 bytes)"
    assert official.verify_md5(raw, files)[0] == line and len(official.verify_md5(raw, files)) == 2
    storage.write(f"{raw}/{VAL}", data[:-1] + b"x")
    with pytest.raises(UserError, match=rf"{VAL} has MD5 {other}, the published one {digest}; fet"):
        official.verify_md5(raw, files)
    with pytest.raises(UserError, match="RAW holds no archive with a published MD5 sum"):
        official.verify_md5("RAW", {"ILSVRC2010_images_train.tar": 5, "patch_images.tar": 5})


def test_partial_asks_for_nothing_but_labels_that_agree(tmp_path):
    raw = archives(tmp_path, devkit=devkit([C, A, B], 427_056, "3\n1\n2\n" * 16_667))
    with pytest.raises(UserError, match="the devkit announces 427,056"):
        sources.scan(str(raw), ("train", "val"))
    assert sources.scan(str(raw), ("train", "val"), partial=True).table.num_rows == 9
