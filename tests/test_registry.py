"""The registry and its gate, on real MLflow versions of small models."""

import dataclasses
import io
import os
import re
import shutil
import zipfile
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from registered import AGAIN, FOREIGN, GOOD, GOOD_CONFIG, MLFLOW_WARNINGS, POOR, Built
from shard_sets import write_shard_set
from small_training import CPU

from alexnet.errors import UserError
from pipelines.shards import load_manifest
from training import checkpoint, tracking
from training.evaluate import evaluate
from training.loader import Loader
from training.loop import build_model, input_spec
from training.registry import __main__ as command
from training.registry import gate
from training.registry.package import register
from training.registry.versions import load

# Endings of what Python or torch writes with pickle.
PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"}

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]


@pytest.fixture
def versions(registered_models: Built) -> Built:
    return registered_models


@pytest.fixture
def client(versions: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """Of a copy of the registry, without champion, GOOD as candidate."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")  # for load to overrule
    client = versions.enter_copy(tmp_path / "home", monkeypatch)
    client.set_registered_model_alias("alexnet", "candidate", GOOD)
    return client


def alias(client: MlflowClient, name: str) -> str | None:
    found = client.get_registered_model("alexnet").aliases.get(name)
    return None if found is None else str(found)


def refused(client: MlflowClient, version: str | None, data: str | None = None) -> str:
    before = alias(client, "champion")
    with pytest.raises(gate.Refused) as refusal:
        gate.promote(client, version, data)
    assert alias(client, "champion") == before, "refused, and moved all the same"
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# What is registered


def test_newest_registration_is_the_candidate(versions, tmp_path, monkeypatch):
    client = versions.enter_copy(tmp_path / "home", monkeypatch)
    assert alias(client, "candidate") == POOR and alias(client, "champion") is None
    tags = client.get_model_version("alexnet", GOOD).tags
    assert (tags["recipe"], tags["variant"]) == ("deck", "deck")


def test_model_has_signature_example_and_no_pickle(client):
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/alexnet/{GOOD}"))
    signature = mlflow.models.get_model_info(str(folder)).signature
    (given,), (result,) = signature.inputs.inputs, signature.outputs.inputs
    assert (given.type, given.shape) == (np.dtype("float32"), (-1, 3, 227, 227))
    assert (result.type, result.shape) == (np.dtype("float32"), (-1, 4))
    assert mlflow.models.Model.load(str(folder)).saved_input_example_info is not None
    assert not [path for path in folder.rglob("*") if path.suffix in PICKLES]
    (program,) = folder.rglob("*.pt2")
    with zipfile.ZipFile(program) as archive:
        (inputs,) = [name for name in archive.namelist() if Path(name).suffix in PICKLES]
        assert inputs.endswith("sample_inputs/model.pt"), "torch's, of plain tensors"
        torch.load(io.BytesIO(archive.read(inputs)), weights_only=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loaded_model_computes_what_the_trained_one_does(client, versions, batch_size):
    loaded = load(f"models:/alexnet/{GOOD}")
    model = build_model(GOOD_CONFIG, 4).eval()
    checkpoint.load_model(versions.checkpoint, model)
    x = torch.randn(batch_size, 3, 227, 227, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = model(x), loaded.network(x)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not loaded.network.training


def test_geometry_statistics_and_class_names_travel_with_the_model(client, versions):
    loaded, manifest = load(f"models:/alexnet/{GOOD}"), load_manifest(versions.data)
    assert loaded.input_spec == input_spec(manifest, GOOD_CONFIG)
    assert (loaded.class_names, loaded.wnids) == (manifest.class_names, manifest.wnids)
    assert loaded.class_names[2] == "colour 2"


def test_run_holds_the_curves_and_the_kernels(client, tmp_path):
    run_id = client.get_model_version("alexnet", GOOD).run_id
    for name in ("curves", "conv1_kernels"):
        path = client.download_artifacts(run_id, f"figures/{name}.png", str(tmp_path))
        assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_nothing_is_registered_where_the_config_says_so(client, versions):
    config = dataclasses.replace(GOOD_CONFIG, register=False)
    run_id = client.get_model_version("alexnet", GOOD).run_id
    manifest = load_manifest(versions.data)
    assert register(client, run_id, versions.checkpoint, manifest, config) is None
    assert len(client.search_model_versions("name = 'alexnet'")) == 4


class Touch:
    """A pickle of it creates a file where it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("hiding", ["pickled model", "example inputs of the program"])
def test_model_that_would_run_code_is_refused_by_load(client, tmp_path, hiding):
    harmless = mlflow.artifacts.download_artifacts(f"models:/alexnet/{GOOD}")
    folder = Path(shutil.copytree(harmless, tmp_path / "model"))
    if hiding == "pickled model":
        shutil.rmtree(folder)
        model = torch.nn.Linear(2, 2)
        model.extra = Touch(tmp_path / "touched")
        mlflow.pytorch.save_model(model, folder, serialization_format="pickle")
        (tmp_path / "touched").rmdir()  # saving copies the model, by the same means
    else:
        (program,) = folder.rglob("*.pt2")
        replace_member(program, "sample_inputs/model.pt", Touch(tmp_path / "touched"))
    with pytest.raises(UserError, match="cannot be loaded") as told:
        load(str(folder))
    assert not (tmp_path / "touched").exists(), "the code ran"
    assert "\n" not in str(told.value)


def replace_member(archive: Path, ending: str, value: object) -> None:
    """Writes the zip again, with a torch.save of `value` in place of one member."""
    buffer = io.BytesIO()
    torch.save((value,), buffer)
    with zipfile.ZipFile(archive) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    (replaced,) = [name for name in contents if name.endswith(ending)]
    writer = torch._C.PyTorchFileWriter(str(archive))
    for name, data in (contents | {replaced: buffer.getvalue()}).items():
        inner = name.split("/", 1)[1]
        if inner not in ("version", ".data/serialization_id"):
            writer.write_record(inner, data, len(data))
    writer.write_end_of_file()


def test_model_of_somebody_else_is_refused_in_one_line(client, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded") as told:
        load("models:/alexnet/99")
    assert "\n" not in str(told.value)


# The gate


def test_first_champion_is_measured_anew_and_promoted(client, versions):
    lines = gate.promote(client, None, None)
    assert alias(client, "champion") == GOOD and "previous_champion" not in str(lines)
    manifest = load_manifest(versions.data)
    model = build_model(GOOD_CONFIG, 4).eval()
    checkpoint.load_model(versions.checkpoint, model)
    with Loader(versions.data, manifest, "val", threads=1, cache_gb=1) as loader:
        own = evaluate(model, loader, input_spec(manifest, GOOD_CONFIG), device=CPU)
    assert own.top1 == 1.0 and f"val top-1 {own.top1:.4f}" in lines[0]
    assert f"loss {own.loss:.4f} on 13 pictures" in lines[0]
    tags = client.get_model_version("alexnet", GOOD).tags
    assert float(tags["promoted_val_top1"]) == own.top1
    assert gate.promote(client, None, None) == ["version 1 is the champion already"]


def test_equal_model_takes_over_and_remembers_the_champion_before(client):
    gate.promote(client, GOOD, None)
    lines = gate.promote(client, AGAIN, None)
    assert alias(client, "champion") == AGAIN and "champion so far" in lines[1]
    assert client.get_model_version("alexnet", AGAIN).tags["previous_champion"] == GOOD


def test_better_model_takes_over(client):
    gate.promote(client, POOR, None)
    gate.promote(client, GOOD, None)
    assert alias(client, "champion") == GOOD


def test_worse_model_is_refused(client):
    gate.promote(client, GOOD, None)
    told = refused(client, POOR)
    assert re.search(r"version 3 has val top-1 0\.\d+, champion 1 has 1\.0000 on the same 13", told)


@pytest.mark.parametrize(("metric", "change"), [("val_top1", -0.2), ("val_loss", 0.02)])
def test_model_that_is_not_what_its_run_logged_is_refused(client, metric, change):
    run_id = client.get_model_version("alexnet", GOOD).run_id
    logged = client.get_run(run_id).data.metrics[metric]
    client.log_metric(run_id, metric, logged + change, step=10_000)
    assert "not the model it claims" in refused(client, None)


def test_run_without_metrics_is_refused(client, versions):
    manifest = load_manifest(versions.data)
    config = dataclasses.replace(GOOD_CONFIG, name="silent")
    run = tracking.open_run(client, config, manifest, versions.data)
    source = client.get_model_version("alexnet", GOOD).source
    version = client.create_model_version("alexnet", source, run_id=run.info.run_id).version
    assert "no val_top1 and val_loss" in refused(client, str(version))


def test_other_data_set_is_refused_and_the_moved_one_accepted(client, versions, tmp_path):
    other = write_shard_set(tmp_path / "other", train=(8, 8), val=(7, 6), seed=1)
    assert f"{other} is not the data set of version 1" in refused(client, None, other)
    moved = write_shard_set(tmp_path / "moved", train=(8, 8), val=(7, 6))
    gate.promote(client, None, moved)
    assert alias(client, "champion") == GOOD


def test_other_classes_are_refused(client, versions):
    assert refused(client, FOREIGN) == f"version 4 knows other classes than {versions.data}"


def test_rollback_gives_the_alias_back_and_has_an_end(client):
    with pytest.raises(gate.Refused, match="no champion to roll back"):
        gate.rollback(client)
    gate.promote(client, GOOD, None)
    gate.promote(client, AGAIN, None)
    assert gate.rollback(client) == ["version 1 is the champion again, 2 is not"]
    assert alias(client, "champion") == GOOD
    with pytest.raises(gate.Refused, match="champion 1 had none before it"):
        gate.rollback(client)


# The command line


def test_commands_tell_and_exit_by_what_happened(client, capsys):
    assert command.main(["promote", "--version", "17"]) == 2
    assert capsys.readouterr().err == "error: there is no version 17; there are 4, 3, 2, 1\n"
    assert command.main(["promote"]) == 0
    assert "version 1 is the champion: models:/alexnet@champion" in capsys.readouterr().out
    assert command.main(["promote", "--version", POOR]) == 1
    told = capsys.readouterr()
    assert (
        told.out == "" and told.err.startswith("refused: version 3") and told.err.count("\n") == 1
    )
    assert command.main(["rollback"]) == 1
    client.delete_registered_model_alias("alexnet", "candidate")
    assert command.main(["promote"]) == 2
    assert "there is no candidate; train one with" in capsys.readouterr().err


def test_list_shows_versions_newest_first_with_aliases_and_accuracy(client, capsys):
    gate.promote(client, POOR, None)
    gate.promote(client, GOOD, None)
    capsys.readouterr()
    assert command.main(["list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["version", "alias", "recipe", "val"]
    assert [row.split()[0] for row in rows] == [FOREIGN, POOR, AGAIN, GOOD]
    assert re.fullmatch(r"1 +candidate, champion +deck +1\.0000 +good +3 *", rows[3])
    assert re.fullmatch(r"2 +deck +1\.0000 +again *", rows[2])


def test_empty_registry_has_no_candidate_and_an_empty_list(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'empty' / 'mlflow.db'}")
    assert command.main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    for words, code in ((["promote"], 2), (["rollback"], 1), (["promote", "--version", "1"], 2)):
        assert command.main(words) == code
        assert capsys.readouterr().err.count("\n") == 1
