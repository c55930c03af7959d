"""The training loop: resuming, its steps, what it learns, when it stops."""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from safetensors.torch import load_file
from shard_sets import write_shard_set
from small_training import BY_HEART, evaluated, fit, seen_ids, small_config, without_dropout

from alexnet.errors import UserError
from alexnet.preprocess import Augment, draw_views, train_view
from pipelines.shards import load_manifest
from training import checkpoint, guards, loop, recipes
from training.guards import TrainingStopped, check_losses, starved
from training.loader import Loader
from training.meter import Reading
from training.network import build_model, input_spec
from training.order import epoch_order
from training.steps import Stepper

TRAIN = (10, 9, 9)  # 28 samples: 4 steps of 7, which neither 2 nor 3 ranks divide


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("loop") / "set", train=TRAIN, val=(7, 6))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Resuming


@pytest.mark.parametrize("step", [3, 4, 6])  # inside the first epoch, at its end, inside the next
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(uri, tmp_path, step):
    config = small_config(model_batch_norm=True, checkpoint_steps=3)
    whole = fit(config, uri, tmp_path / "whole")
    torch.manual_seed(99)  # nothing may hang on where the generator stood
    rest = fit(config, uri, tmp_path / "rest", resume=whole.folders[step])
    assert sorted(rest.folders) == [saved for saved in (3, 4, 6, 8) if saved > step]
    assert files_of(rest.last) == files_of(whole.last)
    assert rest.result == whole.result
    again = fit(config, uri, resume=whole.last)
    assert again.result == whole.result and again.reported == again.logged == []


def test_run_stopped_wherever_it_stands_loses_no_step_and_no_bit(uri, tmp_path, monkeypatch):
    """Inside epochs, at their ends, in the middle of evaluations and again where it goes on."""
    monkeypatch.setattr(guards, "_MOST_STEPS", 1)  # asks after every step
    config = small_config(model_batch_norm=True)
    whole = fit(config, uri, tmp_path / "whole")
    learned = seen_ids(monkeypatch.setattr)
    last, evaluated = None, set()
    for life, looks in enumerate([2, 1, 2, 1, 2, 3, 1, 1, 2, 1, 100]):
        answers = itertools.chain([False] * (looks - 1), itertools.repeat(True))
        stopping = answers.__next__
        part = fit(config, uri, tmp_path / f"{life}", resume=last, stopping=stopping)
        last = part.last
        state = checkpoint.load_state(last)
        evaluated.add((state["step"], state["evaluated_step"]))
    assert (4, 0) in evaluated and (8, 4) in evaluated, "stopped before it was evaluated"
    assert len(learned) == 8, "a step was done twice, or left out"
    assert files_of(last) == files_of(whole.last)


def test_resuming_needs_the_momentum_and_the_masks(uri, tmp_path, monkeypatch):
    """The comparison above can fail: without momentum, or with the masks of other steps."""
    config = small_config(checkpoint_steps=3)
    whole = fit(config, uri, tmp_path / "whole")

    def rest(name: str, start: Path) -> bytes:
        return files_of(fit(config, uri, tmp_path / name, resume=start).last)["model.safetensors"]

    ended = files_of(whole.last)["model.safetensors"]
    assert rest("same", whole.folders[6]) == ended
    bare = shutil.copytree(whole.folders[6], tmp_path / "bare")
    checkpoint.save_file({}, bare / "optimizer.safetensors")
    assert rest("without momentum", bare) != ended
    step = Stepper.step
    monkeypatch.setattr(
        Stepper, "step", lambda *rest, number, **more: step(*rest, number=number + 1, **more)
    )
    assert rest("other masks", whole.folders[6]) != ended


def test_checkpoint_of_other_settings_or_shards_is_refused(uri, tmp_path):
    last = fit(small_config(optim_epochs=1), uri, tmp_path / "whole").last
    with pytest.raises(UserError, match=r"of another training \(optim.lr: 0.01 -> 0.02\)"):
        fit(small_config(optim_epochs=1, optim_lr=0.02), uri, resume=last)
    others = write_shard_set(tmp_path / "others", train=TRAIN, val=(5,), seed=1)
    with pytest.raises(UserError, match=r"of another training \(manifest: [0-9a-f]{16} -> "):
        fit(small_config(optim_epochs=1), others, resume=last)


def test_digest_of_the_samples_is_a_chain_over_the_steps_and_their_sorted_ids(uri):
    logged = [m for _, m in fit(small_config(), uri).logged if "loss" in m]
    running = b""
    for number, metrics in enumerate(logged):
        order = epoch_order(TRAIN, seed=0, epoch=number // 4)
        ids = sorted(order[number % 4 * 7 : number % 4 * 7 + 7].tolist())
        packed = b"".join(value.to_bytes(8, "little") for value in [number, *ids])
        running = hashlib.sha256(running + packed).digest()
        assert metrics["sample_digest"] == int(running.hex()[:12], 16)
    assert len(logged) == 8


# One step


def test_first_step_is_sgd_on_the_mean_loss_of_its_batch(uri, tmp_path, monkeypatch):
    without_dropout(monkeypatch.setattr)
    config = small_config(
        optim_bias_lr_factor=2.0, optim_label_smoothing=0.1, optim_warmup_epochs=1.0, seed=3
    )
    record = fit(dataclasses.replace(config, checkpoint_steps=1), uri, tmp_path / "kept")
    manifest = load_manifest(uri)
    ids = epoch_order(TRAIN, seed=3, epoch=0)[:7]
    with Loader(uri, manifest, "train", threads=1, cache_gb=1) as loader:
        batch = loader.read(ids)
    spec = input_spec(manifest, config)
    augment = Augment(crop="resized", flip=True, colour_sigma=0.1)
    drawn = draw_views(spec, augment, seed=3, epoch=0, sample_ids=torch.from_numpy(ids))
    x = train_view(batch.images, drawn, spec, augment)
    model = build_model(config, 4)
    target = torch.full((7, 4), 0.1 / 4)
    target[range(7), batch.labels] += 0.9
    loss = -(target * model(x).log_softmax(1)).sum(1).mean()
    loss.backward()
    saved = load_file(record.folders[1] / "model.safetensors")
    momentum = load_file(record.folders[1] / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        bias = parameter.ndim == 1
        velocity = parameter.grad + (0 if bias else 5e-4) * parameter.detach()
        scale = velocity.abs().max().item()
        torch.testing.assert_close(momentum[name], velocity, rtol=1e-3, atol=1e-4 * scale)
        rate = 0.01 / 4 * (2 if bias else 1)  # the first of four steps of warm-up
        expected = parameter.detach() - rate * momentum[name]
        torch.testing.assert_close(saved[name], expected, rtol=1e-5, atol=1e-7)
    step, metrics = record.logged[0]
    assert (step, metrics["loss"]) == (1, pytest.approx(loss.item(), rel=1e-4))
    assert metrics["lr"] == pytest.approx(0.0025) and metrics["epoch"] == 0.25


def test_batches_that_are_filled_up_to_one_size_teach_what_they_did(uri, tmp_path, monkeypatch):
    without_dropout(monkeypatch.setattr)
    config = small_config(optim_batch_size=5, optim_label_smoothing=0.1)  # batches of 4 and 5
    plain = fit(config, uri, tmp_path / "plain")
    on_gpu = loop._part_size(config, 28, loop.Place(torch.device("cuda")))
    monkeypatch.setattr(loop, "_part_size", lambda *_: on_gpu)
    view, sizes = loop.train_view, []
    monkeypatch.setattr(
        loop, "train_view", lambda images, *rest: sizes.append(len(images)) or view(images, *rest)
    )
    filled = fit(config, uri, tmp_path / "filled")
    assert set(sizes) == {5} and len(sizes) == len(plain.logged) - 2
    for (_, mine), (_, theirs) in zip(filled.logged, plain.logged, strict=True):
        for name in {"loss", "top1", "top5", "grad_norm", "val_loss"} & mine.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name
        assert mine.get("sample_digest") == theirs.get("sample_digest")


def test_gpus_get_parts_of_one_size_but_for_batch_norm():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    baseline = recipes.baseline()
    sizes = [loop._part_size(baseline, 1_281_167, loop.Place(gpu, 0, w)) for w in (1, 3, 8)]
    assert sizes == [256, 86, 32]
    assert loop._part_size(baseline, 1_281_167, loop.Place(cpu)) is None
    assert loop._part_size(recipes.fast(), 1_281_167, loop.Place(gpu)) is None


def test_bf16_computes_in_bf16_and_keeps_weights_in_float32(uri, tmp_path):
    half = fit(small_config(precision="bf16", optim_epochs=1), uri, tmp_path / "half")
    weights = load_file(half.last / "model.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluated(half.last, uri, "val").loss == half.result["val_loss"]
    exact = evaluated(half.last, uri, "val").loss  # as the gate will compute it
    assert exact != half.result["val_loss"] == pytest.approx(exact, rel=0.01)


def test_seed_decides_everything(uri, tmp_path):
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        run = fit(small_config(seed=seed, optim_epochs=1), uri, tmp_path / str(number))
        digests.append(json.loads((run.last / "hashes.json").read_text())["model.safetensors"])
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("side", "crop"), [(227, "resized"), (231, "random")])
def test_auto_crop_takes_random_windows_where_the_shards_leave_room(
    tmp_path, monkeypatch, side, crop
):
    uri = write_shard_set(tmp_path / "set", train=(4,), val=(2,), side=side)
    seen = drawn_with(monkeypatch)
    fit(small_config(augment_crop="auto", augment_flip=False, optim_epochs=1), uri)
    assert seen == [(Augment(crop=crop, flip=False, colour_sigma=0.1), 0, 0)]


def test_views_are_drawn_by_seed_and_epoch_and_colour_noise_ends_with_its_last(uri, monkeypatch):
    seen = drawn_with(monkeypatch)
    fit(small_config(seed=6, augment_colour_epochs=1), uri)
    found = [(seed, epoch, augment.colour_sigma) for augment, seed, epoch in seen]
    assert found == [(6, 0, 0.1)] * 4 + [(6, 1, 0.0)] * 4


def drawn_with(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Augment, int, int]]:
    """Fills with augmentation, seed and epoch of each train step from now on."""
    seen: list[tuple[Augment, int, int]] = []

    def recording(spec: Any, augment: Augment, *, seed: int, epoch: int, **rest: Any) -> Any:
        seen.append((augment, seed, epoch))
        return draw_views(spec, augment, seed=seed, epoch=epoch, **rest)

    monkeypatch.setattr(loop, "draw_views", recording)
    return seen


def test_frozen_first_layer_stays_while_the_others_learn(uri, tmp_path):
    config = small_config(optim_rule="paper", optim_momentum=0.0, optim_conv1_freeze_epoch=1)
    folders = fit(config, uri, tmp_path / "kept").folders
    before, after = (load_file(folders[step] / "model.safetensors") for step in (4, 8))
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {"features.conv1.weight", "features.conv1.bias"}


def test_inputs_are_divided_by_their_deviation_only_where_the_recipe_says(uri):
    manifest = load_manifest(uri)
    both = [input_spec(manifest, small_config(normalise=n)) for n in ("mean", "mean_std")]
    assert both[0].std == (1.0, 1.0, 1.0) and both[0].mean == both[1].mean == manifest.pixels.mean
    np.testing.assert_allclose(both[1].std, np.sqrt(np.diag(manifest.pixels.covariance)))


# What it tells and learns


def test_logs_checkpoints_and_reports_come_when_they_are_due(uri, tmp_path):
    run = fit(small_config(log_steps=3, checkpoint_steps=3), uri, tmp_path / "kept")
    trained = [(step, m["epoch"]) for step, m in run.logged if "loss" in m]
    assert trained == [(3, 0.75), (4, 1.0), (6, 1.5), (8, 2.0)]
    assert [step for step, m in run.logged if "val_top1" in m] == [4, 8]
    assert [metrics.get("epoch") for metrics, _ in run.reported] == [None, 1.0, 1.0, 2.0]
    assert list(run.folders) == [3, 4, 6, 8]
    assert run.result["val_images"] == 13 and run.result == run.reported[-1][0]
    state = checkpoint.load_state(run.last)
    assert (state["step"], state["run_id"], state["num_classes"]) == (8, "a-run", 4)
    assert state["manifest"] == load_manifest(uri).digest


def test_sixteen_images_can_be_learned_by_heart(tmp_path):
    uri = write_shard_set(tmp_path / "set", train=(8, 8), val=(4,))
    run = fit(small_config(**BY_HEART), uri, tmp_path / "kept")
    assert evaluated(run.last, uri, "train", **BY_HEART).top1 == 1.0


# When it stops


def test_loss_that_is_not_finite_stops_the_run_with_step_and_advice(uri, tmp_path):
    with pytest.raises(TrainingStopped) as stopped:
        fit(small_config(optim_lr=1e6, log_steps=2), uri, tmp_path / "kept")
    ids = ", ".join(map(str, epoch_order(TRAIN, seed=0, epoch=0)[7:14]))
    assert f"loss is nan at step 2 (batch of 7 samples, ids {ids});" in str(stopped.value)
    assert "--optim.lr (now 1000000.0)" in str(stopped.value)
    assert not (tmp_path / "kept").exists(), "a checkpoint of a broken run"


def test_weights_that_are_not_finite_are_not_saved_although_the_loss_was(uri, tmp_path):
    config = small_config(optim_lr=1e39, checkpoint_steps=1)
    with pytest.raises(TrainingStopped, match="weights are not finite after step 1; "):
        fit(config, uri, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_other_samples_than_those_of_the_order_are_not_learned_from(uri, monkeypatch):
    batches = Loader.batches
    monkeypatch.setattr(Stepper, "step", lambda *_, **__: pytest.fail("learned from them"))
    monkeypatch.setattr(
        Loader, "batches", lambda self, ids, **how: batches(self, [i[::-1] for i in ids], **how)
    )
    with pytest.raises(AssertionError, match="a batch of other samples"):
        fit(small_config(), uri)


def reading(*losses: float, norm: float = 1.0) -> Reading:
    """norm: of the last step's gradient."""
    norms = [1.0] * (len(losses) - 1) + [norm]
    return Reading({"loss": sum(losses) / len(losses)}, [*losses], norms)


def check(what: Reading, step: int, lowest: float = math.inf, **changes: Any) -> float:
    return check_losses(
        what,
        lowest,
        step=step,
        config=small_config(**changes),
        num_classes=1000,
        ids_of=lambda number: np.arange(100 * number, 100 * number + 12),
    )


@pytest.mark.parametrize(
    ("what", "named"),
    [
        (reading(6.9, 6.8, math.nan, math.nan), "loss is nan at step 39 (batch of 12 samples, ids"),
        (reading(6.9, 6.8, -math.inf, 1.0), "loss is -inf at step 39 (batch"),
        (reading(6.9, 6.8, norm=math.inf), "gradient norm is inf at step 40 (batch"),
    ],
)
def test_first_broken_step_of_a_reading_is_named_with_its_samples_and_the_remedy(what, named):
    with pytest.raises(TrainingStopped) as stopped:
        check(what, step=40, optim_lr=0.5)
    step = 40 if "40" in named else 39
    assert str(stopped.value).startswith(named) and f"ids {100 * step}, " in str(stopped.value)
    assert "lower --optim.lr (now 0.5)" in str(stopped.value)


def test_lowest_loss_is_kept_and_a_flat_one_stops_at_its_patience():
    assert check(reading(6.9, 6.7), step=99, flat_loss_steps=100) == pytest.approx(6.8)
    assert check(reading(7.0), step=100, lowest=6.8, flat_loss_steps=100) == 6.8
    for patience, synthetic in ((0, False), (100, True)):
        check(reading(6.9), step=100, flat_loss_steps=patience, synthetic=synthetic)
    with pytest.raises(TrainingStopped, match=r"in 100 steps, guessing gives 6.908 \(last: batch"):
        check(reading(6.9), step=100, flat_loss_steps=100)


@pytest.mark.parametrize(
    ("wait", "copy", "spent", "cause"),
    [
        (0.1, 0.3, {"wait": 1.0, "read": 0.0, "decode": 0.0}, "copying images to the device"),
        (0.4, 0.0, {"wait": 4.0, "read": 9.0, "decode": 2.0}, "the store"),
        (0.4, 0.0, {"wait": 4.0, "read": 2.0, "decode": 9.0}, "decoding"),
        (0.4, 0.0, {"wait": 0.1, "read": 2.0, "decode": 9.0}, "the loop itself"),
        (0.0, 0.0, {"wait": 0.0, "read": 2.0, "decode": 9.0}, "the loop itself"),
    ],
)
def test_starved_accelerator_is_told_with_its_cause(wait, copy, spent, cause):
    used = 1 - (wait + copy or 0.5)  # a GPU that idles between the kernels of its steps
    metrics = {"utilization": used, "data_wait": wait, "data_copy": copy, "seconds": 10}
    said = starved(metrics, spent)
    assert f"computes for {used:.0%}" in said and f"waits for {cause}" in said


def test_busy_or_unmeasured_accelerator_is_not_complained_about():
    times = {"data_wait": 0.1, "data_copy": 0.0, "seconds": 10.0}
    spent = {"wait": 1.0, "read": 1.0, "decode": 1.0}
    assert starved(times | {"utilization": 0.9}, spent) is None
    assert starved(times, spent) is None
    assert starved(times | {"utilization": 0.899}, spent) is not None


def test_slow_decoder_is_named_once_in_a_run(tmp_path, monkeypatch, caplog):
    uri = write_shard_set(tmp_path / "set", train=(12,), val=(2,))
    decode = simplejpeg.decode_jpeg

    def slowly(*args: Any, **rest: Any) -> Any:
        time.sleep(0.05)
        return decode(*args, **rest)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", slowly)
    with caplog.at_level(logging.WARNING, "training"):
        run = fit(small_config(optim_batch_size=4), uri)
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "waits for decoding; try --cache decoded" in said[0]
    late = [metrics["utilization"] for _, metrics in run.logged if "utilization" in metrics]
    assert len(late) == 5 and min(late) < 0.9, "all lines but that of the first step"
