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
META = synsets([A, B, C], 2, "ILSVRC2012_ID")
TRUTH = ("ILSVRC2012_validation_ground_truth.txt", b"3\n1\n2\n")


def loaded(folder: Path, data: bytes, name: str = kits.NAME) -> kits.Devkit:
    (folder / name).write_bytes(data)
    return kits.load(str(folder / name))


def test_ids_lead_to_wnids_and_wnids_to_sorted_ranks(tmp_path):
    kit = loaded(tmp_path, GOOD + bytes(512))  # zeros may follow
    assert (kit.year, kit.wnids) == (2012, (A, B, C))
    assert kit.words == {wnid: f"name of {wnid}" for wnid in (A, B, C)}
    assert kit.train_images == {A: 2, B: 2, C: 2}
    assert (kit.val_wnids, kit.test_wnids) == ((B, C, A), ())


def test_the_devkit_of_2010_has_ids_of_its_own_and_a_ground_truth_of_test(tmp_path):
    data = devkit([B, A], 7, "2\n1\n2\n", year=2010)
    kit = loaded(tmp_path, data, kits.NAME_2010)
    assert (kit.year, kit.wnids, kit.val_wnids, kit.test_wnids) == (2010, (A, B), (A, B, A), ())
    (tmp_path / kits.TEST_TRUTH_2010).write_bytes(b"1\r\n1\r\n2\r\n2\r\n")
    assert kits.load(str(tmp_path / kits.NAME_2010)).test_wnids == (B, B, A, A)


@pytest.mark.parametrize("line", ["0", "4", "-1", "x", "", "1 2", "9" * 5000], ids=range(7))
def test_a_ground_truth_line_that_is_no_id_is_refused(tmp_path, line):
    message = rf"line 2 of {TRUTH[0]} in .* is '{line[:20]}', not an ILSVRC2012_ID from 1 to 3"
    with pytest.raises(UserError, match=message):
        loaded(tmp_path, devkit([C, A, B], 2, f"3\n{line}\n2\n"))
    (tmp_path / kits.TEST_TRUTH_2010).write_text(f"1\n{line}\n2\n")
    with pytest.raises(UserError, match=rf"line 2 of .*{kits.TEST_TRUTH_2010} is '{line[:20]}', n"):
        loaded(tmp_path, devkit([C, A, B], 2, "1\n", year=2010), kits.NAME_2010)


def matlab(value: np.ndarray) -> bytes:
    meta = io.BytesIO()
    savemat(meta, {"synsets": value})
    return meta.getvalue()


def renumbered(ids: list[int]) -> bytes:
    """A meta.mat of three leaves with these IDs."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "num_children", "num_train_images"]
    table = np.empty((3, 1), [(name, object) for name in fields])
    for row, (number, wnid) in enumerate(zip(ids, (A, B, C), strict=True)):
        table[row, 0] = (number, wnid, wnid, 0, 2)
    return matlab(table)


def with_meta(meta: bytes) -> bytes:
    return packed_devkit([("meta.mat", meta), TRUTH])


def flipped() -> bytes:
    """A flipped bit in a stored block, before whose checksum tarfile stops: a wrong label."""
    stored = bytearray(gzip.compress(gzip.decompress(GOOD), 0))
    stored[stored.index(TRUTH[1])] = ord("2")
    return bytes(stored)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *((data, "is damaged") for data in (GOOD[: len(GOOD) // 2], b"not gzip", b"", flipped())),
        *((data, "is damaged") for data in (GOOD[:-8], GOOD[:-1], GOOD + b"x")),
        (packed_devkit([TRUTH]), r"holds no meta\.mat"),
        (packed_devkit([("meta.mat", META)]), rf"holds no {TRUTH[0]}"),
        (with_meta(b"x" * 500), r"meta\.mat is damaged"),
        (with_meta(synsets([A], 2, "SOME_ID")), r"meta\.mat lists no class by ILSVRC2012_ID"),
        (with_meta(matlab(np.zeros((0, 0)))), r"meta\.mat lists no class by ILSVRC2012_ID"),
        (with_meta(synsets([A], 2, "ILSVRC2010_ID")), "has ILSVRC2010_ID, not .* another year"),
        (with_meta(synsets(["../../x"], 2, "ILSVRC2012_ID")), r"meta\.mat has class '"),
        (with_meta(synsets(["n0000001"], 2, "ILSVRC2012_ID")), r"meta\.mat has class '"),
        (with_meta(synsets([A], -1, "ILSVRC2012_ID")), r"meta\.mat has class '"),
        (devkit([A, B, A], 2, "1\n"), r"a WNID appears twice in meta\.mat"),
        (with_meta(renumbered([1, 2, 2])), "leaf ILSVRC2012_IDs are not 1 to 3, each once"),
    ],
    ids=range(18),
)
def test_a_damaged_devkit_is_refused(tmp_path, data, message):
    with pytest.raises(UserError, match=rf"devkit_t12\.tar\.gz.*{message}"):
        loaded(tmp_path, data)


def test_two_devkits_in_one_folder_are_ambiguous(tmp_path):
    files = {kits.NAME: len(GOOD), kits.NAME_2010: 5}
    with pytest.raises(UserError, match="two class lists; keep one"):
        kits.find(str(tmp_path), files)
    kit = loaded(tmp_path, GOOD)
    assert kits.find(str(tmp_path), {kits.NAME: len(GOOD), "other": 1}) == kit
    assert kits.find(str(tmp_path), {"other": 1}) is None


def test_no_path_in_a_devkit_reaches_the_disk(tmp_path):
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(GOOD))) as source:
        members = [(info.name, source.extractfile(info).read()) for info in source]
    evil = [(f"../../../{name}", data) for name, data in members] + [("/etc/evil", b"x")]
    raw = archives(tmp_path / "raw", devkit=gzip.compress(tar(evil)))
    before = sorted(tmp_path.rglob("*"))
    assert sources.scan(str(raw), ("train", "val")).wnids == (A, B, C)
    assert sorted(tmp_path.rglob("*")) == before


def test_images_are_labelled_by_the_number_in_their_name():
    def wnids(*names: str, truth: tuple[str, ...] = (B, C, A)) -> list[str]:
        return kits.wnids_by_number("here", pa.array(names), "ILSVRC2012_val", truth).to_pylist()

    names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in (3, 1, 2, 0)]
    assert wnids(*names[:3]) == [A, B, C]
    for strange in ("ILSVRC2012_val_1.JPEG", "ILSVRC2010_val_00000001.JPEG", "x.JPEG"):
        with pytest.raises(UserError, match=f"here holds {strange}; expected only ILSVRC2012_val"):
            wnids(strange)
    with pytest.raises(UserError, match=r"holds ILSVRC2012_val_00000000\.JPEG and 1 images in all"):
        wnids(names[3])
    with pytest.raises(UserError, match=r"3 images in all, but the ground truth has 2 lines"):
        wnids(*names[:3], truth=(B, C))


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(kits, "_MAX_UNPACKED", 2 << 20)
    for bomb in (gzip.compress(bytes(3 << 20)), gzip.compress(bytes(1 << 20)) * 3):
        with pytest.raises(UserError, match="unpacks to more than 2 MiB"):
            loaded(tmp_path, bomb)
