"""infra/slurm on a real Slurm of two nodes of one CPU, both on this machine."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import BIN
from drawn import ROOT
from mlflow_server import Server
from ports import free_ports
from waiting import wait_until

from pipelines import shards
from pipelines.demo_raw import Drawing, draw
from training import checkpoint

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
UNDER_WAY = ("PENDING", "RUNNING", "COMPLETING")
missing = [name for name in PROGRAMS if not shutil.which(name, path="/usr/sbin:/usr/bin")]
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing), reason=f"no {' '.join(missing)} here; install slurm-wlm"),
    pytest.mark.skipif(os.getuid() != 0, reason="Slurm's daemons change users, which takes root"),
]
CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName=a NodeHostname=localhost Port={ports[1]} CPUs=1
NodeName=b NodeHostname=localhost Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a user's shell."""
    for name in ("munge", "state", "a", "b"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "munge" / "key").write_bytes(os.urandom(1024))
    (tmp_path / "munge" / "key").chmod(0o400)
    config = tmp_path / "slurm.conf"
    config.write_text(CONFIG.format(folder=tmp_path, ports=free_ports(3)))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTHON"))}
    env = kept | {"SLURM_CONF": str(config), "ALEXNET_HOME": str(tmp_path / "home")}
    env["PATH"] = f"{BIN}:/usr/sbin:/usr/bin:{env['PATH']}"
    parts = {n: tmp_path / "munge" / n for n in ("key-file", "socket", "pid-file", "seed-file")}
    parts = {name: path.with_name(name.partition("-")[0]) for name, path in parts.items()}
    flags = [f"--{name}={path}" for name, path in parts.items()]
    daemons = [
        ["munged", "--foreground", "--force", f"--log-file={tmp_path}/munge/log", *flags],
        *(["slurmctld", "-D"], ["slurmd", "-D", "-N", "a"], ["slurmd", "-D", "-N", "b"]),
    ]
    running = []
    try:
        for command in daemons:
            with (tmp_path / f"daemon-{len(running)}.log").open("w") as log:
                running.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
            wait_until(lambda: parts["socket"].exists(), 20)
        wait_until(lambda: said(env, "sinfo", "-h", "-t", "idle", "-o", "%D") == "2", 60)
        yield env
    finally:
        said(env, "scancel", "--state=RUNNING", "--user=root")
        wait_until(lambda: said(env, "squeue", "-h", "-t", "RUNNING,COMPLETING") == "", 60)
        for process in reversed(running):
            process.terminate()
            process.wait(30)


def said(env: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submitted(env: dict[str, str], log: Path, script: str, *flags: str) -> str:
    """The job's number."""
    asked = ["--nodes=2", "--cpus-per-task=1", f"--output={log}", f"--chdir={log.parent}"]
    asked += ["--gpus-per-node=0"] if script == "train" else []
    return said(env, "sbatch", *asked, f"infra/slurm/{script}.sbatch", *flags).split()[-1]


def state(env: dict[str, str], job: str) -> str:
    return re.search(r"JobState=(\w+)", said(env, "scontrol", "show", "job", job))[1]


def test_a_build_and_a_training_run_on_two_nodes_and_a_warned_run_goes_on_when_queued_again(
    slurm, tmp_path
):
    raw, out, runs = tmp_path / "raw", tmp_path / "shards", tmp_path / "runs"
    draw(str(raw), Drawing(classes=3, per_class=24, val_per_class=6), seed=0)
    log = tmp_path / "build.log"
    build = ["--raw", str(raw), "--out", str(out), "--max-rejected", "5%"]
    job = submitted(slurm, log, "build", *build, "--samples-per-shard", "30")
    wait_until(lambda: state(slurm, job) not in UNDER_WAY, 240)
    assert shards.load_manifest(str(out)).num_samples("train") > 60, log.read_text()

    server = Server(tmp_path)
    server.start()
    try:
        log = tmp_path / "train.log"
        train = ["smoke", "--data", str(out), "--storage", str(runs), "--workers", "2"]
        train += ["--epochs", "6", "--log-steps", "1", "--register", "False"]
        env = slurm | {"MLFLOW_TRACKING_URI": server.uri}
        job = submitted(env, log, "train", *train)
        run = str(runs / f"slurm-{job}")
        wait_until(lambda: "step=3 " in text(log), 240)
        said(env, "scancel", "--signal=USR1", "--batch", job)  # as before the time limit
        wait_until(lambda: state(env, job) == "PENDING", 120)
        stopped = checkpoint.last_step(run)
        assert stopped >= 3 and f"stopped at step {stopped}, saved" in text(log)
        time.sleep(1)
        said(env, "scontrol", "update", f"JobId={job}", "StartTime=now")
        wait_until(lambda: state(env, job) not in UNDER_WAY, 240)
        assert state(env, job) == "COMPLETED", text(log)
        assert f"continues at step {stopped}" in text(log)
    finally:
        server.kill()


def text(log: Path) -> str:
    return log.read_text() if log.exists() else ""
