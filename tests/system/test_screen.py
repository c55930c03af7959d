"""What a person sees of commands that go well, beside another Ray on this host."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from drawn import ROOT
from safetensors.torch import load_file, save_file

from pipelines.demo_raw import Drawing, draw
from training.network import build_model, load_model
from training.recipes import smoke

pytestmark = pytest.mark.timeout(480)

BUILD = [
    r"RAW: ilsvrc2012, 72 train \+ 18 val images, 3 classes",
    r"OUT: \d+ shards, plan [0-9a-f]{12}",
    "starting Ray: about 20 s",
    r"shards \d/\d  images .*",
    r"built OUT: 71 train \+ 18 val samples in \d shards, [\d.]+ MB",
    r"(fixes|rejected): [\w ,]+",
    "next: python training/run.py --data OUT",
]
TRAIN = [
    "loading PyTorch, MLflow and Ray",
    "starting Ray: about 20 s",
    r"run mine: recipe smoke \(.*\), 71 train and 18 val samples of 3 classes from OUT",
    r"1 worker\(s\) with \d CPU\(s\) each; checkpoints in HOME/runs/mine",
    *(ON_A_BUSY_MACHINE := ["no worker has started yet; .*", "the accelerator computes for .*"]),
    "begins with the weights of INITIAL",
    r"[\d.]+ GFLOP per image",
    r"step=\d+ epoch=[\d.]+( [a-z1/]+=[\d.:]+){4,6}",
    r"step=\d+ epoch=\d val_images=18 val_loss=[\d.]+ val_top1=[\d.]+ val_top5=[\d.]+",
    r"curves: HOME/mlartifacts/\w+/artifacts/figures/curves.png",
    r"card:   HOME/mlartifacts/\w+/artifacts/card/card.md",
    r"MLflow: python -m mlflow server --backend-store-uri sqlite:///HOME/mlflow.db, then http\S+",
    "registered alexnet version 1 as candidate; promote it with:",
    "  python -m training.registry promote",
]


@pytest.fixture
def places(home: Path, tmp_path: Path) -> dict[str, str]:
    """Words for the folders of this test."""
    raw = str(tmp_path / "raw")
    draw(raw, Drawing(classes=3, per_class=24, val_per_class=6), seed=0)
    save_file(build_model(smoke(), 3).state_dict(), initial := tmp_path / "initial.safetensors")
    places = {str(home): "HOME", raw: "RAW", str(tmp_path / "out"): "OUT"}
    return places | {str(initial): "INITIAL"}


def said(places: dict[str, str], *command: str) -> str:
    """On stdout and stderr, without a terminal, by a Ray of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONW"))}
    kept |= {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # where nobody has started a Ray
        done = subprocess.run(
            [sys.executable, *command],
            env=kept | {"RAY_TMPDIR": short},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    text = done.stdout
    for folder, word in places.items():
        text = text.replace(folder, word)
    assert done.returncode == 0, text[-6000:]
    return text


@pytest.mark.usefixtures("local_ray")
def test_a_good_build_and_a_good_run_show_our_lines_alone(places, tmp_path):
    """The other Ray is that of these tests: which one is theirs, Ray's helpers have to be told."""
    raw, out = str(tmp_path / "raw"), str(tmp_path / "out")
    build = ["-m", "pipelines", "build", "--raw", raw, "--out", out, "--max-rejected", "5%"]
    train = [str(ROOT / "training" / "run.py"), "smoke", "--data", out, "--name", "mine"]
    train += ["--init-from", str(tmp_path / "initial.safetensors"), "--freeze", "features"]
    for command, ours in ((build, BUILD), ([*train, "--device", "cpu"], TRAIN)):
        lines = said(places, *command).splitlines()
        assert [line for line in lines if not any(re.fullmatch(o, line) for o in ours)] == []
        missing = [o for o in ours if not any(re.fullmatch(o, line) for line in lines)]
        assert {*missing} <= {*ON_A_BUSY_MACHINE}
    begun, kept = (
        load_file(tmp_path / "initial.safetensors"),
        load_model(str(tmp_path / "home" / "runs" / "mine")).network,
    )
    for name, weight in kept.state_dict().items():
        if name.endswith("weight") and "conv" in name:
            assert torch.equal(weight, begun[name]), name
