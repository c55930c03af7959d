"""Recipes hold what their text says, and the command line shows them."""

import dataclasses
import re

import pytest
import torch

from alexnet.optim import Rates
from training.command_line import parse
from training.config import TrainConfig
from training.network import build_model
from training.recipes import RECIPES
from training.steps import learning_rates

GOLDEN_EPOCHS = {0: 1e-2, 24: 1e-2, 25: 1e-3, 50: 1e-3, 51: 1e-4, 78: 1e-4, 79: 1e-5, 90: 1e-5}


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("baseline", 62_378_344), ("paper", 60_965_224), ("fast", 62_379_720), ("smoke", 4_676_256)],
)
def test_every_recipe_parses_and_builds_its_network(recipe, parameters):
    command = parse([recipe])
    assert command.config == RECIPES[recipe]() and command.action == "train"
    assert command.config.recipe == recipe
    with torch.device("meta"):
        model = build_model(command.config, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_paper_is_trained_as_its_source_says():
    paper = RECIPES["paper"]()
    optim = paper.optim
    assert (optim.batch_size, optim.epochs, optim.lr, optim.momentum) == (128, 91, 0.01, 0.9)
    assert (optim.weight_decay, optim.bias_lr_factor, optim.rule) == (5e-4, 2.0, "paper")
    assert (optim.schedule, optim.milestones) == ("step", (25, 51, 79))
    assert (optim.label_smoothing, optim.ema_decay) == (0.0, 0.0)
    assert optim.bias_lr_constant
    assert (optim.conv1_slow_epoch, optim.conv1_freeze_epoch) == (67, 72)
    assert dataclasses.astuple(paper.augment) == ("random", True, 0.1, 67)
    assert (paper.normalise, paper.model.init, paper.precision) == ("mean", "source", "fp32")
    assert (paper.model.variant, paper.model.width, paper.compile) == ("paper", 1.0, False)


def test_papers_own_words_are_a_line_of_flags_away():
    text = " ".join(str(RECIPES["paper"].__doc__).split())
    [flags] = re.findall(r"`(--optim\.schedule[^`]+)`", text)
    config = parse(["paper", *flags.split()]).config
    optim = config.optim
    assert (optim.schedule, optim.plateau_drops) == ("plateau", 3)
    assert learning_rates(config, 10**6, 10_009) == Rates(0.01, 0.01, 0.01, 0.01)
    assert config.augment.colour_epochs is None


def test_fast_is_the_modern_one():
    fast = RECIPES["fast"]()
    assert fast.model.batch_norm and fast.model.norm_group == 64 and fast.compile
    assert (fast.precision, fast.optim.rule, fast.optim.schedule) == ("bf16", "lars", "cosine")
    assert fast.optim.warmup_epochs and fast.optim.label_smoothing and fast.optim.ema_decay
    assert fast.optim.batch_size == 4096
    assert 0.05 < fast.optim.lr * fast.optim.bias_lr_factor < 0.5  # biases: a rate of plain SGD


def test_flags_that_recipes_offer_in_their_text_work():
    text = " ".join(" ".join(str(recipe.__doc__).split()) for recipe in RECIPES.values())
    offered = re.findall(r"`(--(?:optim|compile)[^`]+)`", text)
    assert len(offered) == 3
    for flags in offered:
        assert parse(["fast", *flags.split()]).config != RECIPES["fast"]()


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_says_how_to_run_it_and_what_is_measured(recipe, capsys):
    text = str(RECIPES[recipe].__doc__)
    assert f"`python training/run.py {recipe}`" in text
    assert "nmeasured" in text or "Measured: " in text
    assert text.count("\n") < 25  # one screen with its code
    with pytest.raises(SystemExit):
        parse([recipe, "--help"])
    shown = capsys.readouterr().out
    for line in text.splitlines():
        assert " ".join(line.split()) in " ".join(shown.split()), line
    for other in RECIPES.keys() - {recipe}:
        assert other in shown


@pytest.mark.parametrize("recipe", RECIPES)
def test_values_have_the_type_of_their_field(recipe):
    """A 2 where 2.0 is meant would change the digest when it is given as a flag or in a file."""

    def check(record: object) -> None:
        default = type(record)()
        for field in dataclasses.fields(record):  # type: ignore[arg-type]
            value = getattr(record, field.name)
            if dataclasses.is_dataclass(value):
                check(value)
            elif getattr(default, field.name) is not None:
                assert type(value) is type(getattr(default, field.name)), field.name

    check(RECIPES[recipe]())


def test_deck_has_no_batch_norm_and_is_the_default():
    assert parse([]).config == RECIPES["baseline"]()
    assert not RECIPES["baseline"]().model.batch_norm
    assert TrainConfig().recipe == "baseline"
