"""Recipes hold what their text says, and the command line shows them."""

import dataclasses
import re

import pytest
import torch
from drawn import ROOT

from alexnet.optim import Rates
from training.command_line import parse
from training.network import build_model
from training.recipes import RECIPES, known_differences, small_parts
from training.steps import learning_rates


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
    """layers-145 of the released code, whose log counts epochs from 1, and section 5."""
    paper = RECIPES["paper"]()
    optim = paper.optim
    assert (optim.batch_size, optim.momentum, optim.weight_decay) == (128, 0.9, 5e-4)
    assert (optim.rule, optim.label_smoothing, optim.ema_decay) == ("paper", 0.0, 0.0)
    assert dataclasses.astuple(paper.augment) == ("random", True, 0.1, 67 - 1)
    assert (paper.normalise, paper.model.init, paper.precision) == ("mean", "source", "fp32")
    assert (paper.model.variant, paper.model.width, paper.compile) == ("paper", 1.0, False)
    changes = {25: 0.001, 51: 0.0001, 79: 0.00001}
    golden = [0.01]
    for epoch in range(2, 91):
        golden.append(changes.get(epoch, golden[-1]))
    assert optim.epochs == len(golden) == 90
    for step in (0, 10008):  # the first and the last of an epoch of 1.28 M images
        rates = [learning_rates(paper, e * 10009 + step, 10009) for e in range(90)]
        assert [rate.weights for rate in rates] == pytest.approx(golden)
        assert {rate.biases for rate in rates} == {0.02}
        conv1 = [*golden[: 67 - 1], *[0.00001] * 5, *[0.0] * 19]
        assert [rate.conv1_weights for rate in rates] == pytest.approx(conv1)
        assert [rate.conv1_biases for rate in rates] == [0.02] * (72 - 1) + [0.0] * 19


def test_only_the_recipe_of_the_paper_has_differences_to_tell():
    told = {recipe: known_differences(recipe) for recipe in RECIPES}
    assert [recipe for recipe in told if told[recipe]] == ["paper"]
    assert all(word in told["paper"] for word in ("LRN", "mean image", "crop", "1.1", "Lanczos"))
    assert "run.py" not in told["paper"]


def test_flags_that_recipes_offer_in_their_text_work():
    text = " ".join(" ".join(str(recipe.__doc__).split()) for recipe in RECIPES.values())
    offered = re.findall(r"`(--(?:optim|compile)[^`]+)`", text)
    assert len(offered) == 3
    for flags in offered:
        assert parse(["fast", *flags.split()]).config != RECIPES["fast"]()
    [papers_own_words] = [flags for flags in offered if "--optim.schedule" in flags]
    config = parse(["paper", *papers_own_words.split()]).config
    assert (config.optim.schedule, config.optim.plateau_drops) == ("plateau", 3)
    assert learning_rates(config, 10**6, 10_009) == Rates(0.01, 0.01, 0.01, 0.01)
    assert config.augment.colour_epochs is None


def test_flags_for_several_gpus_are_those_that_a_run_names():
    text = (ROOT / "docs" / "scaling.md").read_text()
    lines = re.findall(r"^    python training/run.py (baseline.*)", text, re.MULTILINE)
    documented = {parse(line.split()).config.workers: line.split() for line in lines}
    assert documented.keys() == {1, 2, 4, 8}
    for workers, words in documented.items():
        config = parse(words).config
        assert small_parts(config) is None
        told = small_parts(parse(["baseline", "--workers", f"{workers}"]).config)
        assert (told is None) is (workers < 4)  # 128 images for each of two
        if told is not None:
            assert told.startswith(f"{256 / workers:g} images a step are few for a GPU: pass ")
            flags = told.partition("pass ")[2].split()
            assert parse(["baseline", "--workers", f"{workers}", *flags]).config == config
    few = small_parts(parse(["paper", "--workers", "4"]).config)
    assert few is not None and few.endswith("a larger --optim.batch-size, or fewer --workers")


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_says_how_to_run_it_and_what_is_measured(recipe, capsys):
    text = str(RECIPES[recipe].__doc__)
    assert f"`python training/run.py {recipe}`" in text
    assert "nmeasured" in text or "Measured: " in text
    with pytest.raises(SystemExit):
        parse([recipe, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for line in text.splitlines():
        assert " ".join(line.split()) in shown, line
    assert all(other in shown for other in RECIPES)


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
