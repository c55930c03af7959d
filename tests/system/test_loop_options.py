"""Options of the loop: averages, plateau, update rules, determinism, compiling, when it saves."""

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from shard_sets import write_shard_set
from small_training import CPU, evaluated, fit, small_config, without_dropout

from alexnet.errors import UserError
from alexnet.preprocess import Augment, InputSpec, draw_views, train_view
from pipelines.shards import load_manifest
from training import guards, loop
from training.config import TrainConfig
from training.loader import Synthetic
from training.network import build_model
from training.steps import algorithms, input_of, refuse_without_compiler

TRAIN = (10, 9, 9)  # 28 samples: 4 steps of 7


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("options") / "set", train=TRAIN, val=(7, 6))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Averaged weights


def test_averaged_weights_are_saved_measured_and_continued(uri, tmp_path):
    config = small_config(model_batch_norm=True, optim_ema_decay=0.6, checkpoint_steps=1)
    whole = fit(config, uri, tmp_path / "whole")
    averages = None
    for step in range(1, 9):  # the documented ramp, from the raw weights of each step
        raw = load_file(whole.folders[step] / "raw.safetensors")
        if averages is None:
            initial = build_model(config, 4).state_dict()
            averages = {name: value.numpy().astype(np.float64) for name, value in initial.items()}
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


def test_without_averages_there_is_no_second_copy_of_the_weights(uri, tmp_path):
    last = fit(small_config(optim_epochs=1), uri, tmp_path / "kept").last
    assert {path.stem for path in last.iterdir()} == {"hashes", "model", "optimizer", "state"}


# Schedules and rules


def test_plateau_lowers_the_rate_ends_the_run_and_goes_on_after_a_stop(uri, tmp_path):
    # Nothing is learned at this rate: the second and third epochs are each a plateau.
    config = small_config(
        optim_schedule="plateau",
        optim_plateau_epochs=1,
        optim_plateau_drops=1,
        optim_lr=1e-9,
        optim_epochs=9,
        checkpoint_steps=3,
    )
    whole = fit(config, uri, tmp_path / "whole")
    rates = [metrics["lr"] for _, metrics in whole.logged if "lr" in metrics]
    assert rates == pytest.approx([1e-9] * 8 + [1e-10] * 4)
    assert whole.result["epoch"] == 3.0
    errors = json.loads((whole.last / "state.json").read_text())["val_errors"]
    assert errors == [1 - whole.result["val_top1"]] * 3
    rest = fit(config, uri, tmp_path / "rest", resume=whole.folders[9])
    assert files_of(rest.last) == files_of(whole.last)
    assert fit(config, uri, resume=whole.last).reported == [], "a finished run trains no more"


def test_rules_move_the_weights_as_they_say(uri, tmp_path):
    def first_step(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config = small_config(checkpoint_steps=1, optim_epochs=1, optim_schedule="step", **changes)
        name = "-".join(map(str, changes.values()))
        folder = fit(config, uri, tmp_path / name).folders[1]
        return load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")

    initial = build_model(small_config(), 4).state_dict()
    start = {name: value.numpy() for name, value in initial.items()}
    weights, velocity = first_step(optim_rule="paper")
    for name, value in weights.items():
        np.testing.assert_allclose(value, start[name] + velocity[name], rtol=1e-6, atol=1e-9)
    usual, usual_velocity = first_step(optim_rule="torch")
    for name, value in usual_velocity.items():
        np.testing.assert_allclose(velocity[name], -0.01 * value, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(usual[name], weights[name], rtol=1e-4, atol=1e-7)
    moved = []
    for trust in (0.1, 0.2):
        weights, _ = first_step(optim_rule="lars", optim_lars_trust=trust)
        moved.append(weights["features.conv3.weight"] - start["features.conv3.weight"])
    np.testing.assert_allclose(moved[1], 2 * moved[0], rtol=1e-3, atol=1e-6)


# When it saves


@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        ({"checkpoint_minutes": 1e-9}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ({"checkpoint_minutes": 60.0}, [4, 12]),
        ({"checkpoint_minutes": None}, [4, 12]),
        ({"checkpoint_minutes": 60.0, "checkpoint_steps": 8}, [4, 8, 12]),
        ({"checkpoint_minutes": 60.0, "keep_best": 0}, [12]),
        ({"checkpoint_minutes": 60.0, "keep_best": 2}, [4, 8, 12]),
    ],
    ids=["late", "not late", "never late", "by steps", "best not kept", "two best"],
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


# How it computes


def test_deterministic_algorithms_and_tf32_are_set_inside_and_given_back():
    def now() -> tuple[bool, str, str]:
        backends = torch.backends
        precisions = backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision
        return torch.are_deterministic_algorithms_enabled(), *precisions

    before = now()
    for precision, float32 in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        for deterministic in (True, False):
            config = small_config(deterministic=deterministic, precision=precision)
            with algorithms(config, CPU):
                assert now() == (deterministic, float32, float32)
            assert now() == before


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_network_learns_what_the_plain_one_does(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    without_dropout(monkeypatch.setattr)
    runs = [
        fit(small_config(compile=wanted, optim_epochs=1), uri, tmp_path / str(wanted))
        for wanted in (True, False)
    ]
    losses = [[m["loss"] for _, m in record.logged if "loss" in m] for record in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    compiled, plain = (load_file(record.last / "model.safetensors") for record in runs)
    assert compiled.keys() == plain.keys(), "no prefix of the wrapper"


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_compiling_without_a_compiler_is_one_line(uri, tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    with (
        config.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}),
        pytest.raises(UserError, match=r"--compile True fails here \(.*pass --compile False") as e,
    ):
        fit(small_config(compile=True, optim_epochs=1), uri)
    assert "\n" not in str(e.value)


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


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
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


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_without_a_compiler_views_are_plain_and_one_line_says_so(tmp_path, monkeypatch, caplog):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    caplog.set_level(logging.INFO, "training")
    with config.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}):
        plain, found = (views(small_config(), kind, 227, "resized") for kind in ("cpu", "cuda"))
    assert torch.equal(plain, found)
    assert [text.count("\n") for text in caplog.messages if "uncompiled" in text] == [0]


# Without a store, and under a magnifying glass


def test_synthetic_run_takes_the_same_steps_without_reading_a_shard(uri, tmp_path):
    bare = tmp_path / "bare"  # a set without its shards and index
    bare.mkdir()
    shutil.copy(Path(uri) / "manifest.json", bare)
    config = small_config(synthetic=True, flat_loss_steps=1)
    record = fit(config, str(bare), tmp_path / "kept")
    real = fit(small_config(), uri, tmp_path / "real")
    assert [step for step, _ in record.logged] == [step for step, _ in real.logged]
    assert record.result["val_images"] == 13
    digests = [r.logged[-2][1]["sample_digest"] for r in (record, real)]
    assert digests[0] == digests[1]


def test_synthetic_images_have_the_shapes_of_the_real_and_belong_to_their_ids(uri):
    manifest = load_manifest(uri)
    with Synthetic(manifest, "train", CPU) as source:
        assert (source.num_samples, source.shard_sizes) == (28, [*TRAIN])
        batch = source.read(np.array([5, 2, 5]))
        assert batch.images.shape == (3, 3, 227, 227) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.images[0], batch.images[2])
        assert not torch.equal(batch.images[0], batch.images[1])
        assert batch.labels.dtype == torch.int64 and batch.sample_ids.tolist() == [5, 2, 5]
        (again,) = source.batches([np.array([2])])
        assert torch.equal(again.images[0], batch.images[1])
        assert {*batch.labels.tolist()} <= {0, 1, 2, 3}
        assert sum(source.timings().values()) == 0


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
