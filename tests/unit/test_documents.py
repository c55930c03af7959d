"""What documents say is so: their commands are taken, their tables printed, their names there."""

import ast
import re
import shlex

from drawn import ROOT
from manifest_commands import CommandError, check_command
from manifests import exported_metrics

from benchmarks import cost_estimate, gate_power, scaling, summary
from training.recipes import RECIPES

PROGRAMS = r"(?:python (?:-m |training/|-c )|ray |mlflow |make |ALEXNET_\w+=)"
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "infra" / "README.md"]
PRODUCT = [p for f in ("alexnet", "pipelines", "training") for p in (ROOT / f).rglob("*.py")]
# As people read them: a value of the kind that the program wants.
MEANT = {
    "N": "2",
    "RECIPE": "baseline",
    "NAME=USD": "p5.48xlarge=60",
    "IMAGE": "cat.jpg",
    "flags": "",
    "python …": "python -m pipelines status",
    "training/run.py …": "training/run.py",
}


def in_documents() -> set[str]:
    """Of indented lines and of code within them, with each alternative of `a\\|b`."""
    found: set[str] = set()
    for path in DOCUMENTS:
        text = path.read_text()
        found |= set(
            re.findall(rf"^ {{4}}({PROGRAMS}.*?)(?: {{2,}}# .*| {{4,}}# .*)?$", text, re.M)
        )
        found |= set(re.findall(rf"`({PROGRAMS}[^`\n]*)`", text))
    return {each for command in found for each in alternatives(command)}


def alternatives(command: str) -> list[str]:
    choice = re.search(r"(?<![\w…])\[?([\w…-]+(?:\\\|[\w…-]+)+)\]?", command)
    if choice is None:
        return [command]
    before, after = command[: choice.start()], command[choice.end() :]
    return [f"{before}{word}{after}" for word in choice[1].split("\\|")]


def in_product() -> set[str]:
    """Of strings, with x for what is filled in; docstrings too."""
    found: set[tuple[str, str]] = set()
    for path in PRODUCT:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        formed = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
        parts = {part for values in formed for part in values}
        plain = [[node] for node in nodes if isinstance(node, ast.Constant) and node not in parts]
        for values in [*formed, *plain]:
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "x" for v in values)
            found |= set(re.findall(rf"`({PROGRAMS}[^`]*)`|^next: ({PROGRAMS}.*)", text))
    return {quoted or told for quoted, told in found}


def in_demo() -> set[str]:
    """What infra/demo.sh prints at its end, the shell's own commands left out."""
    text = (ROOT / "infra" / "demo.sh").read_text().replace("\\$", "$")
    [printed] = re.findall(r"<<EOF\n(.*?)^EOF$", text, re.DOTALL | re.MULTILINE)
    return set(re.findall(rf"^  ({PROGRAMS}.*?)(?: +#.*)?$", printed, re.MULTILINE))


def test_every_program_takes_the_commands_that_name_it() -> None:
    documents, product, demo = in_documents(), in_product(), in_demo()
    assert len(documents) > 50 and len(demo) == 2
    assert "python -m pipelines verify x --repair" in product
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    refused = []
    for command in sorted(documents | product | demo):
        words = meant(command)
        if words[0] == "make":
            refused += [] if words[1] in targets else [command]
            continue
        try:
            try:
                check_command(words)
            except CommandError:
                if any(word.startswith("--") for word in words):
                    raise
                check_command([*words, "--help"])  # the name of a command, not all of it
        except CommandError as error:
            refused.append(f"{command}: {error}")
    assert refused == []


def meant(command: str) -> list[str]:
    command = re.sub(r"(?<= )\[|\](?= |$)", "", command)
    for word, value in MEANT.items():
        command = re.sub(rf"(?<!\S){re.escape(word)}(?!\S)", value, command)
    return shlex.split(command.replace("…", "x"))


def test_recipes_of_the_readme_are_all_the_recipes() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| recipe |") :].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == list(RECIPES)


def test_links_of_the_documents_lead_to_files() -> None:
    found = [
        (path, link)
        for path in DOCUMENTS
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text())
    ]
    assert len(found) > 15
    assert [(path, link) for path, link in found if not (path.parent / link).exists()] == []


def test_metrics_of_the_operations_page_are_those_of_the_code() -> None:
    document = (ROOT / "docs" / "operations.md").read_text()
    told = set()
    for row in re.findall(r"^\| (`ray_alexnet.*?) \|", document, re.MULTILINE):
        first, *others = re.findall(r"`([\w…]+)`", row)
        prefix = re.match(r"ray_alexnet_(?:build|train)_", first)[0]
        told |= {first} | {name.replace("…_", prefix) for name in others if "…_" in name}
    assert told == set(exported_metrics())


def test_tables_of_the_documents_are_those_that_are_printed(capsys) -> None:
    printed = ((cost_estimate, "operations"), (gate_power, "operations"), (scaling, "scaling"))
    for program, path in printed:
        assert program.main([]) == 0
        assert capsys.readouterr().out in (ROOT / "docs" / f"{path}.md").read_text()
    _, _, rest = summary.README.read_text().partition(summary.BEGIN)
    shown = rest.partition(summary.END)[0]
    assert shown.strip() == summary.document().strip(), "run: python -m benchmarks.summary --write"
