"""The command line and its refusals, up to the moment where anything would start."""

import ast
import dataclasses
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from alexnet.errors import UserError
from training import config as config_module
from training import run
from training.command_line import again, flags_of, parse
from training.config import TrainConfig, flatten, to_dict
from training.recipes import RECIPES
from training.run import main


def config_of(*argv: str) -> TrainConfig:
    command = parse(list(argv))
    assert command.action == "train"
    return command.config


# Flags


def test_without_a_recipe_it_is_the_baseline_which_was_called_deck(caplog):
    assert parse([]) == parse(["baseline"])
    assert not caplog.messages
    caplog.set_level("INFO", "training")
    assert parse(["deck"]) == parse(["baseline"])
    assert caplog.messages == ["recipe deck is now called baseline"]
    assert config_of("--log-steps", "2") == dataclasses.replace(config_of("baseline"), log_steps=2)


def test_flags_change_their_field_and_nothing_else():
    config = config_of("paper", "--optim.lr", "0.02", "--name", "mine", "--augment.flip", "False")
    assert (config.optim.lr, config.name, config.augment.flip) == (0.02, "mine", False)
    paper, found = flatten(config_of("paper")), flatten(config)
    changed = {key for key in paper if paper[key] != found[key]}
    assert changed == {"optim.lr", "name", "augment.flip"}
    assert config_of("paper", "--optim.milestones", "3", "5").optim.milestones == (3, 5)
    assert config_of("smoke", "--register", "False").register is False
    assert config_of("smoke", "--checkpoint-minutes", "None").checkpoint_minutes is None


@pytest.mark.parametrize(
    ("flags", "most", "least"),
    [
        (["--workers", "2:8"], 8, 2),
        (["--workers=2:8"], 8, 2),
        (["--workers", "4:4"], 4, 4),
        (["--workers", "8"], 8, None),
        (["--workers", "8", "--min-workers", "3"], 8, 3),
        (["--min_workers=3", "--workers=8"], 8, 3),
        (["--name", "2:8"], 1, None),
    ],
)
def test_workers_are_a_number_or_least_and_most(flags, most, least):
    config = config_of("smoke", *flags)
    assert (config.workers, config.min_workers) == (most, least)


def test_every_field_is_in_the_help_with_its_meaning_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100000")
    with pytest.raises(SystemExit) as left:
        parse(["paper", "--help"])
    assert left.value.code in (0, None)
    text = capsys.readouterr().out
    meanings = {
        name: node.value.value
        for kind in ast.parse(inspect.getsource(config_module)).body
        if isinstance(kind, ast.ClassDef)
        for name, node in zip(
            [getattr(before, "target", None) and before.target.id for before in kind.body],
            kind.body[1:],
            strict=False,
        )
        if name and isinstance(node, ast.Expr)
    }
    defaults = flatten(config_of("paper"))
    for name in defaults.keys() - {"recipe"}:
        flag = "--" + name.replace("_", "-")
        meaning = meanings[name.split(".")[-1]]
        assert "\n" not in meaning, "one line of help each"
        # In a column of its own, as the description above does not name it.
        (found,) = re.finditer(rf"(?:  |[│|] ){flag} .*$", text, re.MULTILINE)
        following = text[found.start() :]
        assert meaning in following[: len(found[0]) + 400], flag
    assert "(default: 128)" in text and "(default: 24 50 78)" in text
    assert {"--config", "--print-config", "--dry-run"} <= set(text.split())


# What to do


def test_actions_are_bare_flags_in_any_place():
    assert parse(["smoke", "--dry-run", "--seed", "3"]).action == "dry-run"
    assert parse(["--print-config"]).action == "print"
    assert parse(["smoke", "--seed", "3", "--dry-run"]).config.seed == 3


def test_printed_config_is_whole_and_gives_itself_again(capsys, tmp_path):
    argv = ["paper", "--workers", "2:8", "--optim.lr", "1e-5", "--data", "s3://b/x", "--name", "n"]
    assert main([*argv, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == to_dict(config_of(*argv))
    file = tmp_path / "config.json"
    file.write_text(printed)
    assert config_of("--config", str(file)) == config_of(*argv)
    document = json.loads(printed)
    del document["cache"], document["decoded_gb"]
    for older in ({}, {"cache": "ram", "decode": "gpu"}):  # of releases without them, or with these
        file.write_text(json.dumps(document | older))
        assert config_of("--config", str(file)) == config_of(*argv)


# Wrong flags

WRONG = [
    ("papr", "no recipe 'papr'; there are baseline, paper, fast, smoke"),
    ("smoke --lr 0.1", "--lr"),
    ("smoke --recipe fast", "--recipe"),
    ("smoke --dryrun", "--dryrun; perhaps you meant --dry-run"),
    ("smoke --dry-run True", "Unrecognized options: True"),
    ("smoke --dry-run --print-config", "--print-config and --dry-run exclude each other"),
    ("smoke --config", "--config"),
    ("smoke --optim.lr fast", "--optim.lr 'fast': expected FLOAT; "),
    ("smoke --workers two", "--workers 'two': expected INT; "),
    ("smoke --workers --device cpu", "Missing value for argument '--workers'"),
    ("smoke --min_workers one --seed 3", "--min-workers ['one']: expected {None}|INT; "),
    ("smoke --optim.milestones 1 x", "--optim.milestones ['1', 'x']: expected [INT [INT ...]]; "),
    ("smoke --workers 2:", "'2:'"),
    ("smoke --workers 8:2", "--min-workers 8 is more than --workers 2; pass --workers 2:8"),
    ("smoke --workers 0:2", "--min-workers 0 is out of range; pass 1 or more"),
    ("smoke --workers 2:4 --min-workers 3", "--workers=2:4 and --min-workers say the same"),
    ("smoke --model.variant vgg", "invalid choice 'vgg' for argument '--model.variant'"),
    ("smoke --workers 0", "--workers 0 is out of range; pass 1 or more"),
    ("smoke --optim.batch-size 0", "--optim.batch-size 0 is out of range"),
    ("smoke --optim.lr 0", "--optim.lr 0.0 is not positive"),
    ("smoke --optim.lr nan", "--optim.lr nan is not positive"),
    ("smoke --optim.lars-trust 0", "--optim.lars-trust 0.0 is not positive; its paper takes 0.001"),
    ("smoke --optim.momentum 1", "--optim.momentum 1.0 is out of range"),
    ("smoke --optim.ema-decay 1", "--optim.ema-decay 1.0 is out of range; pass 0 or more, below 1"),
    ("smoke --optim.weight-decay nan", "--optim.weight-decay nan is out of range"),
    ("smoke --optim.plateau-epochs 0", "--optim.plateau-epochs 0 is out of range; pass 1 or more"),
    ("smoke --model.norm-group -1", "--model.norm-group -1 is out of range; pass 0 or more"),
    ("smoke --seed 9223372036854775808", "--seed 9223372036854775808 is out of range"),
    ("smoke --seed -1", "--seed -1 is out of range; pass 0 or more"),
    ("smoke --checkpoint-minutes 0", "--checkpoint-minutes 0.0 is not positive; pass None"),
    ("smoke --keep-last 0", "--keep-last 0 is out of range; pass 1 or more"),
    ("smoke --cache-gb -1", "--cache-gb -1.0 is out of range"),
    ("smoke --decoded-gb -1", "--decoded-gb -1.0 is out of range"),
    ("smoke --cache ram", "--cache"),
    (
        "smoke --optim.batch-size 4 --workers 8",
        "a batch of 4 cannot feed 8 workers; pass --optim.batch-size 8 or more, or fewer --workers",
    ),
]


@pytest.mark.parametrize(("argv", "told"), WRONG, ids=[argv for argv, _ in WRONG])
def test_wrong_flags_are_refused_in_one_line(argv, told):
    with pytest.raises(UserError) as refused:
        parse(argv.split())
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_wrong_flags_give_exit_code_2_and_write_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "home"))
    for argv in (["smoke", "--lr", "0.1"], ["papr"], ["--config", str(tmp_path / "gone")]):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ")
        assert err.count("\n") == 1 and err.endswith("\n")
    assert not (tmp_path / "home").exists()


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
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
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
