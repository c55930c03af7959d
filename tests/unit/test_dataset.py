"""pipelines/dataset.py: a set as torch's DataLoader takes it."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from alexnet.errors import UserError
from pipelines import shards
from pipelines.dataset import ShardDataset


def in_tars(out: str, split: str) -> list[tuple[bytes, int]]:
    """(JPEG, label) of every sample, as tarfile finds them."""
    found = []
    for path in sorted(Path(out).glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            files = {info.name: tar.extractfile(info).read() for info in tar}
        found += [
            (data, int(files[name.replace(".jpg", ".cls")]))
            for name, data in files.items()
            if name.endswith(".jpg")
        ]
    return found


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy())


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_dataloader_gives_every_image_of_the_tars_with_its_label(drawn_shards, split):
    data = ShardDataset(drawn_shards, split, tensor, target_transform=lambda label: label + 100)
    expected = in_tars(drawn_shards, split)
    assert len(data) == len(expected)
    assert data.targets.tolist() == [label for _, label in expected]
    batches = list(
        DataLoader(pickle.loads(pickle.dumps(ShardDataset(drawn_shards, split, tensor))), 4)
    )
    images = torch.cat([images for images, _ in batches])
    for (jpeg, label), image, (_, shifted) in zip(expected, images, data, strict=True):
        assert torch.equal(image, tensor(Image.open(io.BytesIO(jpeg))))
        assert shifted == label + 100
    manifest = shards.load_manifest(drawn_shards)
    assert [data.class_to_idx[wnid] for wnid in manifest.wnids] == list(range(len(data.classes)))


def test_numbers_of_samples_are_those_of_a_list(drawn_shards):
    data = ShardDataset(drawn_shards, "val")
    assert data[-1][1] == data[len(data) - 1][1]
    with pytest.raises(IndexError, match=rf"sample {len(data)} of {len(data)}; take 0 to"):
        data[len(data)]


def test_a_set_that_changed_under_an_open_dataset_is_refused(copy):
    data = ShardDataset(str(copy), "val")
    path = sorted(copy.glob("val-*.tar"))[0]
    damaged = bytearray(path.read_bytes())
    place = damaged.index(b"\xff\xd8")  # where the first JPEG begins
    damaged[place + 300] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"is not the one that was there; open the set again"):
        data[0]
    with pytest.raises(UserError, match="has no split 'test'; it has train, val"):
        ShardDataset(str(copy), "test")
