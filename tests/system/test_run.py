"""The script's own part: what it prints without training, and which failures it takes for final."""

import json
import pickle
from types import SimpleNamespace

import pytest
import ray
import ray.train
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from registered import MLFLOW_WARNINGS
from shard_sets import write_shard_set

from alexnet.errors import UserError
from training import lease, worker
from training.config import to_dict
from training.driver import worker_settings
from training.loop import TrainingStopped
from training.recipes import RECIPES
from training.run import main
from training.worker import FinalErrors, said

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]
pytestmark += [pytest.mark.usefixtures("used_home")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("run") / "set", train=(40,), val=(4,))


def test_printed_config_is_the_whole_one_and_nothing_else_is_said(capsys):
    assert main(["smoke", "--print-config", "--seed", "3"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == to_dict(RECIPES["smoke"]()) | {"seed": 3}
    assert said.err == ""


def test_bar_of_a_terminal_stands_where_the_run_does():
    told: list[str] = []
    bar = SimpleNamespace(n=0, total=None, set_description=told.append)
    log = worker._logging("run", SimpleNamespace(log=lambda *_: None), bar)
    log({"loss": 1.0, "epoch": 0.5, "progress": 0.25, "eta_seconds": 61.4, "sample_digest": 1.0}, 2)
    assert (bar.n, bar.total, told) == (2, 8, ["epoch 0.50, 0:01:01 left"])
    log({"val_top1": 1.0}, 3)
    assert bar.n == 2


def test_dry_run_ends_with_0_and_starts_no_ray(data, capsys, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    assert main(["smoke", "--dry-run", "--data", data]) == 0
    assert "2 in an epoch, 8 in 4 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["paper"], "stores 227 px; rebuild with `python -m pipelines build --raw RAW --crop 256`"),
        (["baseline", "--workers", "300"], "cannot feed 300 workers"),
        (["smoke", "--workers", "33"], "cannot feed 33 workers"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(data, flags, told, capsys):
    assert main([*flags, "--dry-run", "--data", data]) == 2
    said = capsys.readouterr()
    assert told in said.err and said.err.count("\n") == 1 and said.out == ""


@pytest.mark.parametrize(
    "flags",
    [
        *(["--name", "a" * 300], ["--name", "a/b"], ["--name="], ["--name", "a'b"]),
        *(["--storage", "/dev/null/x"], ["--storage", "s3://b//x"], ["--data", "/nowhere"]),
        *(
            ["--workers", "20"],
            ["--cpus-per-worker", "9999"],
            ["--device", "cuda", "--workers", "9"],
        ),
        ["--optim.batch-size", "100000000"],
    ],
    ids=" ".join,
)
def test_what_the_dry_run_refuses_the_run_refuses_in_the_same_words(
    data, flags, capsys, monkeypatch
):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    command = ["smoke", "--data", data, "--optim.batch-size", "40", *flags]
    assert main([*command, "--dry-run"]) == 2
    dry = capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr() == dry and dry.err.count("\n") == 1


def test_run_that_another_command_writes_is_refused_and_not_begun(data, tmp_path, capsys):
    home = tmp_path / "home"
    with lease.held(str(home / "runs" / "mine")):
        assert main(["smoke", "--data", data, "--name", "mine", "--device", "cpu"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: run mine is being written by ")
    assert [path.name for path in (home / "runs" / "mine").iterdir()] == ["writer"]


def test_workers_on_cpus_keep_their_memory_unless_the_user_says_otherwise(monkeypatch):
    name = "MALLOC_TRIM_THRESHOLD_"
    monkeypatch.delenv(name, raising=False)
    assert int(worker_settings(use_gpu=False)[name]) > 2**30
    assert worker_settings(use_gpu=True) == {}
    monkeypatch.setenv(name, "131072")
    assert worker_settings(use_gpu=False)[name] == "131072"


FINAL = [UserError("mend this"), TrainingStopped("loss is nan at step 7")]


@pytest.mark.parametrize("cause", FINAL, ids=["UserError", "TrainingStopped"])
@pytest.mark.parametrize("depth", ["bare", "worker", "controller", "chained"])
def test_our_own_words_are_found_at_any_depth_of_rays_errors(cause, depth):
    chained = RuntimeError("outside")
    chained.__cause__ = cause
    error = {
        "bare": cause,
        "worker": ray.train.WorkerGroupError(
            "rank 1", {0: RuntimeError("peer"), 1: UserExceptionWithTraceback(cause, "trace")}
        ),
        "controller": ray.train.ControllerError(cause),
        "chained": chained,
    }[depth]
    assert said(error) is cause


def test_lost_workers_and_foreign_errors_are_not_ours():
    assert said(RuntimeError("gloo: connection reset")) is None
    lost = ray.train.WorkerGroupError("gone", {0: RuntimeError("x"), 1: ray.exceptions.RayError()})
    assert said(lost) is None


@pytest.mark.parametrize("cause", FINAL, ids=["UserError", "TrainingStopped"])
def test_final_failure_becomes_an_error_that_ray_does_not_retry(cause):
    """Ray retries failures of its workers, and of its controller only where starting failed."""
    with pytest.raises(ray.train.ControllerError) as raised:
        FinalErrors().after_exception(None, {0: RuntimeError("peer"), 1: cause})
    assert str(said(pickle.loads(pickle.dumps(raised.value)))) == str(cause)


def test_failure_of_a_machine_is_left_to_ray():
    FinalErrors().after_exception(None, {0: RuntimeError("gloo: connection reset")})
