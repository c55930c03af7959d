"""Predictions of shard sets as parquet: one table for pandas and pyarrow, made part by part."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
import torch
from shard_sets import write_shard_set

from alexnet.errors import UserError
from alexnet.model import AlexNet
from pipelines import storage
from pipelines.shards import load_index, load_manifest
from training import predict
from training.config import TrainConfig
from training.network import LoadedModel, input_spec
from training.predictions import write_predictions
from training.scoring import score

# Ray Data warns of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
CLASSES = 7
SIZES = (4, 3, 5)


def shard_set(folder: Path) -> str:
    return write_shard_set(folder, train=(2,), val=SIZES, classes=CLASSES)


def trained_on(uri: str, seed: int = 0) -> LoadedModel:
    torch.manual_seed(seed)
    manifest = load_manifest(uri)
    network = AlexNet(num_classes=CLASSES, width=1 / 16, init="he").eval()
    spec = input_spec(manifest, TrainConfig())
    return LoadedModel("drawn", "", network, spec, manifest.wnids, manifest.class_names)


def call(monkeypatch: pytest.MonkeyPatch, model: LoadedModel, *argv: str) -> int:
    monkeypatch.setattr("training.predict.load_model", lambda name: model)
    return predict.main(argv)


def test_a_stopped_run_goes_on_with_what_is_missing_and_the_parts_are_one_table(
    local_ray, tmp_path, monkeypatch, capsys
):
    uri, out = shard_set(tmp_path / "set"), tmp_path / "preds.parquet"
    model = trained_on(uri)
    damaged = tmp_path / "set" / "val-000002.tar"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + b"x")
    argv = ("--data", uri, "--out", str(out), "--workers", "1")
    assert call(monkeypatch, model, *argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "val-000002.tar has sha256" in err
    damaged.write_bytes(whole)
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert "val-000002.parquet" not in made

    assert call(monkeypatch, model, *argv) == 0
    line = capsys.readouterr().out
    assert {name: (out / name).stat().st_mtime_ns for name in made} == made, "made again"
    assert sorted(path.name for path in out.iterdir()) == [
        "_predictions.json",
        *(f"val-{number:06d}.parquet" for number in range(3)),
    ]
    metrics = score(model, uri, load_manifest(uri)).metrics
    assert f"3 parts, {3 - len(made)} of them new; top-1 {metrics.top1:.4f} " in line
    assert f"top-5 {metrics.top5:.4f}, loss {metrics.loss:.4f} on 12 pictures" in line
    check_table(str(out), uri, model)


def check_table(out: str, uri: str, model: LoadedModel) -> None:
    """Against the index and the scores of this process."""
    table = pd.read_parquet(out)
    index = load_index(uri, "val").to_pandas()
    expected = score(model, uri, load_manifest(uri))
    assert len(table) == sum(SIZES)
    for column in ("key", "label", "wnid"):
        assert table[column].tolist() == index[column].tolist()
    assert table["predicted"].tolist() == expected.predicted.tolist()
    assert table["correct"].tolist() == expected.correct.tolist()
    assert table["place"].tolist() == expected.place.tolist()
    np.testing.assert_allclose(table["loss"], expected.loss, rtol=1e-5)
    top5, probabilities = np.stack(table["top5"]), np.stack(table["probabilities"])
    assert top5.shape == probabilities.shape == (sum(SIZES), 5)
    assert probabilities.dtype == np.float32
    np.testing.assert_array_equal(top5[:, 0], table["predicted"])
    assert (np.diff(probabilities, axis=1) <= 0).all() and (probabilities.sum(axis=1) < 1).all()
    own = np.exp(-table["loss"].to_numpy())
    for row, (label, place) in enumerate(zip(table["label"], table["place"], strict=True)):
        if place < 5:
            assert top5[row, place] == label
            assert probabilities[row, place] == pytest.approx(own[row], rel=1e-5)
        else:
            assert label not in top5[row]
    assert ds.dataset(out).count_rows() == sum(SIZES)


def test_from_s3_to_s3_and_a_finished_set_is_read_again_without_ray(
    local_ray, s3, tmp_path, monkeypatch
):
    local = shard_set(tmp_path / "set")
    uri, out = f"{s3}/predicted", f"{s3}/preds.parquet"
    for name, _ in storage.list_files(local):
        storage.write(f"{uri}/{name}", (tmp_path / "set" / name).read_bytes())
    model = trained_on(uri)
    first = write_predictions(model, uri, out, split="val", workers=1)
    monkeypatch.setattr("training.scoring.score_shards", None)  # nothing may be scored any more
    again = write_predictions(model, uri, out, split="val")
    assert (first.parts, first.made, again.made) == (3, 3, 0)
    assert first.metrics == again.metrics
    for name, _ in storage.list_files(out):
        storage.write(str(tmp_path / "copy" / name), storage.read(f"{out}/{name}"))
    monkeypatch.undo()
    check_table(str(tmp_path / "copy"), local, model)


def begun(out: Path, uri: str, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped before its first part."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.scoring.score_shards", stop)
        assert call(patch, model, "--data", uri, "--out", str(out)) == 130


def test_predictions_of_another_model_data_set_or_split_are_refused(tmp_path, monkeypatch, capsys):
    uri, out = shard_set(tmp_path / "set"), tmp_path / "preds"
    model = trained_on(uri)
    begun(out, uri, model, monkeypatch)
    assert "the same command goes on from here" in capsys.readouterr().err
    identity = json.loads((out / "_predictions.json").read_text())
    assert identity["manifest_sha256"] == load_manifest(uri).digest
    assert identity["classes"][2] == {"wnid": "n00000002", "name": "colour 2"}
    other = write_shard_set(tmp_path / "other", train=(2,), val=SIZES, classes=CLASSES, seed=1)
    cases = (
        (trained_on(uri, seed=1), uri, "val", "weights_sha256"),
        (model, other, "val", "manifest_sha256"),
        (model, uri, "train", "split"),
    )
    for network, data, split, word in cases:
        argv = ("--data", data, "--out", str(out), "--split", split)
        assert call(monkeypatch, network, *argv) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"holds predictions with {word} " in err
        assert "choose another --out, or delete that one" in err
    assert json.loads((out / "_predictions.json").read_text()) == identity


def test_of_two_that_begin_at_once_with_other_predictions_one_is_refused(tmp_path, monkeypatch):
    uri, out = shard_set(tmp_path / "set"), str(tmp_path / "out")
    storage.write(f"{out}/_predictions.json", b"{}")
    monkeypatch.setattr(storage, "list_files", lambda place: [])  # it looked before the other began
    with pytest.raises(UserError, match="exists with other bytes"):
        write_predictions(trained_on(uri), uri, out, split="val")
    assert storage.read(f"{out}/_predictions.json") == b"{}"


def test_a_folder_of_something_else_and_a_damaged_part_are_refused(tmp_path, monkeypatch, capsys):
    uri, out = shard_set(tmp_path / "set"), tmp_path / "preds"
    model = trained_on(uri)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    argv = ("--data", uri, "--out", str(tmp_path / "mine"))
    assert call(monkeypatch, model, *argv) == 2
    assert "holds other files (notes.txt)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    begun(out, uri, model, monkeypatch)
    for number in range(3):
        (out / f"val-{number:06d}.parquet").write_bytes(b"no parquet")
    capsys.readouterr()
    assert call(monkeypatch, model, "--data", uri, "--out", str(out)) == 2
    assert re.search(r"val-000000.parquet is damaged; delete it", capsys.readouterr().err)


def test_what_cannot_be_predicted_is_one_line(tmp_path, monkeypatch, capsys):
    uri = shard_set(tmp_path / "set")
    model = trained_on(uri)
    out = ("--out", str(tmp_path / "preds"))
    foreign = dataclasses.replace(model, wnids=tuple(reversed(model.wnids or ())))
    for network, argv, words in (
        (model, ("--data", uri, "--workers", "0"), "--workers 0 is below 1"),
        (model, ("--data", uri, "--split", "test"), "split test of"),
        (model, ("--data", str(tmp_path / "none")), "no finished shard set"),
        (foreign, ("--data", uri), "does not fit"),
    ):
        assert call(monkeypatch, network, *argv, *out) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and words in err
    assert not (tmp_path / "preds").exists()
