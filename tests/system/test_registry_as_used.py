"""The gate's check of a model as users get it: by mlflow.pyfunc, in a process of its own."""

import hashlib
import importlib.util
import py_compile
from contextlib import nullcontext
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
from gated import FORCED, enter_whole_copy, files_of
from registered import GOOD

from alexnet.errors import UserError
from pipelines.shards import load_index
from training import tracking
from training.registry import checks, gate
from training.registry.versions import NAME, load

URI = f"models:/{NAME}/{GOOD}"


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import sys; sys.exit('first\\nlast words')", "it cannot be used: last words"),
        ("import time; time.sleep(60)", "no answer within 0.5 s"),
    ],
)
def test_process_that_gives_no_answer_is_told_in_one_line(tmp_path, monkeypatch, program, told):
    monkeypatch.setattr(checks, "_FRESH", program)
    monkeypatch.setattr(checks, "_FRESH_SECONDS", 0.5 if "sleep" in program else 60)
    with pytest.raises(UserError) as refused:
        checks.in_fresh_process(tmp_path, "", [b"x"])
    assert str(refused.value) == told


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
    model, images = load(URI), gate._some_images(registered_models.data)
    pyc = planted(folder, mark)
    found = gate.promote(client, GOOD, FORCED)
    assert [check.name for check in found.checks if not check.passed] == ["files"]
    assert "model.cpython" in found.reason and "__pycache__" in found.reason
    used = checks.as_used(URI, tracking.tracking_uri(), model, images)
    assert not used.passed and "__pycache__" in used.value
    # And where it is not refused it is not read either, and the model's own code answers.
    monkeypatch.setattr(checks, "verified", lambda uri: nullcontext(folder))
    before = sorted(folder.rglob("*"))
    used = checks.as_used(URI, tracking.tracking_uri(), model, images)
    assert (used.value, used.passed) == ("8 of 8 images alike", True)
    assert not mark.exists() and sorted(folder.rglob("*")) == before and pyc in before
    code = SourceFileLoader("planted", str(folder / "code" / "alexnet" / "model.py")).get_code(
        "planted"
    )
    exec(code, {"__name__": "planted"})
    assert mark.exists(), "it would have run"


def test_images_for_that_are_those_of_the_shards(registered_models):
    known = load_index(registered_models.data, "val")["sha256"].to_pylist()
    images = gate._some_images(registered_models.data)
    rows = [known.index(hashlib.sha256(content).hexdigest()) for content in images]
    assert (rows[0], rows[-1]) == (0, len(known) - 1), "they are from all over the split"
    assert rows == sorted(set(rows)) and len(rows) == 8
