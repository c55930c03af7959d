"""Registered models used by programs without this checkout: in Python and over HTTP."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from drawn import ROOT
from gated import enter_whole_copy
from mlflow_server import Server
from PIL import Image
from ports import free_ports
from registered import GOOD, GOOD_CONFIG, MLFLOW_WARNINGS, Built

from pipelines.shards import load_manifest
from training import tracking
from training.registry.package import register
from training.registry.versions import load

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]

CHAMPION = "models:/alexnet@champion"


@pytest.fixture
def store(registered_models: Built, tmp_path: Path) -> Iterator[str]:
    """The URI of a server with one version, the champion, registered through it."""
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALEXNET_HOME", str(folder / "home"))
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        try:
            server.start()
            client = tracking.connect(server.uri)
            manifest, data = load_manifest(registered_models.data), registered_models.data
            run_id = tracking.open_run(client, GOOD_CONFIG, manifest, data).info.run_id
            version = register(client, run_id, registered_models.checkpoint, manifest, GOOD_CONFIG)
            client.set_registered_model_alias("alexnet", "champion", version)
            yield server.uri
        finally:
            server.kill()


@pytest.fixture(scope="module")
def image() -> bytes:
    """A PNG file, wider than high."""
    pixels = np.random.default_rng(5).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def elsewhere(store: str) -> dict[str, str]:
    """An environment in which this checkout is not found, and pickle is off."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return environment | {
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


_PROGRAM = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model("models:/alexnet@champion")
told = model.predict(open(sys.argv[1], "rb").read(), params={"top_k": 2})
import alexnet
print(json.dumps([alexnet.__file__, sorted({"training", "pipelines"} & set(sys.modules)),
                  told.to_dict("records")]))
"""


def test_one_line_of_python_classifies_a_file_without_this_checkout(
    store, image, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    (tmp_path / "image.png").write_bytes(image)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "image.png"],
        cwd=tmp_path,
        env=elsewhere(store),
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    where, ours, (answer,) = json.loads(done.stdout.splitlines()[-1])
    assert Path(where).parts[-3:] == ("code", "alexnet", "__init__.py"), "the model's own copy"
    assert ours == []
    names, shares = expected(image)
    assert answer["classes"] == names[:2]
    assert answer["probabilities"] == pytest.approx(shares[:2], abs=1e-5)


def expected(image: bytes) -> tuple[list[str], list[float]]:
    """Classes and probabilities, the likeliest first, by Pillow and NumPy around the network."""
    import torch

    model = load(CHAMPION)
    assert model.input_spec.resize == model.input_spec.crop == 227
    with Image.open(io.BytesIO(image)) as opened:
        width = round(opened.width * 227 / opened.height)
        pixels = np.asarray(opened.resize((width, 227), Image.Resampling.LANCZOS))
    left = (width - 227) // 2
    mean, std = (np.array(getattr(model.input_spec, name)) for name in ("mean", "std"))
    x = ((pixels[:, left : left + 227] - mean) / std).transpose(2, 0, 1)[None]
    with torch.inference_mode():
        logits = model.network(torch.tensor(x, dtype=torch.float32))[0].numpy().astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-shares)
    return [model.class_names[i] for i in order], shares[order].tolist()


@pytest.mark.timeout(480)
def test_lines_of_the_readme_work_as_they_stand_with_the_embedded_store(
    registered_models, tmp_path, monkeypatch, image
):
    client = enter_whole_copy(registered_models, tmp_path / ".alexnet", monkeypatch)
    client.set_registered_model_alias("alexnet", "champion", GOOD)
    readme = (ROOT / "README.md").read_text()
    [block] = re.findall(r"\n\n((?: {4}.+\n)+ {4}mlflow models serve .+\n(?: {4}.+\n)+)", readme)
    (port,) = free_ports(1)  # the one thing that is not as it stands
    *exports, load, serve, ask = block.replace("5001", str(port)).splitlines()
    script = f"""set -euo pipefail
        {"; ".join(exports)}
        {load}
        {serve} >serve.log 2>&1 </dev/null &
        until curl --silent --fail http://127.0.0.1:{port}/ping; do kill -0 $!; sleep 0.3; done
        {ask}"""
    ours = ("MLFLOW_", "ALEXNET_", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment |= {"HOME": str(tmp_path), "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(image)
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            out, err = process.communicate(timeout=400)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    assert "probabilities" in out and '"predictions"' in out
    assert sorted(path.name for path in folder.iterdir()) == ["cat.jpg", "serve.log"]
