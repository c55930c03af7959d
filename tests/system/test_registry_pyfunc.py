"""What the registered model takes and answers, as MLflow loads it."""

import base64
import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from registered import GOOD, Built

from training.registry.versions import Registered, load

URI = f"models:/alexnet/{GOOD}"


@pytest.fixture(scope="module")
def loaded(
    registered_models: Built, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Registered]]:
    """The model by MLflow, and by this program."""
    with pytest.MonkeyPatch.context() as patch:
        registered_models.enter_copy(tmp_path_factory.mktemp("pyfunc") / "home", patch)
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.setattr(sys, "path", list(sys.path))  # MLflow adds the model's code to it
        patch.setattr(sys, "pycache_prefix", str(tmp_path_factory.mktemp("compiled")))
        yield mlflow.pyfunc.load_model(URI), load(URI)


@pytest.fixture
def model(loaded: tuple[Any, Registered]) -> Any:
    return loaded[0]


def image(seed: int, kind: str = "PNG", size: tuple[int, int] = (227, 227)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def pixels_of(content: bytes) -> np.ndarray:
    """uint8 (1, 3, H, W), by Pillow."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)[None]


def test_pixels_give_the_networks_own_probabilities_in_order(loaded):
    model, own = loaded
    pixels = np.random.default_rng(0).integers(0, 256, (70, 3, 227, 227), dtype=np.uint8)
    told = model.predict(pixels)
    mean, std = (np.array(getattr(own.input_spec, n))[:, None, None] for n in ("mean", "std"))
    with torch.inference_mode():
        logits = own.network(torch.tensor((pixels - mean) / std, dtype=torch.float32)).double()
    shares = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    assert list(told.columns) == ["classes", "probabilities"] and len(told) == 70
    for row, share in zip(told.itertuples(), shares, strict=True):
        order = np.argsort(-share)
        assert row.classes == [own.class_names[label] for label in order]
        assert row.probabilities == pytest.approx(share[order], abs=1e-5)


def test_every_form_of_a_image_gives_the_same_answer(model):
    content = image(1)
    text = base64.b64encode(content).decode()
    wrapped = base64.encodebytes(content).decode()  # lines of 76 characters
    whole = model.predict(pixels_of(content)).to_dict("records")
    for given in (
        content,
        [content],
        text,
        [wrapped],
        pd.DataFrame({"image": [content]}),
        pd.DataFrame({"image": [text], "key": [7]}),
        {"image": [text]},
        np.array([text]),
        pixels_of(content).astype(np.int64),
    ):
        assert model.predict(given).to_dict("records") == whole


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG", "PPM"])
def test_formats_are_read_as_pillow_reads_them(model, kind):
    content = image(2, kind)
    told, expected = model.predict(content), model.predict(pixels_of(content))
    assert told.to_dict("records") == expected.to_dict("records")


def test_top_k_limits_the_classes_stops_at_all_of_them_and_is_refused_below_one(model):
    contents = [image(3), image(4)]
    every = model.predict(contents)
    assert [len(names) for names in every["classes"]] == [4, 4], "five asked, four there"
    two = model.predict(contents, params={"top_k": 2})
    for column in ("classes", "probabilities"):
        assert [row[:2] for row in every[column]] == two[column].tolist()
    with pytest.raises(MlflowException, match="top_k 0 is below 1"):
        model.predict(contents, params={"top_k": 0})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([image(1), image(2)[:300], image(3)], "image 2 of 3: cannot decode"),
        ([image(1)] * 66 + [b"x"], "image 67 of 67: cannot decode"),
        (["§"], "image 1 of 1: it is no base64 text"),
        ([1.5], "image 1 of 1: it is float; give bytes or base64 text"),
        ([], "there is no image"),
        (pd.DataFrame({"path": ["a.png"]}), "there is no column 'image', but path; name it so"),
        (np.zeros((1, 3, 224, 224), np.uint8), r"these are \(1, 3, 224, 224\)"),
        (np.zeros((3, 227, 227), np.uint8), r"these are \(3, 227, 227\)"),
        (np.zeros((0, 3, 227, 227), np.uint8), r"these are \(0, 3, 227, 227\)"),
        (np.zeros((1, 3, 227, 227), np.float32), "these are float32"),
        (np.full((1, 3, 227, 227), 256), "these go from 256 to 256"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(model, given, told):
    with pytest.raises(MlflowException, match=told) as refusal:
        model.predict(given)
    assert refusal.value.error_code == "INVALID_PARAMETER_VALUE"
    assert "\n" not in refusal.value.message


def test_signature_says_what_goes_in_and_comes_out_and_the_examples_run(model):
    signature = model.metadata.signature
    (given,) = signature.inputs.inputs
    assert (given.name, given.type.name) == ("image", "string")
    assert [column.name for column in signature.outputs.inputs] == ["classes", "probabilities"]
    (parameter,) = signature.params.params
    assert (parameter.name, parameter.default) == ("top_k", 5)
    assert len(model.predict(model.input_example)) == 1
    request = mlflow.artifacts.load_dict(f"{URI}/serving_input_example.json")
    assert asked(model, request)[0] == 200


def asked(model: Any, request: dict[str, Any]) -> tuple[int, Any]:
    """Status and answer of `mlflow models serve` to a request, without its web server."""
    from mlflow.pyfunc import scoring_server  # warns at its import

    schema = model.metadata.get_input_schema()
    answer = scoring_server.invocations(json.dumps(request), "application/json", model, schema)
    return answer.status, json.loads(answer.response)


def test_requests_of_every_form_are_answered_alike(model):
    text = base64.b64encode(image(5)).decode()
    told = model.predict(image(5)).to_dict("records")
    for given in (text, [text], {"image": [text]}):
        assert asked(model, {"inputs": given}) == (200, {"predictions": told})
    status, answer = asked(model, {"inputs": [text], "params": {"top_k": 1}})
    assert status == 200 and answer["predictions"][0]["classes"] == told[0]["classes"][:1]


@pytest.mark.parametrize(("texts", "told"), [(["%%%"], "no base64 text"), ([], "is no image")])
def test_request_without_an_image_is_refused_with_the_reason(model, texts, told):
    with pytest.raises(MlflowException, match=told) as refusal:
        asked(model, {"inputs": {"image": texts}})
    assert refusal.value.get_http_status_code() == 400
