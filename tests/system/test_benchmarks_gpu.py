"""The measurements for a GPU, tried on the CPU: what they run is the same code."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import gpu, gpu_feed, gpu_steps, results

CPU = torch.device("cpu")
TINY = gpu_steps.Scale(batches=(2,), compiled=(), steps=1, width=0.05, side=64)
LACKING = ("ray", "mlflow", "boto3", "tyro", "simplejpeg", "pyarrow", "safetensors", "matplotlib")


def test_every_network_precision_and_layout_is_a_case() -> None:
    names = [case.name for case in gpu_steps.cases(gpu_steps.Scale())]
    assert len(names) == len(set(names)) == 2 * 3 * 2 * 4 + 2 * 2 * 2 + 2 * 2
    assert {
        "ungrouped, bf16, channels-last, eager, batch 1024",
        "paper, fp32, contiguous, eager, batch 128",
        "ungrouped, bf16, channels-last, compiled, batch 256",
        "paper, bf16, channels-last, eager, LRN fused, batch 1024",
    } <= set(names)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_are_measured(precision: str) -> None:
    found = gpu_steps.measure(gpu_steps.Case("paper", precision, True, 2), CPU, 2, TINY)
    assert len(found.rates) == 2 and min(found.rates) > 0


def test_the_fused_normalisation_is_the_networks() -> None:
    x = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(0)) * 30
    wanted = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2)(x)
    torch.testing.assert_close(gpu_steps.OneKernel()(x), wanted)


def test_kernels_are_told_for_both_networks() -> None:
    table = gpu_steps.kernels(CPU, 1, TINY)
    named = [row[0] for row in table.rows]
    assert "**ungrouped, all kernels**" in named and "**paper, all kernels**" in named
    assert any("convolution" in name for name in named)


def test_feeding_compares_every_way_with_synthetic_images() -> None:
    scale = gpu_feed.Scale(batch=2, steps=1, classes=3, width=0.05)
    table = gpu_feed.run(CPU, 1, scale)
    rows = {row[0]: row for row in table.rows}
    assert rows.keys() == gpu_feed.WAYS.keys()
    assert rows[gpu_feed.SYNTHETIC][2] == "1.00"
    assert "extrapolated" in table.columns[-1] and "nobody ran an epoch" in table.setting


def test_drawn_images_are_as_large_as_stored_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALEXNET_TEST_DATA", raising=False)
    jpegs, origin = gpu_feed.jpegs_of(8)
    assert len(jpegs) == 8 and "DRAWN" in origin
    assert all(12_000 < len(jpeg) < 30_000 for jpeg in jpegs)


def test_without_a_gpu_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_it_runs_where_only_torch_numpy_and_pillow_are(tmp_path: Path) -> None:
    words = ["decoders", "feed", "--small", "--rounds", "1", "--out", str(tmp_path)]
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {LACKING!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from benchmarks import gpu\n"
        f"sys.exit(gpu.main({words!r}))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {result.name: result for result in results.newest(tmp_path)}
    assert found.keys() == {"gpu-decoders", "gpu-feed"}
    assert all("not here: No module" in row[1] for row in found["gpu-feed"].rows.values())
    decoders = {name: row[1] for name, row in found["gpu-decoders"].rows.items()}
    pillow = next(name for name in decoders if name.startswith("Pillow"))
    assert "not here" not in decoders.pop(pillow)
    assert all("not here" in said for said in decoders.values())
