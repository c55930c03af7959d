"""A saved config trains the same again, and nothing that is none is taken for one."""

import json
from pathlib import Path

import pytest

from alexnet.errors import UserError
from training.command_line import parse, read_config
from training.config import TrainConfig, science_digest, to_dict
from training.recipes import RECIPES


def config_of(*argv: str) -> TrainConfig:
    command = parse(list(argv))
    assert command.action == "train"
    return command.config


def saved(tmp_path: Path, *argv: str, change=lambda document: None) -> str:
    """A config.json as a run leaves it, with `change` made to its document."""
    document = to_dict(config_of(*argv))
    change(document)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(document, indent=2))
    return str(file)


@pytest.mark.parametrize("recipe", ["baseline", "paper", "fast", "smoke"])
def test_saved_config_trains_the_same_again(tmp_path, recipe):
    file = saved(tmp_path, recipe, "--seed", "7", "--data", "/x")
    again = config_of(f"--config={file}")
    assert again == config_of(recipe, "--seed", "7", "--data", "/x") == read_config(file)
    assert science_digest(again) == science_digest(config_of(recipe, "--seed", "7"))


def test_config_of_an_earlier_release_is_read_by_its_present_names(tmp_path):
    def former(document):
        document["recipe"] = document["model"]["variant"] = "deck"

    assert (
        config_of("--config", saved(tmp_path, "baseline", change=former)) == RECIPES["baseline"]()
    )


def test_flags_change_a_saved_config(tmp_path):
    file = saved(tmp_path, "paper", "--seed", "7", "--workers", "2:4")
    config = config_of("paper", "--optim.lr", "0.5", "--config", file, "--name", "again")
    assert (config.seed, config.optim.lr, config.name) == (7, 0.5, "again")
    assert (config.workers, config.min_workers) == (4, 2)
    fewer = config_of("--config", file, "--workers", "1")
    assert (fewer.workers, fewer.min_workers) == (1, None)
    assert parse(["--config", file, "--dry-run"]).action == "dry-run"


def test_another_recipe_takes_only_where_and_how_many_from_a_saved_config(tmp_path):
    file = saved(
        tmp_path, "baseline", "--seed", "7", "--data", "/x", "--name", "n", "--workers", "2:4"
    )
    config = config_of("paper", "--config", file)
    assert config == config_of("paper", "--data", "/x", "--workers", "2:4")


def test_whole_number_for_a_float_is_the_same_config(tmp_path):
    def whole(document):
        document["optim"]["warmup_epochs"] = 2
        document["checkpoint_minutes"] = 10

    config = config_of("--config", saved(tmp_path, "baseline", change=whole))
    assert config == config_of("baseline")
    assert science_digest(config) == science_digest(config_of("baseline"))


def changed(name: str, value: object):
    def change(document):
        *groups, field = name.split(".")
        for group in groups:
            document = document[group]
        document[field] = value

    return change


def without(name: str):
    def change(document):
        *groups, field = name.split(".")
        for group in groups:
            document = document[group]
        del document[field]

    return change


BAD_FILES = [
    (changed("colour", 1), "1 unknown field(s): colour; "),
    (without("seed"), "1 missing field(s): seed; "),
    (without("augment"), "4 missing field(s): augment.colour_epochs, augment.colour_sigma, "),
    (changed("more", {}), "1 unknown field(s): more; "),
    (changed("optim.lr", "0.01"), "optim.lr is '0.01': it should be a valid number; "),
    (changed("optim.epochs", 3.5), "optim.epochs is 3.5: it should be a valid integer; "),
    (
        changed("optim.rule", "adam"),
        "optim.rule is 'adam': it should be 'torch', 'paper' or 'lars'",
    ),
    (changed("optim.milestones", [1, "2"]), "optim.milestones.1 is '2': it should be a valid int"),
    (changed("optim.lr", 10**400), "--optim.lr inf is not positive"),
    (changed("recipe", "papr"), "no recipe 'papr'; there are baseline, paper, fast, smoke"),
    (changed("seed", -1), "--seed -1 is out of range; pass 0 or more"),
]


@pytest.mark.parametrize(("change", "told"), BAD_FILES, ids=[told for _, told in BAD_FILES])
def test_files_with_other_fields_or_values_are_refused_in_one_line(tmp_path, change, told):
    file = saved(tmp_path, "paper", change=change)
    with pytest.raises(UserError) as refused:
        parse(["--config", file])
    assert str(refused.value).startswith(f"{file}: {told}") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not valid JSON (Expecting property name"),
        ("", "is not valid JSON (Expecting value"),
        ("[]", ": it is not an object of fields"),
        ("[" * 100_000, "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON ("),
    ],
)
def test_files_that_are_no_config_are_refused_in_one_line(tmp_path, content, told):
    file = tmp_path / "config.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as refused:
        parse(["--config", str(file)])
    assert f"{file}" in str(refused.value) and told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed("a\nb", 1), "1 unknown field(s): a\\nb; "),
        (changed("name", ["x" * 5000]), "name is ['xxx"),
    ],
    ids=["line end", "long"],
)
def test_odd_values_are_told_in_one_short_line(tmp_path, change, told):
    with pytest.raises(UserError) as refused:
        read_config(saved(tmp_path, "paper", change=change))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
