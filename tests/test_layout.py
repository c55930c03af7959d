"""The architecture as tests: who may import whom, and that importing does nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("alexnet", "pipelines", "training")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

# Those of training/registry that speak to MLflow.
REGISTRY = (
    *("__main__", "alias", "card", "compare", "gate", "lineage", "listing", "package"),
    *("pyfunc_model", "versions"),
)
# Which files may import a library that the others must not know.
ALLOWED = {
    "ray": {
        "pipelines/build.py",
        "pipelines/cluster.py",
        "pipelines/metrics.py",
        "training/metrics.py",
        "training/run.py",
        "training/worker.py",
        "training/scoring.py",
    },
    "mlflow": {
        "training/tracking.py",
        *(f"training/registry/{name}.py" for name in REGISTRY),
    },
    "boto3": {"pipelines/s3.py"},
    "botocore": {"pipelines/s3.py"},
}
# training knows the shard format, storage, what is ignored by its name, what every program does at
# its ends and how figures are labelled; the script may also join a cluster.
FROM_PIPELINES = {"command", "entries", "metrics", "shards", "storage"}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_three_packages_are_found():
    assert {"alexnet/model.py", "pipelines/build.py", "training/loop.py"} <= set(NAMES)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_follow_the_arrow_from_alexnet_to_pipelines_to_training(path):
    rank = PACKAGES.index(path.relative_to(ROOT).parts[0])
    later = PACKAGES[rank + 1 :]
    assert [name for name in imports(path) if name.split(".")[0] in later] == []


@pytest.mark.parametrize("path", sorted((ROOT / "training").rglob("*.py")), ids=lambda p: p.name)
def test_training_takes_only_a_few_modules_from_pipelines(path):
    used = {name.split(".")[1] for name in imports(path) if name.startswith("pipelines.")}
    allowed = FROM_PIPELINES | ({"cluster"} if path.name in ("run.py", "scoring.py") else set())
    assert used <= allowed


@pytest.mark.parametrize("library", ALLOWED)
def test_only_the_named_files_import_the_library(library):
    users = {
        name
        for name, path in zip(NAMES, FILES, strict=True)
        if any(module.split(".")[0] == library for module in imports(path))
    }
    assert users <= ALLOWED[library]


def test_importing_the_model_loads_no_ray_mlflow_or_boto3():
    code = "import sys, alexnet.model; print({'ray', 'mlflow', 'boto3'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_importing_every_module_makes_no_file_starts_no_ray_and_prints_nothing(tmp_path):
    modules = [name.removesuffix(".py").replace("/", ".") for name in NAMES]
    modules = [name for name in modules if not name.endswith("__main__")]
    code = (
        "import sys, importlib, logging, threading, os\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "path, env = list(sys.path), set(k for k in os.environ if k.startswith('ALEXNET'))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import ray\n"
        "assert not ray.is_initialized()\n"
        "assert [p for p in sys.path if p in path] == path, 'sys.path changed'\n"
        "assert env == set(k for k in os.environ if k.startswith('ALEXNET')), 'env changed'\n"
        "assert not logging.getLogger('training').handlers, 'logging configured'\n"
    )
    home = tmp_path / "home"
    work = tmp_path / "work"
    home.mkdir()
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=work,
        env={"PATH": "/usr/bin:/bin", "HOME": str(home), "MPLCONFIGDIR": str(tmp_path / "mpl")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(work.iterdir()) == []
    assert not (home / ".alexnet").exists()


def test_no_file_has_more_than_500_lines_and_no_function_more_than_60():
    texts = {name: path.read_text() for name, path in zip(NAMES, FILES, strict=True)}
    assert [name for name, text in texts.items() if text.count("\n") > 500] == []
    assert [
        f"{name}: {node.name}"
        for name, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60
    ] == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text())) or path.name == "__main__.py"


def test_no_module_is_called_utils_helpers_or_common_or_shadows_a_library():
    stems = {path.stem for path in FILES}
    assert not stems & {"utils", "helpers", "common", "manager", "base"}
    inside_training = {path.stem for path in FILES if path.parent.name == "training"}
    assert not inside_training & ({"ray", "torch", "mlflow"} | set(sys.stdlib_module_names))


def test_no_script_stops_every_ray_on_the_host():
    scripts = [*ROOT.glob("infra/**/*"), *FILES, ROOT / "Makefile", ROOT / ".ci" / "run"]
    for path in scripts:
        if path.is_file():
            commands = [line.split("#")[0] for line in path.read_text().splitlines()]
            assert not any(re.search(r"^\s*ray stop\b|&&\s*ray stop\b", c) for c in commands), path


def test_the_file_tree_in_the_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    missing = [name for name in NAMES if Path(name).stem not in ("__init__", "__main__")]
    missing = [name for name in missing if f"{Path(name).name}" not in readme]
    assert missing == []
