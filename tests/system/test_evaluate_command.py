"""`python -m training.evaluate` on registered versions and on checkpoints, in folders and on S3."""

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from registered import FOREIGN, GOOD, POOR, Built
from shard_sets import write_shard_set
from small_training import CPU

from pipelines import storage
from pipelines.shards import load_index, load_manifest
from training import checkpoint
from training.accuracy import wilson
from training.evaluate import evaluate, main
from training.loader import Loader
from training.registry.versions import load


@pytest.fixture(autouse=True)
def models(registered_models: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    client = registered_models.enter_copy(tmp_path / "home", monkeypatch)
    client.set_registered_model_alias("alexnet", "champion", GOOD)
    return registered_models


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*argv, "--json", "--device", "cpu"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def tensors_of(models: Built) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: checkpoint.load_tensors(models.checkpoint, name) for name in ("model", "optimizer")
    }


def altered(models: Built, folder: Path, **state: Any) -> str:
    """A whole copy of the checkpoint with other entries in its state; None leaves one out."""
    whole = checkpoint.load_state(models.checkpoint) | state
    kept = {key: value for key, value in whole.items() if value is not None}
    checkpoint.save(folder, tensors_of(models), kept)
    return str(folder)


def test_every_name_of_a_model_leads_to_the_same_numbers(models, capsys):
    manifest = load_manifest(models.data)
    network = load(f"models:/alexnet/{GOOD}")
    with Loader(models.data, manifest, "val", threads=1, cache_gb=1) as loader:
        expected = evaluate(network.network, loader, network.input_spec, device=CPU)
    assert expected.correct1 > 0
    run = models.checkpoint.parent  # whose newest it is
    names = dict.fromkeys(["champion", GOOD, "models:/alexnet@champion"], f"models:/alexnet/{GOOD}")
    names |= {str(folder): str(folder) for folder in (models.checkpoint, run)}
    for name, resolved in names.items():
        found = answer(capsys, name, "--data", models.data)
        assert found["model"]["name"] == resolved
        assert found["data"]["manifest_sha256"] == manifest.digest
        assert found["top1"]["correct"] == expected.correct1
        assert found["top5"]["correct"] == expected.correct5
        assert found["top1"]["wilson95"] == list(wilson(expected.correct1, 13))
        assert found["loss"] == pytest.approx(expected.loss, rel=1e-4)


def test_files_tell_what_the_terminal_tells(models, tmp_path, capsys):
    out = tmp_path / "out"
    found = answer(capsys, POOR, "--data", models.data, "--split", "train", "--out", str(out))
    assert json.loads((out / "evaluation.json").read_text()) == found
    wrong = found["images"] - found["top1"]["correct"]
    assert 0 < wrong == len(found["mistakes"]) == sum(n for *_, n in found["confusion"])
    index = load_index(models.data, "train")
    table = pd.read_parquet(out / "predictions.parquet")
    for column in ("key", "label", "wnid"):
        assert table[column].tolist() == index[column].to_pylist()
    assert table["correct"].sum() == found["top1"]["correct"]
    assert table["loss"].mean() == pytest.approx(found["loss"])
    for mistake in found["mistakes"]:
        row = mistake["sample_id"]
        assert mistake["key"] == table["key"][row]
        assert mistake["true"] == f"colour {table['label'][row]}" != mistake["predicted"]
        assert mistake["probability"] == pytest.approx(table["probabilities"][row][0], abs=1e-6)
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    with Image.open(out / "mistakes.png") as image:
        assert image.format == "PNG" and image.width > 1000


def test_averaged_weights_are_what_is_evaluated_where_a_checkpoint_has_them(
    models, tmp_path, capsys
):
    tensors, state = tensors_of(models), checkpoint.load_state(models.checkpoint)
    tensors["raw"] = tensors["model"]
    tensors["model"] = {name: torch.zeros_like(value) for name, value in tensors["raw"].items()}
    state["config"]["optim"]["ema_decay"] = 0.9
    checkpoint.save(tmp_path / "model", tensors, state)
    found = answer(capsys, str(tmp_path / "model"), "--data", models.data)
    assert "averaged weights" in found["model"]["about"]
    assert found["loss"] == pytest.approx(1.3863, abs=1e-4), "zeros guess, ln 4 nats"


def test_checkpoints_and_outputs_may_lie_on_s3(models, s3, capsys):
    run = f"{s3}/evaluated"
    for path in models.checkpoint.iterdir():
        storage.write(f"{run}/step-9/{path.name}", path.read_bytes())
    expected = answer(capsys, str(models.checkpoint), "--data", models.data)
    for where in (run, f"{run}/step-9"):
        found = answer(capsys, where, "--data", models.data, "--out", f"{run}/out")
        assert found["top1"] == expected["top1"] and found["model"]["name"] == where
    assert json.loads(storage.read(f"{run}/out/evaluation.json")) == found
    assert Image.open(io.BytesIO(storage.read(f"{run}/out/mistakes.png"))).format == "PNG"


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_other_classes_geometry_or_unknown_classes_are_refused_with_what_differs(
    models, tmp_path, capsys
):
    told = refusal(capsys, FOREIGN, "--data", models.data)
    assert "label 0 is n00000000, where it has n90" in told
    fewer = write_shard_set(tmp_path / "fewer", train=(3,), val=(3,), classes=3)
    assert "3 classes, where it knows 4" in refusal(capsys, GOOD, "--data", fewer)
    larger = write_shard_set(tmp_path / "larger", train=(4,), val=(4,), side=231)
    told = refusal(capsys, GOOD, "--data", larger)
    assert "cut to 231" in told and "from 227 and 227" in told
    again = write_shard_set(tmp_path / "again", train=(4,), val=(5,))
    known = altered(models, tmp_path / "known", manifest="0" * 64)
    assert answer(capsys, known, "--data", again)["images"] == 5, "its classes are the same"
    without = altered(models, tmp_path / "without", wnids=None)
    assert "is from another release ('wnids')" in refusal(capsys, without, "--data", again)


@pytest.mark.parametrize(
    ("model", "flags", "told"),
    [
        ("nobody", [], "cannot be loaded"),
        ("77", [], "cannot be loaded"),
        ("EMPTY", [], "no checkpoint"),
        ("/nowhere", [], "no checkpoint"),
        (GOOD, ["--data", "EMPTY"], "no finished shard set"),
        (GOOD, ["--split", "test"], "--splits test"),
        (GOOD, ["--batch-size", "0"], "--batch-size 0"),
        (GOOD, ["--ten-crop"], "ten-crop needs images"),  # larger ones
    ],
)
def test_what_cannot_be_evaluated_is_one_line(models, tmp_path, capsys, model, flags, told):
    (tmp_path / "EMPTY").mkdir()
    words = [model, "--data", models.data, *flags]
    words = [word.replace("EMPTY", str(tmp_path / "EMPTY")) for word in words]
    assert told in refusal(capsys, *words)


def test_damaged_checkpoints_and_those_of_another_release_are_refused(models, tmp_path, capsys):
    later = dict(checkpoint.load_state(models.checkpoint)["config"])
    later["model"] = later["model"] | {"depth": 9}
    other = altered(models, tmp_path / "other", config=later)
    assert "another release" in refusal(capsys, other, "--data", models.data)
    weights = Path(altered(models, tmp_path / "damaged")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    told = refusal(capsys, str(weights.parent), "--data", models.data)
    assert "does not match its sha256" in told


def test_a_network_that_answers_nan_is_refused(models, tmp_path, capsys):
    tensors = tensors_of(models)
    weights = {k: v for k, v in tensors["model"].items() if v.is_floating_point()}
    tensors["model"] |= {k: v * float("nan") for k, v in weights.items()}
    checkpoint.save(tmp_path / "model", tensors, checkpoint.load_state(models.checkpoint))
    assert "NaN" in refusal(capsys, str(tmp_path / "model"), "--data", models.data)


def test_an_exported_network_names_no_device(models):
    """It must run on a GPU although it was exported on a CPU: here on the meta device, where any
    constant left behind on the CPU is an error."""
    network = load(f"models:/alexnet/{GOOD}").network.to("meta")
    assert network(torch.empty(3, 3, 227, 227, device="meta")).device.type == "meta"
