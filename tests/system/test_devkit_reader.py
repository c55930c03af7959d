"""pipelines/sources/devkit.py: the process that reads meta.mat, as the product has it read."""

from pathlib import Path

import pytest
from drawn import A, B, C, devkit, packed_devkit, synsets

from alexnet.errors import UserError
from pipelines.sources import devkit as kits

TRUTH = ("ILSVRC2012_validation_ground_truth.txt", b"3\n1\n2\n")


def loaded(folder: Path, data: bytes) -> kits.Devkit:
    (folder / kits.NAME).write_bytes(data)
    return kits.load(str(folder / kits.NAME))


def test_ids_lead_to_wnids_and_wnids_to_sorted_ranks(tmp_path: Path) -> None:
    kit = loaded(tmp_path, devkit([C, A, B], [1, 2, 3], "3\n1\n2\n"))
    assert (kit.wnids, kit.val_wnids) == ((A, B, C), (B, C, A))
    assert kit.train_images == {C: 1, A: 2, B: 3}


@pytest.mark.parametrize("damage", ["no table", "one that makes the native reader crash"])
def test_table_that_cannot_be_read_is_refused(damage: str, tmp_path: Path) -> None:
    """One byte of difference; SciPy 1.17 ends with a segmentation fault."""
    meta = bytearray(synsets([C, A, B], 2, "ILSVRC2012_ID"))
    assert meta[1840] == 12
    meta[1840] = 8
    data = b"x" * 500 if damage == "no table" else bytes(meta)
    with pytest.raises(UserError, match=r"meta\.mat is damaged"):
        loaded(tmp_path, packed_devkit([("meta.mat", data), TRUTH]))
