"""A built set as a Ray dataset: `pipelines.read`, and Ray's own reader of WebDataset."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.data
from drawn import ROOT
from PIL import Image

import pipelines
from alexnet.errors import UserError
from pipelines import shards

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
Samples = dict[str, dict[str, Any]]


def in_tars(out: str, split: str) -> Samples:
    """Members of each sample by their extensions, as tarfile finds them."""
    found: Samples = {}
    for path in sorted(Path(out).glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    assert found
    return found


def test_importing_pipelines_loads_no_ray():
    code = "import sys, pipelines; print({'ray', 'pyarrow', 'torch'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_are_the_samples_of_the_tars_and_a_block_is_a_shard(local_ray, drawn_shards, split):
    data = pipelines.read(drawn_shards, split).materialize()
    expected = in_tars(drawn_shards, split)
    rows = data.take_all()
    assert len(rows) == len(expected)
    wnids = shards.load_manifest(drawn_shards).wnids
    for row in rows:
        sample = expected.pop(row["key"])
        assert (row["image"], row["label"]) == (sample["jpg"], int(sample["cls"]))
        assert row["wnid"] == wnids[row["label"]]
    assert data.num_blocks() == len(list(Path(drawn_shards).glob(f"{split}-*.tar"))) > 1


def test_a_split_that_is_not_there_and_a_damaged_shard_are_refused(local_ray, copy):
    with pytest.raises(UserError, match=r"has no split 'test'; it has train, val"):
        pipelines.read(str(copy), "test")
    shard = copy / "val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    told = r"val-000000.tar has another sha256 than in the manifest; run .* verify"
    with pytest.raises(ray.exceptions.RayTaskError, match=told):
        pipelines.read(str(copy), "val").materialize()


def test_rays_own_reader_of_webdataset_takes_the_tars_of_a_set(local_ray, drawn_shards):
    """Told to leave the other files alone."""
    expected = in_tars(drawn_shards, "train") | in_tars(drawn_shards, "val")
    for row in ray.data.read_webdataset(drawn_shards, file_extensions=["tar"]).iter_rows():
        sample = expected.pop(row["__key__"])
        assert row["cls"] == int(sample["cls"])
        decoded = Image.open(io.BytesIO(sample["jpg"]))
        np.testing.assert_array_equal(row["jpg"], np.asarray(decoded))
    assert expected == {}
