"""What the README names is there; its commands are in test_named_commands.py."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_make_targets_of_the_readme_exist():
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", README, re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_links_of_the_readme_lead_to_files():
    links = re.findall(r"\]\((?!https:)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_dependency_has_its_reason_in_the_architecture():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = {re.split(r"[\[>]", name)[0] for name in sum(extras, project["dependencies"])}
    _, _, reasons = (ROOT / "ARCHITECTURE.md").read_text().partition("## Dependencies")
    assert wanted - set(re.findall(r"[a-z0-9-]+", reasons)) == set()
