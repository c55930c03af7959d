"""pipelines/sources/official.py: the published archives are known by size, count and MD5."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from drawn import A, B, C, archives, devkit, jpeg, tar

from alexnet.errors import UserError
from pipelines import sources, storage
from pipelines.sources import devkit as kits
from pipelines.sources import official

VAL, TRAIN = "ILSVRC2012_img_val.tar", "ILSVRC2012_img_train.tar"
FULL_SIZES = {TRAIN: 147_897_477_120, VAL: 6_744_924_160}


@pytest.fixture
def kit(tmp_path: Path) -> kits.Devkit:
    """A devkit that announces what the published one does."""
    drawn = kits.load(str(archives(tmp_path / "kit") / kits.NAME))
    train = {A: 1_000_000, B: 281_000, C: 167}
    return replace(drawn, train_images=train, val_wnids=(A,) * 50_000)


def published_as(monkeypatch: pytest.MonkeyPatch, archives: dict[str, bytes]) -> None:
    """Let these drawn archives pass for the published ones."""
    known = {
        name: official.Published(hashlib.md5(data).hexdigest(), len(data))
        for name, data in archives.items()
    }
    monkeypatch.setattr(official, "ARCHIVES", known)


def test_a_devkit_of_a_drawn_set_announces_another_one(kit: kits.Devkit, tmp_path: Path) -> None:
    assert official.announces_published(kit)
    assert not official.announces_published(kits.load(str(tmp_path / "kit" / kits.NAME)))
    assert not official.announces_published(replace(kit, val_wnids=(A,) * 49_999))
    assert not official.announces_published(replace(kit, year=2010))


def test_official_means_known_sizes_and_no_contradiction(kit: kits.Devkit) -> None:
    assert official.is_official(FULL_SIZES, [TRAIN, VAL], kit)
    assert official.is_official(FULL_SIZES, [TRAIN], None)
    assert not official.is_official(FULL_SIZES | {VAL: 5}, [TRAIN, VAL], kit)
    assert not official.is_official(FULL_SIZES, [TRAIN, VAL], replace(kit, val_wnids=(A,)))
    # The size of the test archive is not known for certain.
    test = "ILSVRC2012_img_test_v10102019.tar"
    assert not official.is_official(FULL_SIZES | {test: 5}, [TRAIN, test], kit)


def test_another_size_is_refused_with_both_numbers() -> None:
    official.check_sizes("RAW", FULL_SIZES, [TRAIN, VAL])
    for step, found in ((-1, "159"), (1, "161")):
        message = rf"^RAW/ILSVRC2012_img_val\.tar has 6,744,924,{found} bytes, the published one 6"
        with pytest.raises(UserError, match=rf"{message},744,924,160; fetch it again, or pass --p"):
            official.check_sizes("RAW", FULL_SIZES | {VAL: FULL_SIZES[VAL] + step}, [TRAIN, VAL])


@pytest.mark.parametrize(("found", "told"), [(49_999, "49,999"), (50_001, "50,001")])
def test_another_count_is_refused_with_both_numbers(found: int, told: str) -> None:
    table = pa.table({"split": ["val"] * 50_001})
    official.check_counts("RAW", 2012, table.slice(1), {"val": VAL})
    with pytest.raises(UserError, match=rf"RAW/.*val\.tar holds {told} images, .*one 50,000"):
        official.check_counts("RAW", 2012, table.slice(0, found), {"val": VAL})


def test_a_set_of_the_published_size_is_official_and_its_counts_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = archives(tmp_path, devkit=None, val=None)
    published_as(monkeypatch, {TRAIN: (raw / TRAIN).read_bytes()})
    with pytest.raises(UserError, match=r"img_train\.tar holds 6 images, .* one 1,281,167"):
        sources.scan(str(raw), ["train"])
    monkeypatch.setitem(official.IMAGES, 2012, {"train": 6, "val": 3, "test": 1})
    assert sources.scan(str(raw), ["train"]).official
    archives(tmp_path)  # now with a devkit that announces 6 and 3, and a val tar
    published_as(monkeypatch, {name: (raw / name).read_bytes() for name in (TRAIN, VAL)})
    source = sources.scan(str(raw), ("train", "val"))
    assert source.official
    (raw / "ILSVRC2012_img_test.tar").write_bytes(
        tar([(f"ILSVRC2012_test_{n:08d}.JPEG", jpeg(n)) for n in (1, 2)])
    )
    with pytest.raises(UserError, match=r"test has 2 images, the published set has 1; add"):
        sources.scan(str(raw), ("val", "test"))


def test_md5_sums_are_read_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, data = str(tmp_path), {VAL: bytes(range(256)) * 1000, TRAIN: b"train"}
    for name, content in data.items():
        storage.write(f"{raw}/{name}", content)
    published_as(monkeypatch, data)
    monkeypatch.setattr(official, "_PIECE", 10_000)
    files = dict(storage.list_files(raw))
    digest = hashlib.md5(data[VAL]).hexdigest()
    lines = official.verify_md5(raw, files)
    assert lines[0] == f"{VAL}: MD5 {digest} as published (256,000 bytes)"
    assert len(lines) == 2
    storage.write(f"{raw}/{VAL}", data[VAL][:-1] + b"x")
    other = hashlib.md5(data[VAL][:-1] + b"x").hexdigest()
    with pytest.raises(UserError, match=rf"{VAL} has MD5 {other}, the published one {digest}; fet"):
        official.verify_md5(raw, files)


def test_md5_sums_of_a_set_that_has_none_are_refused() -> None:
    with pytest.raises(UserError, match="RAW holds no archive with a published MD5 sum"):
        official.verify_md5("RAW", {"ILSVRC2010_images_train.tar": 5, "patch_images.tar": 5})


def test_partial_asks_for_nothing_but_labels_that_agree(tmp_path: Path) -> None:
    raw = archives(tmp_path, devkit=devkit([C, A, B], 427_056, "3\n1\n2\n" * 16_667))
    with pytest.raises(UserError, match="the devkit announces 427,056"):
        sources.scan(str(raw), ("train", "val"))
    assert sources.scan(str(raw), ("train", "val"), partial=True).table.num_rows == 9
