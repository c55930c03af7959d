"""Options of the loop: averages, plateau, update rules, determinism, compiling, when it saves."""

import dataclasses
import functools
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from shard_sets import write_shard_set
from small_training import CPU, evaluated, fit, small_config, without_dropout

from alexnet.errors import UserError
from alexnet.optim import LARS, PaperSGD
from alexnet.preprocess import Augment, InputSpec, draw_views, train_view
from pipelines.shards import load_manifest
from training import guards, loop
from training.config import TrainConfig
from training.loader import Synthetic
from training.network import build_model
from training.steps import Stepper, algorithms, input_of, refuse_without_compiler

TRAIN = (10, 9, 9)  # 28 samples: 4 steps of 7


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("options") / "set", train=TRAIN, val=(7, 6))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_averaged_weights_are_saved_measured_and_continued(uri, tmp_path):
    config = small_config(model_batch_norm=True, optim_ema_decay=0.6, checkpoint_steps=1)
    whole = fit(config, uri, tmp_path / "whole")
    initial = build_model(config, 4).state_dict()
    averages = {name: value.numpy().astype(np.float64) for name, value in initial.items()}
    for step in range(1, 9):  # the documented ramp, from the raw weights of each step
        raw = load_file(whole.folders[step] / "raw.safetensors")
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in raw.items():
            averages[name] = decay * averages[name] + (1 - decay) * value
    saved = load_file(whole.last / "model.safetensors")
    for name, value in saved.items():
        if name.endswith("num_batches_tracked"):
            assert value == 8
        else:
            np.testing.assert_allclose(value, averages[name], rtol=1e-4, atol=1e-6, err_msg=name)
            assert not np.array_equal(value, raw[name]), name
    measured = evaluated(whole.last, uri, "val", model_batch_norm=True)
    assert measured.loss == whole.result["val_loss"]
    rest = fit(config, uri, tmp_path / "rest", resume=whole.folders[3])
    assert files_of(rest.last) == files_of(whole.last)
    last = fit(small_config(optim_epochs=1), uri, tmp_path / "plain").last
    assert {path.stem for path in last.iterdir()} == {"hashes", "model", "optimizer", "state"}


def test_plateau_lowers_the_rate_ends_the_run_and_goes_on_after_a_stop(uri, tmp_path):
    # Nothing is learned at this rate: the second and third epochs are each a plateau.
    plateau = {"schedule": "plateau", "plateau_epochs": 1, "plateau_drops": 1}
    plateau |= {"lr": 1e-9, "epochs": 9}
    changes = {f"optim_{name}": value for name, value in plateau.items()}
    config = small_config(checkpoint_steps=3, **changes)
    whole = fit(config, uri, tmp_path / "whole")
    rates = [metrics["lr"] for _, metrics in whole.logged if "lr" in metrics]
    assert rates == pytest.approx([1e-9] * 8 + [1e-10] * 4)
    assert whole.result["epoch"] == 3.0
    errors = json.loads((whole.last / "state.json").read_text())["val_errors"]
    assert errors == [1 - whole.result["val_top1"]] * 3
    rest = fit(config, uri, tmp_path / "rest", resume=whole.folders[9])
    assert files_of(rest.last) == files_of(whole.last)
    assert fit(config, uri, resume=whole.last).reported == [], "a finished run trains no more"


def test_rule_and_trust_are_those_of_the_config():
    for rule, kind in (("paper", PaperSGD), ("torch", torch.optim.SGD), ("lars", LARS)):
        config = small_config(optim_rule=rule, optim_lars_trust=0.3)
        optimizer = Stepper(config, build_model(config, 4), loop.Place(CPU)).optimizer
        assert type(optimizer) is kind
    assert {group["trust"] for group in optimizer.param_groups} == {0.3}


@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        ({"checkpoint_minutes": 1e-9}, [*range(1, 13)]),
        ({"checkpoint_minutes": None}, [4, 12]),
        ({"checkpoint_minutes": 60.0, "checkpoint_steps": 8}, [4, 8, 12]),
        ({"checkpoint_minutes": 60.0, "keep_best": 0}, [12]),
        ({"checkpoint_minutes": 60.0, "keep_best": 2}, [4, 8, 12]),
    ],
)
def test_saved_are_the_end_the_best_epochs_and_what_is_due_by_clock_or_steps(
    uri, tmp_path, monkeypatch, changes, saved
):
    monkeypatch.setattr(guards, "_MOST_STEPS", 1)  # looks at the clock after every step
    errors = iter([0.5, 0.7, 0.6])
    measured = loop.evaluate

    def worse_after_the_first(*args: Any, **rest: Any) -> Any:
        return dataclasses.replace(measured(*args, **rest), top1=1 - next(errors))

    monkeypatch.setattr(loop, "evaluate", worse_after_the_first)
    run = fit(small_config(optim_epochs=3, **changes), uri, tmp_path / "kept")
    assert sorted(run.folders) == saved


def test_notice_of_preemption_saves_at_once_and_goes_on(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "_MOST_STEPS", 1)
    monkeypatch.setattr(guards, "_NOTICE_SECONDS", 0.0)
    asked: list[bool] = []

    def preempted() -> bool:  # first asked after the second step: the first one agrees on it
        asked.append(len(asked) == 4)
        return asked[-1]

    config = small_config(log_steps=50)
    record = fit(config, uri, tmp_path / "kept", preempted=preempted)
    assert asked == [False] * 4 + [True] + [False] * 2
    assert sorted(record.folders) == [4, 6, 8]
    assert [step for step, metrics in record.logged if "loss" in metrics] == [4, 6, 8]
    state = json.loads((record.folders[6] / "state.json").read_text())
    assert state["evaluated_step"] == 4, "its val figures are those of older weights"


def test_deterministic_algorithms_and_tf32_are_set_inside_and_given_back():
    def now() -> tuple[bool, str, str]:
        kinds = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
        return torch.are_deterministic_algorithms_enabled(), *(k.fp32_precision for k in kinds)

    before = now()
    for precision, float32 in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        for deterministic in (True, False):
            with algorithms(small_config(deterministic=deterministic, precision=precision), CPU):
                assert now() == (deterministic, float32, float32)
            assert now() == before


compiling = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


def test_compiled_network_learns_what_the_plain_one_does(uri, tmp_path, monkeypatch):
    """As torch traces it, forwards and backwards; what it makes of that for a GPU is torch's."""
    traced = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    without_dropout(monkeypatch.setattr)
    runs = [
        fit(small_config(compile=wanted, optim_epochs=1), uri, tmp_path / str(wanted))
        for wanted in (True, False)
    ]
    losses = [[m["loss"] for _, m in record.logged if "loss" in m] for record in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    compiled, plain = (load_file(record.last / "model.safetensors") for record in runs)
    assert compiled.keys() == plain.keys(), "no prefix of the wrapper"


@pytest.fixture
def no_compiler(tmp_path, monkeypatch) -> Iterator[None]:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    with config.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}):
        yield


@compiling
def test_compiling_without_a_compiler_is_one_line(uri, no_compiler):
    with pytest.raises(UserError, match=r"--compile True fails here \(.*pass --compile False") as e:
        fit(small_config(compile=True, optim_epochs=1), uri)
    assert "\n" not in str(e.value)


@compiling
def test_without_a_compiler_views_are_plain_and_one_line_says_so(no_compiler, caplog):
    caplog.set_level(logging.INFO, "training")
    plain, found = (views(small_config(), kind, 227, "resized") for kind in ("cpu", "cuda"))
    assert torch.equal(plain, found)
    assert [text.count("\n") for text in caplog.messages if "uncompiled" in text] == [0]


@pytest.mark.parametrize(("use_gpu", "compiler"), [(True, "gcc"), (False, "g++")])
def test_a_compiler_is_missed_before_anything_starts(tmp_path, monkeypatch, use_gpu, compiler):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    refuse_without_compiler(small_config(), use_gpu)
    with pytest.raises(UserError, match=rf"\({re.escape(compiler)}\).*pass --compile False"):
        refuse_without_compiler(small_config(compile=True), use_gpu)
    (tmp_path / compiler).touch(0o755)
    refuse_without_compiler(small_config(compile=True), use_gpu)


def views(config: TrainConfig, device: str, side: int, crop: str) -> torch.Tensor:
    """Of 5 images; `device` is what they are prepared for, here on the CPU."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (5, side, side, 3), dtype=torch.uint8, generator=generator)
    colours = ((4900.0, 4400.0, 3900.0), (4400.0, 4600.0, 4300.0), (3900.0, 4300.0, 5200.0))
    spec = InputSpec(256, side, (123.0, 117.0, 104.0), (58.0, 57.0, 57.5), colours)
    augment = Augment(crop, flip=True, colour_sigma=0.1)
    drawn = draw_views(spec, augment, seed=1, epoch=0, sample_ids=torch.arange(5))
    compute = input_of(config, torch.device(device))
    return train_view(pixels.permute(0, 3, 1, 2), drawn, spec, augment, compute)


@compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_views_are_the_plain_ones_rounded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    config = small_config(precision="bf16")
    for side, crop in ((227, "resized"), (240, "random")):
        plain, found = (views(config, device, side, crop) for device in ("cpu", "cuda"))
        assert (plain.dtype, found.dtype) == (torch.float32, torch.bfloat16)
        assert found.is_contiguous(memory_format=torch.channels_last)
        rounding = plain.abs().clamp_min(0.25) * 2**-8 + 1e-4
        assert ((found.float() - plain).abs() <= rounding).all()


# Without a store, and under a magnifying glass


def test_synthetic_run_takes_the_same_steps_without_reading_a_shard(uri, tmp_path):
    bare = tmp_path / "bare"  # a set without its shards and index
    bare.mkdir()
    shutil.copy(Path(uri) / "manifest.json", bare)
    found = fit(small_config(synthetic=True, flat_loss_steps=1), str(bare))
    expected = fit(small_config(), uri)
    logged = [[(s, m.get("sample_digest")) for s, m in r.logged] for r in (found, expected)]
    assert logged[0] == logged[1] and found.result["val_images"] == 13


def test_synthetic_images_have_the_shapes_of_the_real_and_belong_to_their_ids(uri):
    with Synthetic(load_manifest(uri), "train", CPU) as source:
        assert (source.num_samples, source.shard_sizes) == (28, [*TRAIN])
        batch = source.read(np.array([5, 2, 5]))
        (again,) = source.batches([np.array([2])])
    assert batch.images.shape == (3, 3, 227, 227) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.images[0], batch.images[2])
    assert not torch.equal(batch.images[0], batch.images[1])
    assert torch.equal(again.images[0], batch.images[1])
    assert batch.labels.dtype == torch.int64 and {*batch.labels.tolist()} <= {0, 1, 2, 3}
    assert batch.sample_ids.tolist() == [5, 2, 5]


def test_profile_is_a_trace_of_the_steps_after_the_warm_up(uri, tmp_path):
    plain = fit(small_config(), uri, tmp_path / "plain")
    seen = fit(small_config(), uri, tmp_path / "seen", profile_to=tmp_path / "profile")
    assert seen.result == plain.result
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    steps = {e["name"] for e in events if str(e.get("name")).startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{number}" for number in (4, 5, 6, 7)}
    assert sum(event.get("name") == "aten::convolution" for event in events) >= 4 * 5


def test_every_line_says_how_far_the_run_is_and_on_a_cpu_nothing_of_a_peak(uri):
    record = fit(small_config(optim_epochs=1), uri)
    lines = [metrics for _, metrics in record.logged if "loss" in metrics]
    assert not any("mfu" in metrics for metrics in lines)
    assert [metrics["progress"] for metrics in lines] == [0.25, 0.5, 0.75, 1.0]
    assert all(metrics["top1"] <= metrics["top5"] <= 1 for metrics in lines)
    assert all(metrics["grad_norm"] > 0 for metrics in lines)
