"""What the record of a training holds, and which data, memory, nodes and names it goes with."""

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
from training.config import (
    LONGEST_NAME,
    WHERE_AND_HOW_MANY,
    checked_name,
    flatten,
    science,
    science_digest,
)
from training.network import build_model
from training.preflight import (
    checked_place,
    estimate,
    placed,
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
    others = [{"seed": 1}, {"normalise": "mean"}, {"model_width": 0.5}, {"augment_flip": False}]
    assert len({science_digest(small_config(**other)) for other in [{}, *others]}) == 5


# Data that does not fit


def test_newest_shards_of_the_home_are_taken_and_none_says_how_to_build_them(home):
    with pytest.raises(UserError, match=rf"{home / 'shards'}.*pipelines build --raw"):
        resolve(small_config())
    for name in ("one", "two"):
        write_shard_set(home / "shards" / name, train=(4,), val=(2,))
    config, manifest = resolve(small_config(optim_batch_size=2))
    assert config.data == str(home / "shards" / "two") and manifest.num_samples("train") == 4


def test_what_flags_left_open_is_filled_in_with_absolute_places(uri, home, monkeypatch):
    monkeypatch.chdir(Path(uri).parent)
    config, _ = resolve(small_config(data="set", name=None, storage="../runs"))
    assert config.data == uri
    assert Path(str(config.storage)).is_absolute()
    assert Path(str(config.storage)).resolve() == Path(uri).parents[1] / "runs"
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


# Memory and nodes


def test_activations_are_the_tensors_that_the_layers_keep(uri):
    """Counted by hand: the input of each convolution and linear layer, what ReLU put out where that
    is not the same tensor, the places of each maximum (int64) and the masks of dropout."""
    floats = {
        "x": 3 * 227 * 227,
        "relu1": 96 * 55 * 55,
        "pool1": 96 * 27 * 27,
        "relu2": 256 * 27 * 27,
        "pool2": 256 * 13 * 13,
        "relu3 and relu4": 2 * 384 * 13 * 13,
        "relu5": 256 * 13 * 13,
        "dropout6, mask": 2 * 256 * 6 * 6,
        "relu6, dropout7, mask, relu7": 4 * 4096,
    }
    places = 96 * 27 * 27 + 256 * 13 * 13 + 256 * 6 * 6
    images = 3 * 227 * 227 * (4 + 2 * 4)  # four as uint8, two as float32
    for precision, size in (("fp32", 4), ("bf16", 2)):
        config = small_config(model_width=1.0, model_variant="ungrouped", precision=precision)
        found = estimate(config, load_manifest(uri))
        kept = size * (sum(floats.values()) + floats["relu1"]) + 8 * places
        assert (found.image, found.batch) == (kept + images, 8)


def test_weights_count_with_gradient_velocity_and_average(uri):
    manifest = load_manifest(uri)
    parameters = sum(p.numel() for p in build_model(small_config(), 4).parameters())
    plain = estimate(small_config(), manifest)
    assert (plain.parameters, plain.weights) == (parameters, 12 * parameters)
    assert plain.checkpoint == 8 * parameters
    averaged = estimate(small_config(optim_ema_decay=0.9), manifest)
    assert (averaged.weights, averaged.checkpoint) == (16 * parameters, 12 * parameters)


def test_memory_is_that_of_the_fewest_workers(uri):
    found = [
        estimate(small_config(**workers), load_manifest(uri))
        for workers in ({}, {"workers": 4}, {"workers": 4, "min_workers": 2})
    ]
    assert [each.batch for each in found] == [8, 2, 4]
    few = found[-1]
    assert few.total == few.weights + few.checkpoint + few.batch * few.image


@pytest.mark.parametrize(
    ("fields", "node", "told"),
    [
        ({"device": "cuda", "workers": 2}, {"CPU": 2.0}, "2 workers need a GPU each, the cluster "),
        ({"device": "cpu"}, {"CPU": 0.0}, "1 workers need a CPU each, no node "),
        ({"device": "cpu"}, {"memory": 9.0}, "1 workers need a CPU each, no node "),
        ({"workers": 8, "cpus_per_worker": 2}, {"CPU": 8.0}, "8 workers of 2 CPUs do not fit: "),
    ],
)
def test_workers_that_find_no_place_are_refused(fields, node, told):
    with pytest.raises(UserError, match=rf"^{told}.*"):
        placed(small_config(**fields), [node])


@pytest.mark.parametrize(
    ("fields", "nodes", "given"),
    [
        ({"device": "cpu", "workers": 1}, [{"CPU": 0.0}, {"CPU": 8.0}], (8, False)),
        ({"device": "cpu", "workers": 4}, [{"CPU": 8.0}, {"CPU": 8.0}], (4, False)),
        ({"workers": 2}, [{"CPU": 16.0, "GPU": 2.0}], (8, True)),
        ({"workers": 2}, [{"CPU": 16.0, "GPU": 1.0}], (8, False)),
        ({"workers": 8, "min_workers": 2}, [{"CPU": 16.0, "GPU": 2.0}], (8, True)),
    ],
)
def test_cpus_of_the_nodes_are_shared_among_the_workers(fields, nodes, given):
    assert placed(small_config(**fields), nodes) == given


# Names and places


@pytest.mark.parametrize("name", ["a", "fast-2.1_b", "Größe", "训练一", "प्रशिक्षण", "0"])
def test_letters_and_digits_of_any_script_make_a_name(name):
    assert checked_name(name, "--name") == name
    assert checked_name(unicodedata.normalize("NFD", name), "--name") == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "..", "-x", ".x", "x.", "../a", "a b", "a ", 'a"b', "a\nb", "a\0", "a\x1b[0m"),
        *("\udcff", "a:b", "a*", "$a", "a\\b", "😀"),
        *("a" * (LONGEST_NAME + 1), "ü" * (LONGEST_NAME // 2 + 1), "a" * 100_000),
    ],
)
def test_other_names_are_one_short_line(name):
    with pytest.raises(UserError) as told:
        checked_name(name, "--name")
    line = str(told.value)
    assert line.startswith("--name ") and line.isprintable() and len(line) < 250


def test_name_that_no_model_can_be_registered_as_is_refused_before_the_shards_are_looked_for():
    with pytest.raises(UserError, match=r"^--model-name 'a/b' is not a name"):
        resolve(dataclasses.replace(small_config(), model_name="a/b"))


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


def test_storage_whose_checkpoints_would_have_impossible_names_is_refused():
    refuse_unwritable_path("s3://b", "n")
    for place in ("s3://b/a//b", "s3://b/../b", f"s3://b/{'k' * 900}", "/a" * 2100):
        with pytest.raises(UserError, match=r"a part that is empty|1,024 at most|4,096 at most"):
            refuse_unwritable_path(place, "n")
