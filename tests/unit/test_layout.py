"""The architecture as tests: who may import whom, how large a file may be.

Each rule lists all its offenders in one assertion.
"""

import ast
import re
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("alexnet", "pipelines", "training")
PATHS = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in PATHS}
LINES = {name: (ROOT / name).read_text().count("\n") for name in TREES}

# Which files may import a library that the others must not know.
ALLOWED = {
    "ray": {
        "pipelines/__init__.py",
        "pipelines/build.py",
        "pipelines/cluster.py",
        "pipelines/progress.py",
        "training/driver.py",
        "training/worker.py",
        "training/evaluate.py",
    },
    "mlflow": {
        "training/tracking.py",
        "training/runs.py",
        "training/metrics.py",
        *(f"training/registry/{name}.py" for name in ("__main__", "card", "champions", "gate")),
        *(f"training/registry/{name}.py" for name in ("package", "pyfunc_model", "versions")),
    },
    "boto3": {"pipelines/s3.py"},
    "botocore": {"pipelines/s3.py"},
    "webdataset": {"pipelines/shards.py"},
}
# training knows the shard format, storage, what is ignored by its name, what every program does at
# its ends and how figures are labelled; the driver may also join a cluster.
FROM_PIPELINES = {"command", "entries", "progress", "shards", "storage"}
JOINS_A_CLUSTER = {"training/driver.py", "training/evaluate.py"}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that are imported, anywhere in a file; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module(name: str) -> str:
    """ "training/registry/__init__.py" → "training.registry" """
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module(name): name for name in TREES}


def own_files(tree: ast.AST) -> set[str]:
    """Files of the three packages that are imported in one of them."""
    names = [(name, name.rpartition(".")[0]) for name in imports(tree)]
    found = [MODULES.get(whole) or MODULES.get(outer) for whole, outer in names]
    return {file for file in found if file}


def test_the_three_packages_and_their_imports_are_found():
    assert "training/steps.py" in own_files(TREES["training/loop.py"])
    assert {"alexnet/model.py", "pipelines/build.py"} <= set(TREES)


def test_imports_are_absolute_and_follow_the_arrow_from_alexnet_to_pipelines_to_training():
    rank = {package: number for number, package in enumerate(PACKAGES)}
    assert [
        (name, imported)
        for name, tree in TREES.items()
        for imported in imports(tree)
        if rank.get(imported.split(".")[0], 0) > rank[name.split("/")[0]]
    ] == []
    nodes = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree)]
    assert [name for name, n in nodes if isinstance(n, ast.ImportFrom) and n.level] == []


def test_training_takes_only_a_few_modules_from_pipelines():
    assert [
        (name, imported)
        for name, tree in TREES.items()
        for imported in imports(tree)
        if name.startswith("training/") and imported.startswith("pipelines.")
        if imported.split(".")[1]
        not in FROM_PIPELINES | ({"cluster"} if name in JOINS_A_CLUSTER else set())
    ] == []


def test_only_the_named_files_import_these_libraries():
    assert [
        (name, library)
        for name, tree in TREES.items()
        for library in {imported.split(".")[0] for imported in imports(tree)} & ALLOWED.keys()
        if name not in ALLOWED[library]
    ] == []


def test_no_file_has_more_than_500_lines_and_no_function_more_than_60():
    assert {name: lines for name, lines in LINES.items() if lines > 500} == {}
    assert [
        f"{name}: {node.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60
    ] == []


def test_no_files_import_each_other_in_a_circle():
    graph = {name: own_files(tree) - {name} for name, tree in TREES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_no_two_modules_have_one_name():
    stems = [Path(name).stem for name in TREES if "/__" not in name]
    stems += [path.stem for path in (ROOT / "tests").rglob("*.py") if path.stem != "conftest"]
    assert [stem for stem, count in Counter(stems).items() if count > 1] == []


def test_no_module_under_80_lines_is_used_by_a_single_other_module():
    users = Counter(used for name, tree in TREES.items() for used in own_files(tree) - {name})
    entered = (
        "__init__.py",
        "__main__.py",
        "run.py",
        "scripts.py",
        "dataset.py",
    )  # by Python and by people
    assert {
        name: lines
        for name, lines in LINES.items()
        if lines < 80 and users[name] <= 1 and not name.endswith(entered)
    } == {}


def test_the_readme_is_read_in_one_sitting():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 160 and len(readme.split()) <= 1900
    assert len((ROOT / "ARCHITECTURE.md").read_text().split()) < 900


def test_every_module_says_what_it_is_for():
    documented = {name for name, tree in TREES.items() if ast.get_docstring(tree)}
    assert [name for name in TREES.keys() - documented if not name.endswith("__main__.py")] == []


def test_no_module_is_called_utils_helpers_or_common_or_shadows_a_library():
    vague = {"utils", "helpers", "common", "manager", "base"}
    taken = {"ray", "torch", "mlflow"} | set(sys.stdlib_module_names)
    stems = {name: Path(name).stem for name in TREES}
    assert [name for name, stem in stems.items() if stem in vague] == []
    scripts_see = [name for name in TREES if str(Path(name).parent) == "training"]
    assert [name for name in scripts_see if stems[name] in taken] == []


def test_no_script_stops_every_ray_on_the_host():
    scripts = [*ROOT.glob("infra/**/*"), *PATHS, ROOT / "Makefile", ROOT / ".ci" / "run"]
    assert [
        path
        for path in scripts
        if path.is_file()
        for line in path.read_text().splitlines()
        if re.search(r"^\s*ray stop\b|&&\s*ray stop\b", line.split("#")[0])
    ] == []
