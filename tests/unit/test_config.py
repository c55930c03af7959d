"""What the record of a training holds, and which data it does not go with."""

import dataclasses
import tempfile
import unicodedata
from pathlib import Path

import pytest
from shard_sets import write_shard_set
from small_training import small_config

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import load_manifest
from training import recipes
from training.config import WHERE_AND_HOW_MANY, flatten, science, science_digest
from training.network import build_model
from training.preflight import (
    LONGEST_NAME,
    checked_name,
    checked_place,
    estimate,
    refuse_unwritable_path,
    resolve,
)

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


# Memory


def test_activations_are_the_tensors_that_the_layers_keep(uri):
    """Counted by hand: the input of each convolution and linear layer, what ReLU put out where that
    is not the same tensor, the places of each maximum (int64) and the masks of dropout."""
    floats = {
        "x": 3 * 227 * 227,
        "relu1": 96 * 55 * 55,
        "pool1": 96 * 27 * 27,
        "relu2": 256 * 27 * 27,
        "pool2": 256 * 13 * 13,
        "relu3": 384 * 13 * 13,
        "relu4": 384 * 13 * 13,
        "relu5": 256 * 13 * 13,
        "dropout6, mask": 2 * 256 * 6 * 6,
        "relu6, dropout7, mask, relu7": 4 * 4096,
    }
    places = 96 * 27 * 27 + 256 * 13 * 13 + 256 * 6 * 6
    config = small_config(model_width=1.0, model_variant="ungrouped")
    found = estimate(config, load_manifest(uri))
    images = 3 * 227 * 227 * (4 + 2 * 4)  # four as uint8, two as float32
    kept = 4 * sum(floats.values()) + 8 * places + 4 * floats["relu1"]
    assert (found.image, found.batch) == (kept + images, 8)
    half = estimate(small_config(model_width=1.0, precision="bf16"), load_manifest(uri))
    kept = 2 * sum(floats.values()) + 8 * places + 2 * floats["relu1"]
    assert half.image == kept + images


def test_weights_count_with_gradient_velocity_and_average(uri):
    manifest = load_manifest(uri)
    parameters = sum(p.numel() for p in build_model(small_config(), 4).parameters())
    plain = estimate(small_config(), manifest)
    assert (plain.parameters, plain.weights) == (parameters, 12 * parameters)
    assert plain.checkpoint == 8 * parameters
    averaged = estimate(small_config(optim_ema_decay=0.9), manifest)
    assert (averaged.weights, averaged.checkpoint) == (16 * parameters, 12 * parameters)


def test_memory_is_that_of_the_fewest_workers(uri):
    manifest = load_manifest(uri)
    alone = estimate(small_config(), manifest)
    assert estimate(small_config(workers=4), manifest).batch == alone.batch / 4
    few = estimate(small_config(workers=4, min_workers=2), manifest)
    assert (
        few.batch == alone.batch / 2
        and few.total == few.weights + few.checkpoint + few.batch * few.image
    )


# Names and places


@pytest.mark.parametrize("name", ["a", "fast-2.1_b", "Größe", "训练一", "प्रशिक्षण", "ชื่อ", "0"])
def test_letters_and_digits_of_any_script_make_a_name(name):
    assert checked_name(name, "--name") == name


def test_same_letters_are_one_name_however_they_are_composed():
    apart = unicodedata.normalize("NFD", "Größe")
    assert apart != "Größe" and checked_name(apart, "--name") == "Größe"


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "...", "-x", ".x", "x.", "a/b", "../a", "a b", "a ", " ", "a'b", 'a"b'),
        *("a\nb", "a\0", "a\x1b[0m", "\udcff", "a:b", "a*", "$a", "a\\b", "😀"),
        *("a" * (LONGEST_NAME + 1), "ü" * (LONGEST_NAME // 2 + 1), "a" * 100_000),
    ],
)
def test_other_names_are_one_short_line(name):
    with pytest.raises(UserError) as told:
        checked_name(name, "--name")
    line = str(told.value)
    assert line.startswith("--name ") and line.isprintable() and len(line) < 250


def test_longest_name_fits_into_a_file_system_with_all_that_we_add(tmp_path, monkeypatch):
    """As a file beside others, written by a process of the host with the longest name."""
    monkeypatch.setattr(storage.socket, "gethostname", lambda: "h" * 64)
    monkeypatch.setattr(storage.os, "getpid", lambda: 4_194_304)  # Linux' highest
    made, mkstemp = [], tempfile.mkstemp
    monkeypatch.setattr(
        storage.tempfile, "mkstemp", lambda **how: made.append(mkstemp(**how)) or made[-1]
    )
    name = checked_name("训" * (LONGEST_NAME // 3), "--name")
    storage.write(str(tmp_path / f"{name}.jsonl"), b"")
    ((_, temporary),) = made
    assert len(Path(temporary).name.encode()) <= 255


@pytest.mark.parametrize("place", ["a\nb", "a\0b", "\udcff", "x://y"])
def test_place_that_cannot_be_told_or_written_is_refused(place):
    with pytest.raises(UserError) as told:
        checked_place(place, "--storage")
    assert str(told.value).isprintable()


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("s3://b/a//b", "a part that is empty"),
        ("s3://b/../b", "a part that is empty"),
        (f"s3://b/{'k' * 900}", "1,024 at most"),
        ("/a" * 2100, "4,096 at most"),
    ],
)
def test_storage_whose_checkpoints_would_have_impossible_names_is_refused(place, told):
    refuse_unwritable_path("s3://b", "n")
    with pytest.raises(UserError, match=told):
        refuse_unwritable_path(place, "n")
