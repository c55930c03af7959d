"""The whole road as its user goes it: a real Ray cluster, a job, the gate, a prediction."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import BIN, Cluster
from drawn import ROOT
from mlflow.models import get_model_info
from mlflow.tracking import MlflowClient
from ports import free_ports
from waiting import wait_until

from pipelines.demo_raw import Drawing, draw
from training import predict, tracking
from training.registry import __main__ as registry

CLASSES, VAL = 3, 6
TOKEN = "0123456789abcdef" * 4

pytestmark = pytest.mark.timeout(480)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy, so that nothing passes by finding the installed packages instead; the copied worker
    says which file it was imported from."""
    for package in ("alexnet", "pipelines", "training"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / "checkout" / package, ignore=ignored)
    with (tmp_path / "checkout" / "training" / "worker.py").open("a") as worker:
        worker.write("\nprint('worker imported from', __file__, flush=True)\n")
    return tmp_path / "checkout"


@pytest.fixture
def cluster(used_home: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head that takes jobs from those who have its token; the environment of a shell for it."""
    dashboard, client = free_ports(2)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTHON"))}
    env = kept | {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_DEDUP_LOGS": "0"}
    head = ["--num-cpus", "2", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    head += ["--ray-client-server-port", str(client)]
    sockets = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # their paths have a limit
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, sockets, ignore_errors=True)
        running = Cluster(sockets, env, head)
        stack.callback(running.close)
        # Listing jobs works before the agent that starts them is there: only a job tells.
        address = f"http://127.0.0.1:{dashboard}"
        wait_until(lambda: answer(address, TOKEN, b'{"entrypoint": "true"}') == 200)
        yield env | {"RAY_ADDRESS": address}


def answer(address: str, token: str, job: bytes | None = None) -> int:
    """Status of a list of the jobs, or of a new one."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/api/jobs/", job, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answered:
            return answered.status
    except urllib.error.HTTPError as refused:
        refused.close()
        return refused.code


def check_mlflow_shows(name: str) -> None:
    """As model training, with who ran it and how, on what, and how busy the node was."""
    client = tracking.connect(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("alexnet")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    (run,) = client.search_runs([experiment.experiment_id], f"run_name = '{name}'")
    tags = run.data.tags
    source = (tags["mlflow.source.type"], tags["mlflow.source.name"], tags["mlflow.user"])
    assert source == ("JOB", "training/run.py", getpass.getuser())
    contexts = [(used.tags[0].key, used.tags[0].value) for used in run.inputs.dataset_inputs]
    assert sorted(contexts) == [("mlflow.data.context", word) for word in ("eval", "training")]
    groups = {key.partition("/")[0] for key in run.data.metrics}
    assert groups == {"train", "val", "data", "time", "run", "system"}
    assert {
        "train/loss",
        "train/top1",
        "val/loss",
        "val/top1",
        "val/top5",
    } <= run.data.metrics.keys()
    node = f"system/{socket.gethostname()}"
    for figure in (
        "cpu_utilization_percentage",
        "disk_usage_percentage",
        "network_receive_megabytes",
    ):
        assert run.data.metrics[f"{node}/{figure}"] >= 0
    assert 0 < run.data.metrics[f"{node}/system_memory_usage_percentage"] <= 100


def check_champion_as_mlflow_shows_it() -> None:
    client = MlflowClient()
    version = client.get_model_version_by_alias("alexnet", "champion")
    assert version.tags["validation_status"] == "approved" and "promoted_by" in version.tags
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    metrics = {metric.key: metric.value for metric in model.metrics}
    logged = client.get_run(version.run_id).data.metrics
    assert metrics["val/top1"] == logged["val/top1"] and metrics["val/loss"] == logged["val/loss"]
    signature = get_model_info("models:/alexnet@champion").signature
    assert signature.inputs.input_names() == ["image"]
    assert signature.outputs.input_names() == ["classes", "probabilities"]


def test_the_whole_road_from_drawn_archives_to_a_prediction_through_a_ray_job(
    checkout, cluster, tmp_path, capsys
):
    """On a cluster that asks for a token, with the code that the job brings."""
    raw, out = tmp_path / "raw", tmp_path / "shards"
    draw(str(raw), Drawing(classes=CLASSES, per_class=24, val_per_class=VAL), seed=0)
    build = f"python -m pipelines build --raw {raw} --out {out} --samples-per-shard 30"
    train = f"python training/run.py smoke --data {out} --name first --ray-logs True"
    road = ["bash", "-c", f"{build} --max-rejected 5% && {train}"]
    assert answer(cluster["RAY_ADDRESS"], "another") in (401, 403), "the cluster is open"
    submit = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", *road]
    done = subprocess.run(submit, cwd=checkout, env=cluster, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    imported = [line for line in said.splitlines() if "worker imported from" in line]
    assert imported and not any(f"{ROOT}/training" in line for line in imported)
    assert f"val_images={CLASSES * VAL} " in said
    assert "registered alexnet version" in said
    check_mlflow_shows("first")

    # So small a set teaches less than the drawn one of the demo, which the shipped policy knows.
    shipped = (ROOT / "training" / "registry" / "policy.toml").read_text()
    policy = tmp_path / "policy.toml"
    policy.write_text(shipped.replace("above_chance = 0.8", "above_chance = 0.25"))
    assert registry.main(["promote", "--policy", str(policy)]) == 0
    assert "is the champion: models:/alexnet@champion" in capsys.readouterr().out
    check_champion_as_mlflow_shows_it()
    with tarfile.open(raw / "ILSVRC2012_img_val.tar") as tar:
        image = tar.extractfile("ILSVRC2012_val_00000001.JPEG").read()
    (tmp_path / "image.JPEG").write_bytes(image)
    assert predict.main([str(tmp_path / "image.JPEG"), "--top", "3"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    shares = [float(line.split("%")[0]) for line in lines]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(100, abs=0.05)
