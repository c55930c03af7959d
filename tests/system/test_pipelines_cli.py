"""python -m pipelines in a process of its own, with a Ray."""

import signal
import subprocess
import sys
from pathlib import Path

from drawn import ROOT
from made import started
from waiting import wait_until


def test_ctrl_c_says_how_to_continue_and_exits_130(
    local_ray: str, drawn_raw: str, drawn_shards: str, tmp_path: Path
) -> None:
    flags = ["--raw", drawn_raw, "--samples-per-shard", "1", "--workers", "1"]
    for attempt in range(5):
        out = tmp_path / f"out{attempt}"
        argv = ["build", *flags, "--out", str(out), "--max-rejected", "3%"]
        run = started(argv, tmp_path, {"RAY_ADDRESS": local_ray})
        first = out / "train-000000.tar"
        wait_until(lambda run=run, first=first: first.exists() or run.poll() is not None)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=120)
        if run.returncode != 0:  # a busy machine may be too late for so short a build
            break
    assert run.returncode == 130, errors
    assert "the same command continues" in errors.splitlines()[-1]
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.tmp"))


def test_driver_of_a_build_starts_without_torch() -> None:
    code = "import sys, pipelines.build, pipelines.cli; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
