"""What the record of a training holds, and which data it does not go with."""

import dataclasses
from pathlib import Path

import pytest
from shard_sets import write_shard_set
from small_training import small_config

from alexnet.errors import UserError
from training import recipes
from training.config import WHERE_AND_HOW_MANY, flatten, science, science_digest
from training.preflight import estimate, resolve

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("config") / "set", train=(5, 4), val=(3,))


def test_digest_is_of_every_field_but_where_and_how_many():
    config = small_config(optim_milestones=(1, 2))
    assert flatten(config)["optim.milestones"] == "[1, 2]"
    assert flatten(config).keys() - science(config).keys() == WHERE_AND_HOW_MANY
    same = {"workers": 2, "data": "elsewhere", "name": "other", "log_steps": 7, "compile": True}
    assert science_digest(small_config(**same)) == science_digest(small_config())
    others = [
        {"recipe": "fast"},
        {"seed": 1},
        {"normalise": "mean"},
        {"model_width": 0.5},
        {"optim_lr": 0.5},
        {"optim_batch_size": 9},
        {"augment_flip": False},
    ]
    assert len({science_digest(small_config(**other)) for other in [{}, *others]}) == 8


# Data that does not fit


def test_no_shards_found_says_how_to_build_them(home):
    with pytest.raises(UserError) as told:
        resolve(small_config())
    assert str(home / "shards") in str(told.value) and "pipelines build --raw" in str(told.value)


def test_newest_shards_of_the_home_are_taken(home):
    for name in ("one", "two"):
        write_shard_set(home / "shards" / name, train=(4,), val=(2,))
    config, manifest = resolve(small_config(optim_batch_size=2))
    assert config.data == str(home / "shards" / "two") and manifest.num_samples("train") == 4


def test_what_flags_left_open_is_filled_in_with_absolute_places(uri, home, monkeypatch):
    monkeypatch.chdir(Path(uri).parent)
    config, _ = resolve(small_config(data="set", name=None, storage="../runs"))
    assert config.data == uri
    assert Path(str(config.storage)).resolve() == Path(uri).parents[1] / "runs"
    assert Path(str(config.storage)).is_absolute()
    assert str(config.name).startswith("baseline-2")
    assert resolve(small_config(data=uri))[0].storage == str(home / "runs")


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_split_is_refused(tmp_path, split):
    sizes = {"train": (4,), "val": (2,), split: (0,)}
    uri = write_shard_set(tmp_path / "set", **sizes)
    with pytest.raises(UserError, match=f"has no {split} split; rebuild with --splits train,val"):
        resolve(small_config(data=uri))


def test_too_few_samples_for_the_workers_are_refused_with_the_possible_number(uri):
    config = small_config(data=uri, optim_batch_size=5)  # 9 samples: batches of 4 and 5
    assert resolve(dataclasses.replace(config, workers=4))[0].workers == 4
    with pytest.raises(UserError, match=r"9 train samples in batches of 5 cannot feed 5 .* 4 or"):
        resolve(dataclasses.replace(config, workers=5))


def test_paper_on_227_pixel_shards_is_refused_with_both_remedies(uri, tmp_path):
    with pytest.raises(UserError, match=r"--crop 256`, or pass --augment\.crop resized"):
        resolve(dataclasses.replace(recipes.paper(), data=uri))
    larger = write_shard_set(tmp_path / "set", train=(4,), val=(2,), side=231)
    resolve(dataclasses.replace(recipes.paper(), data=larger))


def test_a_network_that_cannot_be_built_is_refused_before_anything_starts(uri):
    with pytest.raises(UserError, match=r"width 99.0 must lie between"):
        estimate(*resolve(small_config(data=uri, model_width=99.0)))
