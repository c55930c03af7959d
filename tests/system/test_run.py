"""The script's own part: what it prints without training, and which failures it takes for final."""

import pickle
import shlex

import pytest
import ray
import ray.train
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from shard_sets import write_shard_set

from alexnet.errors import UserError
from training import lease
from training.driver import worker_settings
from training.loop import TrainingStopped
from training.run import main
from training.worker import FinalErrors, said

pytestmark = pytest.mark.usefixtures("used_home")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("run") / "set", train=(40,), val=(4,))


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))


def test_dry_run_ends_with_0_and_starts_no_ray(data, no_ray, capsys):
    assert main(["smoke", "--dry-run", "--data", data]) == 0
    assert "2 in an epoch, 8 in 4 epochs" in capsys.readouterr().out


SMALL = "smoke --optim.batch-size 40"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("paper", "stores 227 px; rebuild with `python -m pipelines build --raw RAW --crop 256`"),
        ("baseline --workers 300", "cannot feed 300 workers"),
        ("smoke --workers 33", "cannot feed 33 workers"),
        *((f"{SMALL} --name {name}", "") for name in ("a" * 300, "a/b", "''", "a\\'b")),
        *((f"{SMALL} --storage {place}", "") for place in ("/dev/null/x", "s3://b//x")),
        (f"{SMALL} --data /nowhere", ""),
        *((f"{SMALL} --workers 20", ""), (f"{SMALL} --cpus-per-worker 9999", "")),
        (f"{SMALL} --device cuda --workers 9", ""),
        ("smoke --optim.batch-size 100000000", ""),
    ],
)
def test_what_cannot_work_is_one_line_in_the_dry_run_and_in_the_run(
    data, flags, told, no_ray, capsys
):
    recipe, *rest = shlex.split(flags)
    command = [recipe, "--data", data, *rest]
    assert main([*command, "--dry-run"]) == 2
    dry = capsys.readouterr()
    assert told in dry.err and dry.err.count("\n") == 1 and dry.out == ""
    assert main(command) == 2
    assert capsys.readouterr() == dry


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
def test_our_own_words_are_found_at_any_depth_of_rays_errors_and_not_retried(cause):
    """Ray retries failures of its workers, and of its controller only where starting failed."""
    failures = {0: RuntimeError("peer"), 1: UserExceptionWithTraceback(cause, "trace")}
    chained = RuntimeError("outside")
    chained.__cause__ = cause
    for error in (
        cause,
        chained,
        ray.train.WorkerGroupError("rank 1", failures),
        ray.train.ControllerError(cause),
    ):
        assert said(error) is cause
    with pytest.raises(ray.train.ControllerError) as raised:
        FinalErrors().after_exception(None, {0: RuntimeError("peer"), 1: cause})
    assert str(said(pickle.loads(pickle.dumps(raised.value)))) == str(cause)


def test_lost_workers_and_failures_of_a_machine_are_left_to_ray():
    foreign = RuntimeError("gloo: connection reset")
    lost = ray.train.WorkerGroupError("gone", {0: foreign, 1: ray.exceptions.RayError()})
    assert said(foreign) is None and said(lost) is None
    FinalErrors().after_exception(None, {0: foreign})
