"""A registered model used as the README says, by programs without this checkout."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import ROOT
from gated import enter_whole_copy
from PIL import Image
from ports import free_ports
from registered import GOOD

from training.registry.versions import load


def drawn() -> bytes:
    """A PNG file, wider than high."""
    pixels = np.random.default_rng(5).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def expected(image: bytes) -> tuple[list[str], list[float]]:
    """Classes and probabilities, the likeliest first, by Pillow and NumPy around the network."""
    model = load("models:/alexnet@champion")
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
    registered_models, tmp_path, monkeypatch
):
    client = enter_whole_copy(registered_models, tmp_path / ".alexnet", monkeypatch)
    client.set_registered_model_alias("alexnet", "champion", GOOD)
    readme = (ROOT / "README.md").read_text()
    [block] = re.findall(r"\n\n((?: {4}.+\n)+ {4}mlflow models serve .+\n(?: {4}.+\n)+)", readme)
    (port,) = free_ports(1)  # the one thing that is not as it stands
    *exports, once, serve, ask = block.replace("5001", str(port)).splitlines()
    script = f"""set -euo pipefail
        {"; ".join(exports)}
        {serve} >serve.log 2>&1 </dev/null &
        {once}
        until curl --silent --fail http://127.0.0.1:{port}/ping; do kill -0 $!; sleep 0.3; done
        {ask}"""
    ours = ("MLFLOW_", "ALEXNET_", "PYTHON")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment |= {"HOME": str(tmp_path), "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    folder, image = tmp_path / "elsewhere", drawn()
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
    printed, _, told = out.partition('{"predictions": ')
    [answer] = json.loads(told.strip().removesuffix("}"))
    names, shares = expected(image)
    assert answer["classes"] == names and names[0] in printed
    assert answer["probabilities"] == pytest.approx(shares, abs=1e-5)
    compiled = {path.parent.parts[-2:] for path in (tmp_path / ".cache").rglob("*.pyc")}
    assert ("code", "alexnet") in compiled, "the model's own copy"
    assert not {"training", "pipelines"} & {name for _, name in compiled}
    assert sorted(path.name for path in folder.iterdir()) == ["cat.jpg", "serve.log"]
