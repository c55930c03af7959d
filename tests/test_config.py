"""The command line and its refusals, up to the moment where Ray would start."""

import dataclasses
from pathlib import Path

import pytest
from shard_sets import write_shard_set
from small_training import small_config

from alexnet.errors import UserError
from training.config import TrainConfig, flatten, science_digest, to_dict
from training.loop import build_model
from training.recipes import RECIPES
from training.run import main, parse, resolve


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("config") / "set", train=(5, 4), val=(3,))


# Recipes


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("deck", 62_378_344), ("paper", 60_965_224), ("fast", None), ("smoke", None)],
)
def test_every_recipe_parses_and_builds_its_network(recipe, parameters):
    config = parse([recipe])
    assert config == RECIPES[recipe]() and config.recipe == recipe
    if parameters is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, width=1 / 32))
    model = build_model(config, 1000)
    count = sum(p.numel() for p in model.parameters())
    assert parameters in (None, count)


def test_paper_is_trained_as_its_source_says():
    paper = parse(["paper"])
    optim = paper.optim
    assert (optim.batch_size, optim.epochs, optim.lr, optim.momentum) == (128, 91, 0.01, 0.9)
    assert (optim.weight_decay, optim.bias_lr_factor) == (5e-4, 2.0)
    assert (optim.schedule, optim.milestones, optim.label_smoothing) == ("step", (25, 51, 79), 0.0)
    assert dataclasses.astuple(paper.augment) == ("random", True, 0.1)
    assert (paper.normalise, paper.model.init, paper.precision) == ("mean", "source", "fp32")


def test_without_a_recipe_it_is_deck():
    assert parse([]) == parse(["deck"])
    assert parse(["--workers", "2"]) == dataclasses.replace(parse(["deck"]), workers=2)


def test_flags_change_their_field_and_nothing_else():
    config = parse(["paper", "--optim.lr", "0.02", "--name", "mine", "--augment.flip", "False"])
    assert (config.optim.lr, config.name, config.augment.flip) == (0.02, "mine", False)
    paper, found = flatten(parse(["paper"])), flatten(config)
    changed = {key for key in paper if paper[key] != found[key]}
    assert changed == {"optim.lr", "name", "augment.flip"}
    assert parse(["paper", "--optim.milestones", "3", "5"]).optim.milestones == (3, 5)
    assert parse(["smoke", "--register", "False"]).register is False


def test_help_shows_the_recipe_and_leaves_with_zero(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["paper", "--help"])
    assert left.value.code in (0, None)
    text = capsys.readouterr().out
    assert "--optim.batch-size" in text and "Krizhevsky 2012" in text


# Wrong flags

WRONG = [
    (["papr"], "no recipe 'papr'; there are deck, paper, fast, smoke"),
    (["smoke", "--lr", "0.1"], "--lr"),
    (["smoke", "--optim.learning-rate", "0.1"], "--optim.learning-rate"),
    (["smoke", "more"], "more"),
    (["smoke", "--recipe", "fast"], "--recipe"),
    (["smoke", "--optim.lr", "fast"], "could not convert string to float: 'fast'"),
    (["smoke", "--workers", "1.5"], "--workers"),
    (["smoke", "--model.variant", "vgg"], "invalid choice 'vgg' for argument '--model.variant'"),
    (["smoke", "--model.variant", "vgg"], "('deck', 'paper')"),
    (["smoke", "--optim.epochs"], "--optim.epochs"),
    (["smoke", "--workers", "0"], "--workers 0 is out of range; pass 1 or more"),
    (["smoke", "--optim.batch-size", "0"], "--optim.batch-size 0 is out of range"),
    (["smoke", "--optim.epochs", "-3"], "--optim.epochs -3 is out of range"),
    (["smoke", "--optim.lr", "0"], "--optim.lr 0.0 is not positive"),
    (["smoke", "--optim.lr", "nan"], "--optim.lr nan is not positive"),
    (["smoke", "--optim.lr", "inf"], "--optim.lr inf is not positive"),
    (["smoke", "--optim.momentum", "1"], "--optim.momentum 1.0 is out of range"),
    (["smoke", "--optim.label-smoothing", "-0.1"], "--optim.label-smoothing -0.1 is out of range"),
    (["smoke", "--optim.weight-decay", "nan"], "--optim.weight-decay nan is out of range"),
    (["smoke", "--optim.bias-lr-factor", "-1"], "--optim.bias-lr-factor -1.0 is out of range"),
    (["smoke", "--optim.warmup-epochs", "-1"], "--optim.warmup-epochs -1.0 is out of range"),
    (["smoke", "--augment.colour-sigma", "-1"], "--augment.colour-sigma -1.0 is out of range"),
    (["smoke", "--seed", "9223372036854775808"], "--seed 9223372036854775808 is out of range"),
    (["smoke", "--seed", "-1"], "--seed -1 is out of range; pass 0 or more"),
    (["smoke", "--log-steps", "0"], "--log-steps 0 is out of range"),
    (["smoke", "--checkpoint-steps", "0"], "--checkpoint-steps 0 is out of range"),
    (["smoke", "--cpus-per-worker", "0"], "--cpus-per-worker 0 is out of range"),
    (["smoke", "--flat-loss-steps", "-1"], "--flat-loss-steps -1 is out of range"),
    (["smoke", "--cache-gb", "-1"], "--cache-gb -1.0 is out of range"),
    (
        ["smoke", "--optim.batch-size", "4", "--workers", "8"],
        "a batch of 4 cannot feed 8 workers; pass --optim.batch-size 8 or more, or fewer --workers",
    ),
]


@pytest.mark.parametrize(("argv", "told"), WRONG, ids=[" ".join(argv) for argv, _ in WRONG])
def test_wrong_flags_give_one_line_and_exit_code_2(argv, told, capsys, home):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and told in err
    assert err.count("\n") == 1 and err.endswith("\n")
    assert not home.exists(), "refused only after something was written"


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
    assert str(config.name).startswith("deck-2")
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
        resolve(dataclasses.replace(parse(["paper"]), data=uri))
    assert "--crop 256" in str(told.value) and "--augment.crop resized" in str(told.value)
    larger = write_shard_set(tmp_path / "set", train=(4,), val=(2,), side=231)
    resolve(dataclasses.replace(parse(["paper"]), data=larger))


@pytest.mark.parametrize("name", ["a/b", "a'b", "a b", "../x", ""])
def test_name_that_is_no_plain_word_is_refused(uri, name):
    if name == "":
        assert resolve(small_config(data=uri, name=""))[0].name != ""
        return
    with pytest.raises(UserError, match="use letters, digits"):
        resolve(small_config(data=uri, name=name))


# The record


def test_record_is_whole_flat_and_json():
    config = small_config(optim_milestones=(1, 2))
    assert to_dict(config)["optim"]["milestones"] == [1, 2]
    flat = flatten(config)
    assert (flat["optim.milestones"], flat["model.variant"], flat["storage"]) == (
        "[1, 2]",
        "deck",
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
    "optim_batch_size": 9,
    "optim_epochs": 3,
    "optim_lr": 0.5,
    "optim_momentum": 0.5,
    "optim_weight_decay": 0.5,
    "optim_bias_lr_factor": 3.0,
    "optim_schedule": "step",
    "optim_milestones": (1,),
    "optim_warmup_epochs": 0.5,
    "optim_label_smoothing": 0.5,
    "augment_crop": "centre",
    "augment_flip": False,
    "augment_colour_sigma": 0.5,
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
    "checkpoint_steps": 5,
    "log_steps": 7,
    "cache_gb": 1.0,
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
    known = {n if n in fields else n.replace("_", ".", 1) for n in SAME_SCIENCE | OTHER_SCIENCE}
    assert known == fields, "fields that this test does not know"


def test_a_network_that_cannot_be_built_is_refused_before_anything_starts(tmp_path, capsys, home):
    data = write_shard_set(tmp_path / "shards")
    assert main(["smoke", "--data", data, "--model.width", "99"]) == 2
    assert "width 99.0 must lie between" in capsys.readouterr().err
    assert main(["paper", "--data", data, "--model.batch-norm", "True"]) == 2
    assert "batch_norm does not go with variant 'paper'" in capsys.readouterr().err
