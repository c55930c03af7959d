"""The measurements for a GPU, tried on the CPU: what they run is the same code."""

import dataclasses
import itertools
import subprocess
import sys

import torch

from benchmarks import gpu, gpu_feed, gpu_steps, learn, results

CPU = torch.device("cpu")
TINY = dataclasses.replace(gpu_steps.SMALL, rounds=1, images=8, fed=(4,), threads=(1,))
# Not on a bare machine with a GPU.
LACKING = ("ray", "mlflow", "boto3", "pydantic", "sqlalchemy", "matplotlib", "tqdm")


def test_a_step_is_compared_with_float64_and_a_wrong_one_is_seen(tmp_path, monkeypatch):
    rows = itertools.islice(gpu_steps.exact(CPU, TINY, tmp_path).rows, len(gpu_steps.PRECISIONS))
    right = {name: [*map(float, row)] for name, *row in rows}
    assert max(right["baseline, fp32"]) < 1e-3 and 1e-4 < max(right["baseline, bf16"]) < 0.2
    normal, calls = gpu_steps.learning_rates, itertools.count()

    def faster(*arguments, **options):
        rates = normal(*arguments, **options)
        wrong = next(calls) > 0  # not the one in float64
        return dataclasses.replace(rates, biases=rates.biases * (1.1 if wrong else 1.0))

    monkeypatch.setattr(gpu_steps, "learning_rates", faster)
    _, *wrong = next(gpu_steps.exact(CPU, TINY, tmp_path).rows)
    assert float(wrong[-1]) > 10 * right["baseline, fp32"][-1]


def test_steps_and_kernels_are_those_of_the_loop(tmp_path):
    part = gpu_steps.steps(CPU, TINY, tmp_path)
    name, rate, *_ = next(part.rows)
    assert name == "baseline, bf16, eager, batch 2" and float(rate.split()[0]) > 0
    assert part.table([(name, rate)]).chart is not None
    rows = gpu_steps.kernels(CPU, TINY, tmp_path).rows
    assert next(rows)[0] == "**baseline, all kernels**"
    assert any("convolution" in name for name, *_ in rows)


def test_feeding_counts_whole_epochs_with_their_evaluation(tmp_path):
    rows = [*gpu_feed.feed(CPU, TINY, tmp_path).rows]
    assert len(rows) == 3
    for row in rows:
        steps, whole = (float(cell.split()[0]) for cell in row[1:3])
        assert whole <= steps  # what comes between the steps takes time


def test_without_a_gpu_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_it_runs_without_ray_and_mlflow_and_keeps_each_row_of_a_cut_run(tmp_path):
    words = ["decoders", "--small", "--rounds", "1", "--minutes", "0", "--out", str(tmp_path)]
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {LACKING!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from benchmarks import gpu, learn\n"
        f"sys.exit(gpu.main({words!r}))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = results.newest(tmp_path)
    assert [*result.rows] == ["simplejpeg, 1 threads"] and "no further row" in done.stderr


def test_whole_runs_end_with_their_accuracy_and_its_interval(drawn_shards, capsys, monkeypatch):
    tiny = learn._small("baseline", 0.05, batch_size=8, epochs=1)
    monkeypatch.setitem(learn.CASES, "tiny", lambda: tiny)
    assert learn.main([drawn_shards, "tiny"]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "tiny" and cells[4:6] == ["bf16", "1"]
    top1, interval = cells[6].split(" ", 1)
    low, high = map(float, interval.strip("[]").split(".."))
    assert low <= float(top1) <= high and round(float(top1) * 12, 1) % 1 in (0.0, 1.0)
