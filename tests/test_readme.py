"""What the documents tell people to type is there."""

import re
from pathlib import Path

import pytest

from pipelines import cli
from training import predict
from training.recipes import RECIPES
from training.registry import __main__ as registry
from training.run import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = README + (ROOT / "infra" / "README.md").read_text()


def test_make_targets_of_the_readme_exist():
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", README, re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize(
    "verb", sorted(set(re.findall(r"python -m pipelines ([a-z-]+)", DOCUMENTS)))
)
def test_builder_commands_of_the_documents_exist(verb, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([verb, "--help"])
    assert exit.value.code == 0
    assert f"pipelines {verb}" in capsys.readouterr().out


def test_registry_commands_of_the_readme_exist(capsys):
    [verbs] = set(re.findall(r"python -m training\.registry ([a-z\\|]+\|[a-z\\|]+)", README))
    for verb in verbs.replace("\\", "").split("|"):
        with pytest.raises(SystemExit) as exit:
            registry.main([verb, "--help"])
        assert exit.value.code == 0
    with pytest.raises(SystemExit) as exit:
        predict.main(["--help"])
    assert exit.value.code == 0


def test_recipes_of_the_readme_are_all_the_recipes():
    [named] = re.findall(r"training/run\.py \[([a-z\\|]+)\]", README)
    assert named.replace("\\", "").split("|") == list(RECIPES)


def test_training_commands_of_the_documents_parse():
    commands = re.findall(r"(?:python )?training/run\.py ((?:[a-z]+ )?--[^\n`]+)", DOCUMENTS)
    assert commands
    for command in commands:
        parse([word for word in command.split() if word != "["])


def test_links_of_the_readme_lead_to_files():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
