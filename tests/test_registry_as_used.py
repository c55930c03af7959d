"""The gate's check of a model as users get it: by mlflow.pyfunc, in a process of its own."""

import dataclasses

import numpy as np
import pytest
from gated import enter_whole_copy, files_of
from registered import GOOD, MLFLOW_WARNINGS

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
    pictures = gate._some_pictures(registered_models.data)
    assert len(pictures) == 8 and all(content[:2] == b"\xff\xd8" for content in pictures)
    found = checks.as_used(uri, tracking.tracking_uri(), model, pictures)
    assert (found.value, found.passed) == ("8 of 8 pictures alike", True)
    other = dataclasses.replace(model, class_names=tuple(reversed(model.class_names)))
    found = checks.as_used(uri, tracking.tracking_uri(), other, pictures)
    assert not found.passed and found.value == "0 of 8 pictures alike"


def test_model_that_cannot_be_used_is_told_in_one_line(registered_models, home, monkeypatch):
    client = enter_whole_copy(registered_models, home, monkeypatch)
    model = load(f"models:/{NAME}/{GOOD}")
    (files_of(client, GOOD) / "artifacts" / "alexnet.json").unlink()
    found = checks.as_used(
        f"models:/{NAME}/{GOOD}",
        tracking.tracking_uri(),
        model,
        gate._some_pictures(registered_models.data),
    )
    assert not found.passed and found.value.startswith("it cannot be used: ")
    assert "\n" not in found.value


def test_pictures_for_that_are_those_of_the_shards(registered_models):
    index = load_index(registered_models.data, "val")
    sizes = {len(content) for content in gate._some_pictures(registered_models.data)}
    assert sizes <= set(np.asarray(index["size"]).tolist())
