"""The command line, saved configs and their refusals, up to where anything would start."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import pytest

from alexnet.errors import UserError
from training import run
from training.command_line import again, flags_of, parse, read_config
from training.config import TrainConfig, flatten, to_dict
from training.recipes import RECIPES
from training.run import main


def config_of(*argv: str) -> TrainConfig:
    command = parse(list(argv))
    assert command.action == "train"
    return command.config


def refused(argv: list[str]) -> str:
    """The one line in which it is refused."""
    with pytest.raises(UserError) as error:
        parse(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


# Flags


def test_without_a_recipe_it_is_the_baseline_which_was_called_deck(caplog):
    caplog.set_level("INFO", "training")
    assert parse([]) == parse(["baseline"])
    assert not caplog.messages
    assert parse(["deck"]) == parse(["baseline"])
    assert caplog.messages == ["recipe deck is now called baseline"]


def test_flags_change_their_field_and_nothing_else():
    config = config_of("paper", "--optim.lr", "0.02", "--name", "mine", "--augment.flip", "False")
    assert (config.optim.lr, config.name, config.augment.flip) == (0.02, "mine", False)
    paper, found = flatten(config_of("paper")), flatten(config)
    changed = {key for key in paper if paper[key] != found[key]}
    assert changed == {"optim.lr", "name", "augment.flip"}
    assert config_of("paper", "--optim.milestones", "3", "5").optim.milestones == (3, 5)
    assert config_of("smoke", "--checkpoint-minutes", "None").checkpoint_minutes is None


@pytest.mark.parametrize(
    ("flags", "most", "least"),
    [
        (["--workers", "2:8"], 8, 2),
        (["--workers=4:4"], 4, 4),
        (["--workers", "8"], 8, None),
        (["--min_workers=3", "--workers=8"], 8, 3),
        (["--name", "2:8"], 1, None),
    ],
)
def test_workers_are_a_number_or_least_and_most(flags, most, least):
    config = config_of("smoke", *flags)
    assert (config.workers, config.min_workers) == (most, least)


# What to do


def test_actions_are_bare_flags_in_any_place():
    for argv in (["smoke", "--dry-run", "--seed", "3"], ["smoke", "--seed", "3", "--dry-run"]):
        assert (parse(argv).action, parse(argv).config.seed) == ("dry-run", 3)


def test_printed_config_is_whole_and_gives_itself_again(capsys, tmp_path):
    argv = ["paper", "--workers", "2:8", "--optim.lr", "1e-5", "--data", "s3://b/x", "--name", "n"]
    assert main([*argv, "--print-config"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == to_dict(config_of(*argv))
    del document["cache"], document["decoded_gb"], document["optim"]["dropout"]
    file = tmp_path / "config.json"
    for older in ({}, {"cache": "ram", "decode": "gpu"}):  # of releases without them, or with these
        file.write_text(json.dumps(document | older))
        assert config_of("--config", str(file)) == config_of(*argv)


def test_what_is_changed_most_has_short_names():
    short = ["smoke", "--lr", "0.5", "--batch-size", "7", "--epochs", "2"]
    assert config_of(*short) == config_of(*(w.replace("--", "--optim.") for w in short))


# Wrong flags

WRONG = [
    ("papr", "no recipe 'papr'; there are baseline, paper, fast, smoke"),
    ("smoke --rate 0.1", "--rate"),
    ("smoke --dryrun", "--dryrun; perhaps you meant --dry-run"),
    ("smoke --dry-run True", "Unrecognized options: True"),
    ("smoke --dry-run --print-config", "--print-config and --dry-run exclude each other"),
    ("smoke --config", "--config"),
    ("smoke --optim.lr fast", "--lr/--optim.lr 'fast': expected FLOAT; "),
    ("smoke --workers --device cpu", "Missing value for argument '--workers'"),
    ("smoke --min_workers one --seed 3", "--min-workers ['one']: expected {None}|INT; "),
    ("smoke --optim.milestones 1 x", "--optim.milestones ['1', 'x']: expected [INT [INT ...]]; "),
    ("smoke --workers 2:", "'2:'"),
    ("smoke --workers 8:2", "--min-workers 8 is more than --workers 2; pass --workers 2:8"),
    ("smoke --workers 2:4 --min-workers 3", "--workers=2:4 and --min-workers say the same"),
    ("smoke --model.variant vgg", "invalid choice 'vgg' for argument '--model.variant'"),
    ("smoke --workers 0", "--workers 0 is out of range; pass 1 or more"),
    ("smoke --optim.lr nan", "--optim.lr nan is not positive"),
    ("smoke --optim.ema-decay 1", "--optim.ema-decay 1.0 is out of range; pass 0 or more, below 1"),
    ("smoke --optim.weight-decay nan", "--optim.weight-decay nan is out of range"),
    ("smoke --seed 9223372036854775808", "--seed 9223372036854775808 is out of range"),
    ("smoke --checkpoint-minutes 0", "--checkpoint-minutes 0.0 is not positive; pass None"),
    ("smoke --optim.batch-size 4 --workers 8", "a batch of 4 cannot feed 8 workers; pass --optim."),
]


@pytest.mark.parametrize(("argv", "told"), WRONG, ids=[argv for argv, _ in WRONG])
def test_wrong_flags_are_refused_in_one_line(argv, told):
    assert told in refused(argv.split())


# The command to go on with


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_of_a_config_make_it_again(recipe):
    base = RECIPES[recipe]()
    assert flags_of(base, base) == []
    odd = dataclasses.replace(
        base,
        name="-n",
        data="/a folder/it's",
        workers=7,
        min_workers=2 if base.min_workers is None else None,
        checkpoint_minutes=None if base.checkpoint_minutes else 1e-9,
        register=not base.register,
        optim=dataclasses.replace(base.optim, lr=0.1 + 0.2, milestones=(3, 5), batch_size=70),
    )
    bare = dataclasses.replace(odd, optim=dataclasses.replace(base.optim, milestones=()))
    for config in (odd, bare):
        assert config_of(recipe, *flags_of(config, base)) == config


def test_command_to_go_on_is_whole_quoted_and_says_where_its_memory_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "my home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("AWS_ENDPOINT_URL", "RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    config = dataclasses.replace(RECIPES["paper"](), name="n", data="/my data", storage="s3://b/r")
    words = shlex.split(again(config))
    assert words[:3] == [
        f"ALEXNET_HOME={tmp_path / 'my home'}",
        "MLFLOW_TRACKING_URI=http://127.0.0.1:5000",
        sys.executable,
    ]
    assert Path(words[3]).resolve() == Path(run.__file__)
    assert config_of(*words[4:]) == config
    job = {"metadata": {"job_submission_id": "j"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert again(config).startswith("ray job submit --working-dir . -- python ")


# Saved configs


def saved(tmp_path: Path, *argv: str, **changes: object) -> str:
    """A config.json as a run leaves it, but for `changes`, such as optim__lr=1; ... leaves out."""
    document = to_dict(config_of(*argv))
    for name, value in changes.items():
        *groups, field = name.split("__")
        inner = document[groups[0]] if groups else document
        inner[field] = value
        if value is ...:
            del inner[field]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(document))
    return str(file)


@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_config_trains_the_same_again(tmp_path, recipe):
    argv = (recipe, "--seed", "7", "--data", "/x")
    file = saved(tmp_path, *argv)
    assert config_of(f"--config={file}") == config_of(*argv) == read_config(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "deck", "model__variant": "deck"},  # as earlier releases called it
        {"optim__warmup_epochs": 2, "checkpoint_minutes": 10},  # as JSON may have a float
    ],
)
def test_other_ways_to_write_a_config_are_the_same_config(tmp_path, changes):
    found = config_of("--config", saved(tmp_path, "baseline", **changes))
    assert flatten(found) == flatten(RECIPES["baseline"]())


def test_flags_change_a_saved_config(tmp_path):
    file = saved(tmp_path, "paper", "--seed", "7", "--workers", "2:4")
    config = config_of("paper", "--optim.lr", "0.5", "--config", file, "--name", "again")
    assert (config.seed, config.optim.lr, config.name) == (7, 0.5, "again")
    assert (config.workers, config.min_workers) == (4, 2)
    fewer = config_of("--config", file, "--workers", "1")
    assert (fewer.workers, fewer.min_workers) == (1, None)


def test_another_recipe_takes_only_where_and_how_many_from_a_saved_config(tmp_path):
    kept = ("--data", "/x", "--workers", "2:4")
    file = saved(tmp_path, "baseline", "--seed", "7", "--name", "n", *kept)
    assert config_of("paper", "--config", file) == config_of("paper", *kept)


BAD_FILES = [
    ({"a\nb": 1}, "1 unknown field(s): a\\nb; "),
    ({"augment": ...}, "4 missing field(s): augment.colour_epochs, augment.colour_sigma, "),
    ({"optim__lr": "0.01"}, "optim.lr is '0.01': it should be a valid number; "),
    ({"optim__rule": "adam"}, "optim.rule is 'adam': it should be 'torch', 'paper' or 'lars'"),
    ({"optim__milestones": [1, "2"]}, "optim.milestones.1 is '2': it should be a valid int"),
    ({"optim__lr": 10**400}, "--optim.lr inf is not positive"),
    ({"recipe": "papr"}, "no recipe 'papr'; there are baseline, paper, fast, smoke"),
    ({"name": ["x" * 5000]}, "name is ['xxx"),
]


@pytest.mark.parametrize(("changes", "told"), BAD_FILES, ids=[told for _, told in BAD_FILES])
def test_files_with_other_fields_or_values_are_refused_in_one_short_line(tmp_path, changes, told):
    file = saved(tmp_path, "paper", **changes)
    line = refused(["--config", file])
    assert line.startswith(f"{file}: {told}") and len(line) < 500


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"\xff\xfe\x00"])
def test_files_that_are_no_config_are_refused_in_one_line(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    told = ": it is not an object of fields" if content == b"[]" else " is not valid JSON ("
    assert refused(["--config", str(file)]).startswith(f"{file}{told}")
