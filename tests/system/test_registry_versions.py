"""How a version is found, checked and read again, and which are refused."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from gated import enter_whole_copy, files_of
from registered import (
    AGAIN,
    FOREIGN,
    GOOD,
    GOOD_CONFIG,
    POOR,
    from_folder,
    resealed,
)
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors

from alexnet.errors import UserError
from training.network import build_model
from training.registry.versions import load, resolve, sha256, versions

# Loading


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loaded_model_computes_what_the_trained_one_does(registry, registered_models, batch_size):
    loaded = load("models:/alexnet@candidate")
    model = build_model(GOOD_CONFIG, 4).eval()
    model.load_state_dict(load_tensors(registered_models.checkpoint / "model.safetensors"))
    x = torch.randn(batch_size, 3, 227, 227, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = model(x), loaded.network(x)
    assert expected.abs().max() > 0.5
    assert torch.equal(found, expected)
    assert not loaded.network.training


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("artifacts/model.safetensors", flip, "changed"),
        ("artifacts/alexnet.json", flip, "changed"),
        ("pyfunc_model.py", flip, "changed"),
        ("MLmodel", flip, "changed"),
        ("code/alexnet/model.py", Path.unlink, "missing"),
        ("code/torch.py", lambda path: path.write_text("evil = True"), "added"),
        ("SHA256SUMS", flip, "changed"),
        ("SHA256SUMS", Path.unlink, "missing"),
        ("SHA256SUMS", lambda path: path.write_bytes(b"\xff\n"), "unreadable"),
    ],
)
def test_tampered_version_is_refused_with_the_file_that_differs(
    registry, good_copy, name, change, told
):
    change(good_copy / name)
    number = from_folder(registry, good_copy)
    if told != "unreadable":  # its hash alone is enough to refuse it
        with pytest.raises(UserError) as refusal:
            load(f"models:/alexnet/{number}")
        assert str(refusal.value) == (
            f"models:/alexnet/{number}: its files are not those that were registered "
            f"({name} {told}); register it again"
        )
    if (name, told) != ("SHA256SUMS", "changed"):
        with pytest.raises(UserError, match=f"not those that were registered .*{name} {told}"):
            load(str(good_copy))


def test_changed_weights_with_hashes_to_match_are_refused_by_the_tag(registry, good_copy):
    weights = load_file(good_copy / "artifacts" / "model.safetensors")
    weights["classifier.fc8.bias"] += 1
    save_file(weights, good_copy / "artifacts" / "model.safetensors")
    number = from_folder(registry, Path(resealed(good_copy)))
    registry.set_registered_model_alias("alexnet", "forged", number)
    for uri in (f"models:/alexnet/{number}", "models:/alexnet@forged"):
        with pytest.raises(UserError, match=r"\(SHA256SUMS changed\)"):
            load(uri)


def test_version_used_in_place_is_refused_until_what_python_compiled_there_is_gone(
    registered_models, home, tmp_path, monkeypatch
):
    client = enter_whole_copy(registered_models, home, monkeypatch)
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow adds the model's code to it
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    uri, folder = f"models:/alexnet/{GOOD}", files_of(client, GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "pycache_prefix", str(tmp_path / "compiled"))
        mlflow.pyfunc.load_model(uri)
    assert load(uri)
    mlflow.pyfunc.load_model(uri)
    with pytest.raises(UserError, match=r"remove every __pycache__ .* PYTHONPYCA") as told:
        load(uri)
    assert str(folder) in str(told.value)
    shutil.rmtree(folder / "__pycache__")
    assert load(uri)


@pytest.mark.parametrize("sealed", [False, True])
def test_planted_compiled_code_is_a_difference_also_where_the_sums_name_it(good_copy, sealed):
    planted = good_copy / "code" / "alexnet" / "__pycache__" / "model.cpython-311.pyc"
    planted.parent.mkdir()
    planted.write_bytes(b"compiled")
    if sealed:
        sums = (good_copy / "SHA256SUMS").read_text()
        name = planted.relative_to(good_copy)
        (good_copy / "SHA256SUMS").write_text(f"{sums}{sha256(planted)}  {name}\n")
    with pytest.raises(UserError, match=r"__pycache__/model\.cpython-311\.pyc added"):
        load(str(good_copy))


def test_version_without_hashes_is_refused(registry, good_copy):
    version = registry.create_model_version("alexnet", str(good_copy))
    with pytest.raises(UserError, match="was not registered by a training"):
        load(f"models:/alexnet/{version.version}")


class Touch:
    """A pickle of it creates a folder where it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def test_neither_pickle_nor_code_of_the_registry_is_run(good_copy, tmp_path):
    weights = good_copy / "artifacts" / "model.safetensors"
    weights.write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    for path in (good_copy / "pyfunc_model.py", good_copy / "code" / "alexnet" / "model.py"):
        path.write_text(f"import os\nos.mkdir({str(tmp_path / 'touched')!r})\n")
    with pytest.raises(UserError, match=r"model\.safetensors does not hold the weights"):
        load(resealed(good_copy))
    assert not (tmp_path / "touched").exists(), "the code ran"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layout": 9}, "alexnet.json has layout 9, this release reads 1"),
        ({"layout": None}, "has layout None"),
        ({"model": {"variant": "ungrouped"}}, "does not hold the weights of this network"),
        ({"model": None}, "does not hold the weights of this network"),
        ({"input_spec": {}}, "input specification is damaged"),
        ({"class_names": None}, "its alexnet.json lacks"),
        ({"class_names": "text"}, "its alexnet.json lacks .*class_names"),
        ({"wnids": ["a", "b", "c"]}, "its alexnet.json lacks .*wnids"),
        ({"wnids": [1, 2, 3, 4]}, "its alexnet.json lacks .*wnids"),
    ],
)
def test_description_of_another_release_is_one_line(good_copy, changes, told):
    path = good_copy / "artifacts" / "alexnet.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=told):
        load(resealed(good_copy))


def test_version_with_the_former_names_of_recipe_and_variant_is_read(good_copy):
    path = good_copy / "artifacts" / "alexnet.json"
    description = json.loads(path.read_text())
    former = {"recipe": "deck", "model": description["model"] | {"variant": "deck"}}
    path.write_text(json.dumps(description | former))
    assert load(resealed(good_copy)).description == description


def test_weights_of_another_network_are_one_line(good_copy):
    path = good_copy / "artifacts" / "model.safetensors"
    weights = load_file(path)
    lacking = {name: value for name, value in weights.items() if "fc8" not in name}
    halved = {name: value.astype(np.float16) for name, value in weights.items()}
    for changed in (lacking, halved, weights | {"more": np.zeros(1, np.float32)}):
        save_file(changed, path)
        with pytest.raises(UserError, match="does not hold the weights"):
            load(resealed(good_copy))


@pytest.mark.parametrize(
    "uri",
    [
        *("models:/alexnet/99", "models:/alexnet@nobody", "models:/x/1", "models:/a'b/1"),
        *(f"models:/alexnet/{'9' * 300}", "models:/alexnet/-1", "models:/alexnet/٣"),
        *(f"models:/alexnet@{'x' * 5000}", "models:/\udcff/1", "models:/ü@ß", "runs:/x/model"),
    ],
)
def test_uri_that_names_nothing_is_one_line(registry, uri):
    with pytest.raises(UserError, match="cannot be loaded") as told:
        load(uri)
    assert len(str(told.value)) < 500


# Finding


def test_versions_are_found_by_number_alias_and_as_the_candidate(registry):
    registry.set_registered_model_alias("alexnet", "champion", AGAIN)
    asked = (None, "candidate", "champion", "3", "03")
    found = [str(resolve(registry, version).version) for version in asked]
    assert found == [GOOD, GOOD, AGAIN, POOR, POOR]
    assert [str(version.version) for version in versions(registry)] == [FOREIGN, POOR, AGAIN, GOOD]


@pytest.mark.parametrize("asked", ["17", "champion", "", "-1", "1; drop"])
def test_unknown_version_is_told_with_what_there_is(registry, asked):
    with pytest.raises(UserError) as told:
        resolve(registry, asked)
    line = f"alexnet has no version {asked}; there are 4, 3, 2, 1; aliases candidate"
    assert str(told.value) == line
