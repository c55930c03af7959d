"""What the record of a training holds, and which data it does not go with."""

import dataclasses
from pathlib import Path

import pytest
from shard_sets import write_shard_set
from small_training import small_config

from alexnet.errors import UserError
from training import recipes
from training.config import (
    WHERE_AND_HOW_MANY,
    TrainConfig,
    flatten,
    science_digest,
    to_dict,
)
from training.preflight import estimate, resolve

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("config") / "set", train=(5, 4), val=(3,))


# The record


def test_record_is_whole_flat_and_json():
    config = small_config(optim_milestones=(1, 2))
    assert to_dict(config)["optim"]["milestones"] == [1, 2]
    flat = flatten(config)
    assert (flat["optim.milestones"], flat["model.variant"], flat["storage"]) == (
        "[1, 2]",
        "ungrouped",
        "null",
    )
    groups = ("model", "optim", "augment")
    leaves = sum(len(dataclasses.fields(getattr(config, group))) for group in groups)
    assert len(flat) == len(dataclasses.fields(TrainConfig)) - 3 + leaves


OTHER_SCIENCE = {
    "model_variant": "paper",
    "model_width": 0.5,
    "model_batch_norm": True,
    "model_init": "text",
    "model_norm_group": 8,
    "optim_rule": "paper",
    "optim_lars_trust": 0.01,
    "optim_plateau_epochs": 2,
    "optim_plateau_drops": 2,
    "optim_ema_decay": 0.9,
    "compress_gradients": True,
    "synthetic": True,
    "optim_batch_size": 9,
    "optim_epochs": 3,
    "optim_lr": 0.5,
    "optim_momentum": 0.5,
    "optim_weight_decay": 0.5,
    "optim_bias_lr_factor": 3.0,
    "optim_bias_lr_constant": True,
    "optim_conv1_slow_epoch": 1,
    "optim_conv1_freeze_epoch": 1,
    "optim_schedule": "step",
    "optim_milestones": (1,),
    "optim_warmup_epochs": 0.5,
    "optim_label_smoothing": 0.5,
    "augment_crop": "centre",
    "augment_flip": False,
    "augment_colour_sigma": 0.5,
    "augment_colour_epochs": 1,
    "normalise": "mean",
    "precision": "bf16",
    "seed": 1,
    "flat_loss_steps": 5,
    "recipe": "fast",
}
SAME_SCIENCE = {
    "data": "elsewhere",
    "name": "other",
    "storage": "elsewhere",
    "workers": 2,
    "device": "cpu",
    "cpus_per_worker": 3,
    "min_workers": 1,
    "max_failures": 1,
    "compile": True,
    "deterministic": True,
    "checkpoint_minutes": 1.0,
    "keep_last": 3,
    "keep_best": 2,
    "profile": True,
    "checkpoint_steps": 5,
    "log_steps": 7,
    "cache_gb": 1.0,
    "cache": "decoded",
    "decoded_gb": 1.0,
    "shared_fs": True,
    "register": False,
}


def test_digest_is_of_what_is_learned_not_of_where_and_how_many():
    digest = science_digest(small_config())
    for name, value in SAME_SCIENCE.items():
        assert science_digest(small_config(**{name: value})) == digest, name
    others = {science_digest(small_config(**{n: v})) for n, v in OTHER_SCIENCE.items()}
    assert digest not in others and len(others) == len(OTHER_SCIENCE)
    fields = set(flatten(small_config()))
    assert set(SAME_SCIENCE) == WHERE_AND_HOW_MANY
    known = {n if n in fields else n.replace("_", ".", 1) for n in SAME_SCIENCE | OTHER_SCIENCE}
    assert known == fields, "fields that this test does not know"


# Data that does not fit


def test_no_shards_found_says_how_to_build_them(home):
    with pytest.raises(UserError) as told:
        resolve(small_config())
    assert str(home / "shards") in str(told.value) and "pipelines build --raw" in str(told.value)


def test_folder_without_a_finished_set_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no finished shard set \(no manifest.json\)"):
        resolve(small_config(data=str(tmp_path)))


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
    with pytest.raises(UserError) as told:
        resolve(dataclasses.replace(config, workers=5))
    assert "9 train samples in batches of 5 cannot feed 5 workers" in str(told.value)
    assert "--workers 4 or fewer" in str(told.value)


def test_paper_on_227_pixel_shards_is_refused_with_both_remedies(uri, tmp_path):
    with pytest.raises(UserError) as told:
        resolve(dataclasses.replace(recipes.paper(), data=uri))
    assert "--crop 256" in str(told.value) and "--augment.crop resized" in str(told.value)
    larger = write_shard_set(tmp_path / "set", train=(4,), val=(2,), side=231)
    resolve(dataclasses.replace(recipes.paper(), data=larger))


@pytest.mark.parametrize("name", ["a/b", "a'b", "a b", "../x", ""])
def test_name_that_is_no_plain_word_is_refused(uri, name):
    with pytest.raises(UserError, match="use letters, digits"):
        resolve(small_config(data=uri, name=name))


def test_a_network_that_cannot_be_built_is_refused_before_anything_starts(uri):
    with pytest.raises(UserError, match=r"width 99.0 must lie between"):
        estimate(*resolve(small_config(data=uri, model_width=99.0)))
    with pytest.raises(UserError, match="batch_norm does not go with variant 'paper'"):
        estimate(*resolve(small_config(data=uri, model_variant="paper", model_batch_norm=True)))
