"""The claims of docs/security.md that no other file tests, and that each has a test."""

import ast
import pickle
import re
import tomllib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from drawn import ROOT
from made import made_shards
from small_training import fit, small_config

from alexnet.errors import UserError
from pipelines import plan_files, report, shards, storage
from pipelines.plan import Recipe
from training.config import flatten
from training.registry.versions import load

CODE = sorted(
    path
    for folder in ("alexnet", "pipelines", "training", "benchmarks", "infra")
    for path in (ROOT / folder).rglob("*.py")
)
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Function or method → the keyword that makes it harmless, if there is one.
CALLS = {
    "eval": None,
    "exec": None,
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "yaml.load": None,
    "yaml.full_load": None,
    "yaml.unsafe_load": None,
    "mlflow.pytorch.load_model": None,
    "mlflow.pyfunc.load_model": None,
    "os.system": None,
    "os.popen": None,
}


def dangers(text: str) -> list[str]:
    """What in a program could run code that stands in data, or hand data to a shell."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), node.keywords
            values = {k.arg: k.value.value for k in keywords if isinstance(k.value, ast.Constant)}
            if name in CALLS and not ((safe := CALLS[name]) and values.get(safe[0]) is safe[1]):
                found.append(name)
            found += ["shell=True"] if values.get("shell") is True else []
    return found


def test_no_program_reads_what_could_run_code():
    assert [(path, found) for path in CODE for found in dangers(path.read_text())] == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "import cloudpickle as c",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "mlflow.pyfunc.load_model(uri)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_what_could_run_code_is_found(text):
    assert len(dangers(text)) == 1


def test_registered_model_loads_with_every_unpickler_taken_away(good_copy, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    monkeypatch.setattr(torch, "load", refused)
    assert load(str(good_copy)).wnids


# Paths


@pytest.mark.parametrize("name", ["train-../../escaped", "../train-000000", "/tmp/train-000000"])
def test_shard_named_as_a_path_is_refused(copy, name):
    readers = {"manifest.json": shards.load_manifest, "_meta/plan.json": plan_files.load}
    for file, read in readers.items():
        document = (copy / file).read_text()
        (copy / file).write_text(document.replace('"train-000000"', f'"{name}"'))
        with pytest.raises(UserError, match="is damaged"):
            read(str(copy))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("key", "../../escaped"),
        ("source", "../../secret.tar"),
        ("source", "/etc/passwd"),
        ("source", "s3://elsewhere/x"),
        ("split", "../val"),
    ],
)
def test_planned_image_that_leads_out_of_its_folder_is_refused(copy, column, value):
    plan = plan_files.load(str(copy))
    file = pq.ParquetFile(copy / "_meta" / "plan.parquet")
    with pq.ParquetWriter(copy / "_meta" / "new", file.schema_arrow) as writer:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            where = table.schema.get_field_index(column)
            values = [value, *table[column].to_pylist()[1:]]
            writer.write_table(table.set_column(where, column, pa.array(values)))
    (copy / "_meta" / "new").replace(copy / "_meta" / "plan.parquet")
    with pytest.raises(UserError):
        plan_files.read_rows(str(copy), plan.plan_id, 0)


@pytest.mark.parametrize("there", [True, False], ids=["file", "nothing"])
def test_link_in_the_place_of_a_file_is_never_written_through(tmp_path, there):
    target, link = tmp_path / "target", tmp_path / "out" / "manifest.json"
    link.parent.mkdir()
    if there:
        target.write_text("mine")
    link.symlink_to(target)
    with pytest.raises(UserError):
        storage.write_new(str(link), b"new")
    storage.write(str(link), b"new")
    assert not link.is_symlink() and link.read_bytes() == b"new"
    assert (target.read_text() if there else target.exists()) == ("mine" if there else False)


# Secrets

CANARY = "c4nary-9f2e"


def test_secrets_of_the_environment_are_in_no_file_that_is_written(
    drawn_raw, tmp_path, monkeypatch, caplog
):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("RAY_AUTH_TOKEN", CANARY)
    made_shards(drawn_raw, str(tmp_path / "out"), Recipe())
    report.report(str(tmp_path / "out"))
    config = small_config(optim_epochs=1)
    fit(config, str(tmp_path / "out"), tmp_path / "checkpoints")
    assert CANARY not in "".join(flatten(config).values()) + caplog.text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "state.json" for path in written)
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []


def test_nothing_extracts_an_archive():
    """By name: a safe way of tarfile's own came with Python 3.11.4 only."""
    calls = {"extract", "extractall", "unpack_archive"}
    assert [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*CODE, *(ROOT / "tests").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in calls
    ] == []


# Names on a terminal


def test_error_shows_control_characters_instead_of_sending_them():
    told = str(UserError("a\x1b[2J\nb\r\udc80é: not there"))
    assert told == "a\\x1b[2J\\nb\\r\\udc80é: not there"
    told.encode()


# Dependencies and documents


def test_every_dependency_is_pinned_to_one_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"[0-9!]+[0-9.]*\w*", version) for version in pins.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(name for extra in extras for name in extra)]
    names = {re.split(r"[\[>=<]", line)[0].lower() for line in asked}
    assert names <= {name.lower() for name in pins}


def test_nothing_listens_on_all_interfaces_unless_told_so():
    scripts = [*CODE, ROOT / "Makefile", *(ROOT / "infra").glob("*.sh")]
    assert [path for path in scripts if "0.0.0.0" in path.read_text()] == []


def test_every_test_named_in_the_security_document_exists():
    text = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), (file, name)
    assert text.count("\n") < 150
