"""`training/run.py` with a real Ray: its processes killed, itself stopped, then the same again."""

import contextlib
import json
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks import Attack
from drawn import ROOT
from scripts import Script, only_in_long_runs
from shard_sets import write_shard_set
from small_training import fit, small_config

from training import checkpoint
from training.config import TrainConfig, to_dict

CHANGES = {"optim_epochs": 6, "optim_batch_size": 8, "checkpoint_steps": 5}
STEPS = 6 * 5
NAMES = ("model.safetensors", "optimizer.safetensors")
SHELL = "import os, sys; os.execlp('sh', 'sh', '-c', sys.argv[1])"
VICTIMS = ("ray::RayTrainWorker", "raylet/raylet", "gcs_server", "ray::TrainController", "driver")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    write_shard_set(folder / "set", train=(20, 20), val=(7,))
    return folder


def config(folder: Path, home: Path) -> TrainConfig:
    where = {"data": str(folder / "set"), "storage": str(home / "runs"), "device": "cpu"}
    return small_config(name="killed", cpus_per_worker=1, register=False, **where, **CHANGES)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    """What an undisturbed training ends with."""
    record = fit(config(folder, folder), str(folder / "set"), folder / "kept")
    assert checkpoint.load_state(record.last)["step"] == STEPS
    return {name: (record.last / name).read_bytes() for name in NAMES}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """With a short path for Ray's sockets inside."""
    sockets = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "sockets").symlink_to(sockets)
    yield tmp_path / "home"
    shutil.rmtree(sockets, ignore_errors=True)


def sockets(home: Path) -> str:
    return str((home / "sockets").readlink())


@contextlib.contextmanager
def training(folder: Path, home: Path, *flags: str) -> Iterator[Script]:
    saved, log = home / "config.json", home / f"log-{len(list(home.glob('log-*')))}"
    saved.write_text(json.dumps(to_dict(config(folder, home))))
    argv = [str(ROOT / "training" / "run.py"), "--config", str(saved), *flags]
    script = Script(argv, home, log, RAY_TMPDIR=sockets(home))
    try:
        yield script
    finally:
        script.end()


def check_finished(folder: Path, home: Path, whole: dict[str, bytes]) -> None:
    with checkpoint.newest_good(str(home / "runs" / "killed")) as last:
        assert last is not None and checkpoint.load_state(last)["step"] == STEPS
        assert {name: (last / name).read_bytes() for name in NAMES} == whole
    assert not (home / ".ray").exists(), "a token was left behind"


def check_steps_done_again(said: str) -> None:
    """After Ctrl-C it goes on where it was, else from a checkpoint."""
    for at, lost in re.findall(r"continues at step (\d+), lost (\d+) steps", said):
        assert (int(at) % 5 == 0 and int(lost) <= 2 * 5) or int(lost) == 0, said[-3000:]


def again(folder: Path, home: Path, whole: dict[str, bytes]) -> float:
    """The same command to its end; the seconds that it took."""
    with training(folder, home) as script:
        assert script.wait() == 0, script.said[-5000:]
        check_steps_done_again(script.said)
        check_finished(folder, home, whole)
        return script.seconds


def test_killed_process_of_a_training_costs_the_steps_since_its_checkpoint(
    attack: Attack, request, folder, home, whole
):
    only_in_long_runs(request)
    victim = VICTIMS[attack.seed % len(VICTIMS)]
    with training(folder, home) as script:
        script.wait_for(rf"step={attack.draw.randint(1, STEPS - 3)} ")
        time.sleep(attack.draw.uniform(0, 0.3))
        assert script.kill_one(victim), script.processes()
        code = script.wait()
        assert code == (-signal.SIGKILL if victim == "driver" else code)
        finished = code == 0
        assert "Traceback" not in script.said.splitlines()[-1]
        check_steps_done_again(script.said)
    lost = again(folder, home, whole) if not finished else 0.0
    check_finished(folder, home, whole)
    attack.survived("SIGKILL", f"run.py: {victim}", seconds_lost=lost)


def test_first_ctrl_c_saves_and_the_command_that_it_prints_goes_on_to_the_same_bits(
    folder, home, tmp_path
):
    """Pressed at a terminal, where every process of the group hears it."""
    whole = small_config(**CHANGES | {"optim_epochs": 30, "checkpoint_steps": None})
    record = fit(whole, str(folder / "set"), tmp_path / "kept")
    flags = ["--optim.epochs", "30", "--checkpoint-steps", "None"]
    with training(folder, home, *flags) as script:
        script.wait_for(r"step=7 ", 400)
        script.press_ctrl_c()
        assert script.wait(400) == 130, script.said[-5000:]
        last = script.said.splitlines()[-1]
    assert "stopping: saving a checkpoint first (at most 60 s; " in script.said
    assert re.search("^Traceback", script.said, re.MULTILINE) is None, "of the driver"
    found = re.search(r"^interrupted: stopped at step (\d+), saved; continue with: (.*)", last)
    assert found is not None, last
    step, run = int(found[1]), home / "runs" / "killed"
    assert 7 <= step < 30 * 5 and checkpoint.last_step(str(run)) == step
    assert json.loads((run / "writer" / "000001.json").read_text())["ended"] is True
    going_on = Script(["-c", SHELL, found[2]], home, home / "log-2", RAY_TMPDIR=sockets(home))
    try:
        assert going_on.wait(400) == 0, going_on.said[-5000:]
    finally:
        going_on.end()
    assert f"continues at step {step}, lost 0 steps" in going_on.said
    with checkpoint.newest_good(str(run)) as end:
        assert end is not None
        for name in NAMES:
            assert (end / name).read_bytes() == (record.last / name).read_bytes()
        states = [checkpoint.load_state(place) for place in (end, record.last)]
        for state in states:
            del state["run_id"], state["config"]
        assert states[0] == states[1]


def test_stopped_while_it_imports_its_libraries_it_says_one_line(attack: Attack, home):
    number = attack.draw.choice([signal.SIGTERM, signal.SIGINT])
    argv = [str(ROOT / "training" / "run.py"), "--dry-run", "--data", "/nowhere"]
    script = Script(argv, home, home / "log")
    try:
        time.sleep(0.15 + attack.draw.uniform(0, 5))
        script.send(number)
        assert script.wait() in (2, 130), script.said
        assert re.fullmatch("(error: .* /nowhere|interrupted).*\n", script.said), script.said
    finally:
        script.end()
    attack.survived(number.name, "run.py: imports")
