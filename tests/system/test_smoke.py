"""The whole road as its user goes it: real commands, a real Ray cluster, real jobs."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CLASSES, TRAIN, VAL = 3, 24, 6

pytestmark = pytest.mark.timeout(480)


@dataclass(frozen=True)
class Machine:
    """A checkout, a home folder and the environment of a shell in it."""

    checkout: Path
    env: dict[str, str]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.checkout, env=self.env, capture_output=True, text=True, timeout=400
        )


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    """A copy of the checkout, so that nothing passes by finding the installed packages instead;
    the copied worker says which file it was imported from."""
    folder = tmp_path_factory.mktemp("machine")
    for package in ("alexnet", "pipelines", "training"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / "checkout" / package, ignore=ignored)
    with (folder / "checkout" / "training" / "worker.py").open("a") as worker:
        worker.write("\nprint('worker imported from', __file__, flush=True)\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTHON"))}
    env = kept | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(folder),
        "ALEXNET_HOME": str(folder / "alexnet"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
    }
    return Machine(folder / "checkout", env)


@contextlib.contextmanager
def ray_head(machine: Machine) -> Iterator[Machine]:
    """`ray start --head` in the checkout; ended by its pid."""
    ports = [str(port) for port in free_ports(4)]
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's socket paths have a limit
    log = Path(folder) / "head.log"
    command = ["ray", "start", "--head", "--block", "--num-cpus", "2", "--temp-dir", folder]
    command += ["--port", ports[0], "--dashboard-host", "127.0.0.1", "--dashboard-port", ports[1]]
    command += ["--ray-client-server-port", ports[2], "--object-store-memory", "300000000"]
    command += ["--dashboard-agent-listen-port", ports[3]]  # another Ray here may hold the default
    with log.open("w") as output:
        head = subprocess.Popen(
            command,
            cwd=machine.checkout,
            env=machine.env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        client = Machine(
            machine.checkout, machine.env | {"RAY_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
        )
        _wait_for(client, head, log)
        yield client
    finally:
        head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(8)  # it would drain for 30 seconds
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def shard_set(machine) -> Path:
    """Drawn archives in raw/, built and verified by the commands into the folder returned."""
    raw, out = machine.checkout.parent / "raw", machine.checkout.parent / "shards"
    counts = ["--classes", CLASSES, "--per-class", TRAIN, "--val-per-class", VAL]
    ok(machine.run("python", "-m", "pipelines", "demo-raw", str(raw), *map(str, counts)))
    build = ["python", "-m", "pipelines", "build", "--raw", str(raw), "--out", str(out)]
    ok(machine.run(*build, "--samples-per-shard", "30", "--max-rejected", "5%"))
    ok(machine.run("python", "-m", "pipelines", "verify", "--full", str(out)))
    assert not (machine.checkout.parent / ".ray").exists(), "the build left a token behind"
    return out


def test_the_whole_road_from_drawn_archives_to_a_prediction_through_a_ray_job(machine, shard_set):
    """On a cluster that asks for a token, with the code that the job brings."""
    token = machine.checkout.parent / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    train = ["python", "training/run.py", "smoke", "--data", str(shard_set), "--name", "first"]
    with ray_head(machine) as client:
        assert client.run("ray", "job", "list").returncode != 0, "the cluster is open"
        client = Machine(client.checkout, client.env | {"RAY_AUTH_MODE": "token"})
        done = ok(client.run("ray", "job", "submit", "--working-dir", ".", "--", *train))
    imported = [line for line in done.splitlines() if "worker imported from" in line]
    assert imported
    assert not any(f"{ROOT}/training" in line for line in imported)
    assert f"val_images={CLASSES * VAL} " in done
    assert "registered alexnet version" in done

    again = machine.run(*train)
    assert again.returncode == 0
    assert "run first is finished" in again.stderr

    promote = ("python", "-m", "training.registry", "promote")
    refused = machine.run(*promote)
    assert refused.returncode == 1 and refused.stderr.startswith("refused: top-1: 0.")
    # So small a set teaches less than the drawn one of the demo, which the shipped policy knows.
    policy = shard_set.parent / "policy.toml"
    shipped = (ROOT / "training" / "registry" / "policy.toml").read_text()
    policy.write_text(shipped.replace("above_chance = 0.8", "above_chance = 0.25"))
    promoted = ok(machine.run(*promote, "--policy", str(policy)))
    assert "is the champion: models:/alexnet@champion" in promoted
    raw = shard_set.parent / "raw"
    with tarfile.open(raw / "ILSVRC2012_img_val.tar") as tar:
        content = tar.extractfile("ILSVRC2012_val_00000001.JPEG").read()
    image = str(raw / "image.JPEG")
    Path(image).write_bytes(content)
    predicted = ok(machine.run("python", "-m", "training.predict", image, "--top", "3"))
    shares = [float(line.split("%")[0]) for line in predicted.splitlines() if "%" in line]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(100, abs=0.05)


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def _wait_for(client: Machine, head: subprocess.Popen[bytes], log: Path) -> None:
    probe = Machine(client.checkout, client.env | {"RAY_AUTH_MODE": "token"})
    deadline = time.monotonic() + 200
    # Listing jobs works before the agent that starts them is there: only a job tells.
    while probe.run("ray", "job", "submit", "--no-wait", "--", "true").returncode != 0:
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
