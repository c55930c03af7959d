"""pipelines/sources/devkit.py: the process that reads meta.mat, as the product has it read."""

import pytest
from drawn import A, B, C, devkit, packed_devkit, synsets

from alexnet.errors import UserError
from pipelines.sources import devkit as kits


def test_each_class_has_its_own_count_of_images(tmp_path):
    (tmp_path / kits.NAME).write_bytes(devkit([C, A, B], [1, 2, 3], "3\n1\n2\n"))
    kit = kits.load(str(tmp_path / kits.NAME))
    assert (kit.val_wnids, kit.train_images) == ((B, C, A), {C: 1, A: 2, B: 3})


@pytest.mark.parametrize("damage", ["no table", "one that makes the native reader crash"])
def test_table_that_cannot_be_read_is_refused(damage, tmp_path):
    """One byte of difference; SciPy 1.17 ends with a segmentation fault."""
    meta = bytearray(synsets([C, A, B], 2, "ILSVRC2012_ID"))
    assert meta[1840] == 12
    meta[1840] = 8
    data = b"x" * 500 if damage == "no table" else bytes(meta)
    truth = ("ILSVRC2012_validation_ground_truth.txt", b"3\n1\n2\n")
    (tmp_path / kits.NAME).write_bytes(packed_devkit([("meta.mat", data), truth]))
    with pytest.raises(UserError, match=r"meta\.mat is damaged"):
        kits.load(str(tmp_path / kits.NAME))
