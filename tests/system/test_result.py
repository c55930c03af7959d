"""What Ray Train knows of a run: its own `Result` has our metrics and our checkpoint."""

import dataclasses
from typing import Any

import pytest
from shard_sets import write_shard_set
from small_training import small_config

from pipelines import storage
from training import checkpoint, driver, lease, preflight, tracking


def trained(config: Any) -> tuple[Any, preflight.Job]:
    """What `TorchTrainer.fit` returns of it, on the Ray of these tests."""
    job, client = preflight.preflight(config, alone=False)
    run_id = tracking.open_run(client, job.config, job.manifest, job.data).info.run_id
    with lease.held(job.folder) as writer:
        job = dataclasses.replace(job, run_id=run_id, lease=(writer.number, writer.token))
        return driver._trainer(job, use_gpu=False).fit(), job


@pytest.mark.timeout(480)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_rays_result_has_val_top1_and_our_checkpoint_without_a_second_copy(
    local_ray, s3, used_home, tmp_path
):
    data = write_shard_set(tmp_path / "set", train=(40,), val=(12,))
    runs = f"{s3}/result"
    small = {"device": "cpu", "register": False, "keep_last": 1, "keep_best": 0}
    result, job = trained(small_config(name="run", data=data, storage=runs, **small))
    (folder,) = {name.partition("/")[0] for name, _ in checkpoints(job.folder)}
    assert result.checkpoint.path == f"{job.folder.removeprefix('s3://')}/{folder}"
    with checkpoint.newest_good(job.folder) as newest:
        state = checkpoint.load_state(newest)
    assert result.metrics == state["metrics"] and 0 <= result.metrics["val_top1"] <= 1
    held = [path for path in tmp_path.rglob("*.safetensors") if folder not in path.parts]
    assert held == [], "a copy of Ray's"


def checkpoints(run: str) -> list[tuple[str, int]]:
    return [file for file in storage.list_files(run) if file[0].startswith("checkpoint-")]
