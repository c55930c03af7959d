"""pipelines/sources/devkit.py: classes, counts and ground truth, or what is wrong with them."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from drawn import A, B, C, archives, devkit, packed_devkit, synsets, tar
from scipy.io import savemat

from alexnet.errors import UserError
from pipelines import sources
from pipelines.sources import devkit as kits

GOOD = devkit([C, A, B], 2, "3\n1\n2\n")
TRUTH = ("ILSVRC2012_validation_ground_truth.txt", b"3\n1\n2\n")


def loaded(folder: Path, data: bytes, name: str = kits.NAME) -> kits.Devkit:
    (folder / name).write_bytes(data)
    return kits.load(str(folder / name))


def test_ids_lead_to_wnids_and_wnids_to_sorted_ranks(tmp_path: Path) -> None:
    kit = loaded(tmp_path, GOOD)
    assert kit.year == 2012
    assert kit.wnids == (A, B, C)
    assert kit.words == {wnid: f"name of {wnid}" for wnid in (A, B, C)}
    assert kit.train_images == {A: 2, B: 2, C: 2}
    assert kit.val_wnids == (B, C, A)
    assert kit.test_wnids == ()


def test_the_devkit_of_2010_has_ids_of_its_own_and_a_ground_truth_of_test(tmp_path: Path) -> None:
    data = devkit([B, A], 7, "2\n1\n2\n", year=2010)
    kit = loaded(tmp_path, data, kits.NAME_2010)
    assert (kit.year, kit.wnids, kit.val_wnids, kit.test_wnids) == (2010, (A, B), (A, B, A), ())
    (tmp_path / kits.TEST_TRUTH_2010).write_bytes(b"1\r\n1\r\n2\r\n2\r\n")
    assert kits.load(str(tmp_path / kits.NAME_2010)).test_wnids == (B, B, A, A)


def test_the_devkit_of_tiny20_agrees_with_its_ground_truth(data_folder: Path) -> None:
    kit = kits.load(str(data_folder / "tiny20" / "ilsvrc" / kits.NAME))
    assert len(kit.wnids) == 20
    assert kit.wnids == tuple(sorted(kit.wnids))
    assert len(kit.val_wnids) == 30


@pytest.mark.parametrize("line", ["0", "4", "-1", "x", "", "1 2"])
def test_a_ground_truth_line_that_is_no_id_is_refused(tmp_path: Path, line: str) -> None:
    message = rf"line 2 of ILSVRC2012_validation_ground_truth\.txt in .* is '{line}', not an ILSVRC"
    with pytest.raises(UserError, match=message + r"2012_ID from 1 to 3"):
        loaded(tmp_path, devkit([C, A, B], 2, f"3\n{line}\n2\n"))
    (tmp_path / kits.TEST_TRUTH_2010).write_text(f"1\n{line}\n2\n")
    with pytest.raises(UserError, match=rf"line 2 of .*{kits.TEST_TRUTH_2010} is '{line}', not an"):
        loaded(tmp_path, devkit([C, A, B], 2, "1\n", year=2010), kits.NAME_2010)


def test_a_damaged_devkit_is_refused(tmp_path: Path) -> None:
    no_meta = packed_devkit([TRUTH])
    no_truth = packed_devkit([("meta.mat", synsets([A, B, C], 2, "ILSVRC2012_ID"))])
    bad_meta = packed_devkit([("meta.mat", b"x" * 500), TRUTH])
    other_meta = packed_devkit([("meta.mat", synsets([A], 2, "SOME_ID")), TRUTH])
    for data, message in [
        (GOOD[: len(GOOD) // 2], "is damaged"),
        (b"not gzip", "is damaged"),
        (b"", "is damaged"),
        (no_meta, r"holds no meta\.mat"),
        (no_truth, r"holds no ILSVRC2012_validation_ground_truth\.txt"),
        (bad_meta, r"meta\.mat is damaged"),
        (other_meta, r"meta\.mat lists no class by ILSVRC2012_ID"),
    ]:
        with pytest.raises(UserError, match=rf"devkit_t12\.tar\.gz.*{message}"):
            loaded(tmp_path, data)


def test_ids_and_wnids_must_be_there_once_each(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a WNID appears twice in meta\.mat"):
        loaded(tmp_path, devkit([A, B, A], 2, "1\n"))
    twice = packed_devkit([("meta.mat", renumbered([1, 2, 2])), TRUTH])
    with pytest.raises(UserError, match="leaf ILSVRC2012_IDs are not 1 to 3, each once"):
        loaded(tmp_path, twice)


def test_a_devkit_of_another_year_under_this_name_is_refused(tmp_path: Path) -> None:
    files = [("meta.mat", synsets([A, B], 2, "ILSVRC2010_ID")), TRUTH]
    with pytest.raises(UserError, match=r"has ILSVRC2010_ID, not ILSVRC2012_ID: .* another year"):
        loaded(tmp_path, packed_devkit(files))


def test_two_devkits_in_one_folder_are_ambiguous(tmp_path: Path) -> None:
    files = {kits.NAME: len(GOOD), kits.NAME_2010: 5}
    with pytest.raises(UserError, match="two class lists; keep one"):
        kits.find(str(tmp_path), files)
    loaded(tmp_path, GOOD)
    found = kits.find(str(tmp_path), {kits.NAME: len(GOOD), "other": 1})
    assert found is not None and found.wnids == (A, B, C)
    assert kits.find(str(tmp_path), {"other": 1}) is None


def test_no_path_in_a_devkit_reaches_the_disk(tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(GOOD))) as source:
        members = [(info.name, source.extractfile(info).read()) for info in source]
    evil = [(f"../../../{name}", data) for name, data in members] + [("/etc/evil", b"x")]
    raw = archives(tmp_path / "raw", devkit=gzip.compress(tar(evil)))
    before = sorted(tmp_path.rglob("*"))
    assert sources.scan(str(raw), ("train", "val")).wnids == (A, B, C)
    assert sorted(tmp_path.rglob("*")) == before


def test_images_are_labelled_by_the_number_in_their_name(tmp_path: Path) -> None:
    names = pa.array([f"ILSVRC2012_val_{n:08d}.JPEG" for n in (3, 1, 2)])
    wnids = kits.wnids_by_number("here", names, "ILSVRC2012_val", (B, C, A))
    assert wnids.to_pylist() == [A, B, C]
    for strange in ("ILSVRC2012_val_1.JPEG", "ILSVRC2010_val_00000001.JPEG", "x.JPEG"):
        with pytest.raises(UserError, match=f"here holds {strange}; expected only ILSVRC2012_val"):
            kits.wnids_by_number("here", pa.array([strange]), "ILSVRC2012_val", (B,))
    zero = pa.array(["ILSVRC2012_val_00000000.JPEG"])
    with pytest.raises(UserError, match=r"holds ILSVRC2012_val_00000000\.JPEG and 1 images in all"):
        kits.wnids_by_number("here", zero, "ILSVRC2012_val", (B, C, A))
    with pytest.raises(UserError, match=r"3 images in all, but the ground truth has 2 lines"):
        kits.wnids_by_number("here", names, "ILSVRC2012_val", (B, C))


def renumbered(ids: list[int]) -> bytes:
    """A meta.mat of three leaves with these IDs."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "num_children", "num_train_images"]
    table = np.empty((3, 1), [(name, object) for name in fields])
    for row, (number, wnid) in enumerate(zip(ids, (A, B, C), strict=True)):
        table[row, 0] = (number, wnid, wnid, 0, 2)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": table})
    return buffer.getvalue()


def test_damage_that_only_the_checksum_of_gzip_tells_is_refused(tmp_path: Path) -> None:
    """tarfile stops before it: a flipped bit in a stored block is a wrong label."""
    stored = bytearray(gzip.compress(gzip.decompress(GOOD), 0))
    stored[stored.index(b"3\n1\n2\n")] = ord("2")
    for data in (bytes(stored), GOOD[:-8], GOOD[:-1], GOOD + b"x"):
        with pytest.raises(UserError, match="is damaged"):
            loaded(tmp_path, data)
    loaded(tmp_path, GOOD + bytes(512))


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kits, "_MAX_UNPACKED", 2 << 20)
    for bomb in (gzip.compress(bytes(3 << 20)), gzip.compress(bytes(1 << 20)) * 3):
        with pytest.raises(UserError, match="unpacks to more than 2 MiB"):
            loaded(tmp_path, bomb)


def test_class_that_is_no_wnid_and_negative_counts_are_refused(tmp_path: Path) -> None:
    for wnid, count in (("../../x", 2), ("n0000001", 2), (A, -1)):
        files = [("meta.mat", synsets([wnid], count, "ILSVRC2012_ID")), TRUTH]
        with pytest.raises(UserError, match=r"meta\.mat has class '"):
            loaded(tmp_path, packed_devkit(files))


def test_synsets_that_are_no_table_are_refused(tmp_path: Path) -> None:
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.zeros((0, 0))})
    with pytest.raises(UserError, match=r"lists no class by ILSVRC2012_ID"):
        loaded(tmp_path, packed_devkit([("meta.mat", meta.getvalue()), TRUTH]))


def test_a_ground_truth_line_of_thousands_of_digits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 2 of .* is '9999"):
        loaded(tmp_path, devkit([C, A, B], 2, f"3\n{'9' * 5000}\n2\n"))
