"""The gate's check of a model as users get it: by mlflow.pyfunc, in a process of its own."""

import hashlib
import importlib.util
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest
from gated import FORCED, enter_whole_copy, files_of
from registered import GOOD, MLFLOW_WARNINGS

from alexnet.errors import UserError
from pipelines.shards import load_index
from training import tracking
from training.registry import checks, gate
from training.registry.versions import NAME, load

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]


def test_model_as_used_in_a_fresh_process_says_what_the_network_says(
    registered_models, home, monkeypatch
):
    enter_whole_copy(registered_models, home, monkeypatch)
    uri, model = f"models:/{NAME}/{GOOD}", load(f"models:/{NAME}/{GOOD}")
    images = gate._some_images(registered_models.data)
    assert len(images) == 8 and all(content[:2] == b"\xff\xd8" for content in images)
    found = checks.as_used(uri, tracking.tracking_uri(), model, images)
    assert (found.value, found.passed) == ("8 of 8 images alike", True)


def test_model_that_cannot_be_used_is_told_in_one_line(registered_models, home, monkeypatch):
    client = enter_whole_copy(registered_models, home, monkeypatch)
    model = load(f"models:/{NAME}/{GOOD}")
    (files_of(client, GOOD) / "artifacts" / "alexnet.json").unlink()
    found = checks.as_used(
        f"models:/{NAME}/{GOOD}",
        tracking.tracking_uri(),
        model,
        gate._some_images(registered_models.data),
    )
    assert not found.passed and "artifacts/alexnet.json missing" in found.value
    assert "\n" not in found.value
    with pytest.raises(UserError, match="it cannot be used: ") as told:
        checks.in_fresh_process(files_of(client, GOOD), tracking.tracking_uri(), [b"x"])
    assert "\n" not in str(told.value)


def planted(folder: Path, mark: Path) -> Path:
    """A .pyc of alexnet.model that Python takes for current whatever the source is, and that
    creates `mark` where it runs."""
    source = folder / "code" / "alexnet" / "model.py"
    evil = mark.with_suffix(".py")
    evil.write_text(f"open({str(mark)!r}, 'w').close()\n{source.read_text()}")
    return Path(
        py_compile.compile(
            str(evil),
            cfile=importlib.util.cache_from_source(str(source)),
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    )


def test_planted_compiled_code_is_refused_also_by_force_and_never_runs(
    registered_models, home, tmp_path, monkeypatch
):
    client = enter_whole_copy(registered_models, home, monkeypatch)
    mark, folder = tmp_path / "mark", files_of(client, GOOD)
    uri = f"models:/{NAME}/{GOOD}"
    model = load(uri)
    pyc = planted(folder, mark)
    found = gate.promote(client, GOOD, FORCED)
    assert [check.name for check in found.checks if not check.passed] == ["files"]
    assert "model.cpython" in found.reason and "__pycache__" in found.reason
    images = gate._some_images(registered_models.data)
    used = checks.as_used(uri, tracking.tracking_uri(), model, images)
    assert not used.passed and "__pycache__" in used.value
    # And where it is not refused it is not read either.
    before = sorted(folder.rglob("*"))
    assert len(checks.in_fresh_process(folder, tracking.tracking_uri(), images)) == 8
    assert not mark.exists() and sorted(folder.rglob("*")) == before and pyc in before
    code = "import sys; sys.path.insert(0, sys.argv[1]); import alexnet.model"
    subprocess.run([sys.executable, "-I", "-c", code, str(folder / "code")], check=True)
    assert mark.exists(), "it would have run"


def test_images_for_that_are_those_of_the_shards(registered_models):
    known = load_index(registered_models.data, "val")["sha256"].to_pylist()
    images = gate._some_images(registered_models.data)
    rows = [known.index(hashlib.sha256(content).hexdigest()) for content in images]
    assert (rows[0], rows[-1]) == (0, len(known) - 1), "they are from all over the split"
    assert rows == sorted(set(rows)) and len(rows) == 8
