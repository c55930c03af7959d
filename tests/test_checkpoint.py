"""Checkpoints: bit-equal round trip, damage is seen, nothing in them can run code."""

import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.optim import sgd
from pipelines import storage
from training import checkpoint

FILES = {"model.safetensors", "optimizer.safetensors", "state.json", "hashes.json"}
STATE = {"step": 7, "metrics": {"val_top1": 0.25}, "lowest_loss": float("inf")}


def fresh(seed: int) -> tuple[AlexNet, torch.optim.SGD]:
    torch.manual_seed(seed)
    model = AlexNet(num_classes=3, width=1 / 32, batch_norm=True)
    model = model.to(memory_format=torch.channels_last)
    return model, sgd(model, lr=0.1, momentum=0.9, weight_decay=5e-4, bias_lr_factor=2.0)


def train_step(model: AlexNet, optimizer: torch.optim.SGD, seed: int) -> None:
    torch.manual_seed(seed)  # dropout too
    x = torch.randn(4, 3, 227, 227).contiguous(memory_format=torch.channels_last)
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()


def save(folder: Path, model: AlexNet, optimizer: torch.optim.Optimizer, state: dict) -> None:
    momentum = checkpoint.momentum(model, optimizer)
    checkpoint.save(folder, {"model": model.state_dict(), "optimizer": momentum}, state)


def momentum_of(model: AlexNet, optimizer: torch.optim.SGD) -> list[torch.Tensor]:
    return [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]


@pytest.fixture(scope="module")
def trained() -> tuple[AlexNet, torch.optim.SGD]:
    model, optimizer = fresh(0)
    for seed in (1, 2):
        train_step(model, optimizer, seed)
    return model, optimizer


@pytest.fixture
def folder(trained, tmp_path: Path) -> Path:
    save(tmp_path / "saved", *trained, STATE)
    return tmp_path / "saved"


def test_weights_buffers_and_momentum_come_back_bit_for_bit(trained, folder):
    checkpoint.verify(folder)
    model, optimizer = fresh(5)
    checkpoint.load_model(folder, model)
    checkpoint.load_optimizer(folder, model, optimizer)
    saved = trained[0].state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert any("running_var" in name for name in saved)
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    for mine, theirs in zip(momentum_of(model, optimizer), momentum_of(*trained), strict=True):
        assert torch.equal(mine, theirs) and mine.abs().sum() > 0
    for parameter, buffer in zip(model.parameters(), momentum_of(model, optimizer), strict=True):
        assert parameter.stride() == buffer.stride(), "fused SGD would step the wrong elements"
    assert checkpoint.load_state(folder) == STATE


def test_the_step_after_loading_is_the_step_that_would_have_followed(folder):
    model, optimizer = fresh(0)
    for seed in (1, 2, 3):
        train_step(model, optimizer, seed)
    again, its_optimizer = fresh(9)
    checkpoint.load_model(folder, again)
    checkpoint.load_optimizer(folder, again, its_optimizer)
    train_step(again, its_optimizer, 3)
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_before_the_first_step_there_is_no_momentum_to_save(tmp_path):
    model, optimizer = fresh(0)
    save(tmp_path, model, optimizer, STATE)
    checkpoint.verify(tmp_path)
    checkpoint.load_optimizer(tmp_path, model, optimizer)
    assert not any("momentum_buffer" in state for state in optimizer.state.values())


def test_files_are_safetensors_and_json_only(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    for path in folder.iterdir():
        data = path.read_bytes()
        assert not zipfile.is_zipfile(path)
        if path.suffix == ".json":
            json.loads(data)
            continue
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        assert 8 + length + max(ends) == len(data), "bytes that no tensor accounts for"


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        checkpoint.verify(folder)


@pytest.mark.parametrize("name", sorted(FILES - {"hashes.json"}))
@pytest.mark.parametrize("damage", ["one bit", "cut"])
def test_damaged_file_is_refused(folder, name, damage):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data if damage == "one bit" else data[: len(data) // 2])
    with pytest.raises(UserError, match=f"damaged: {name} does not match"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x80", b"[1]", b"null", b"{}"])
def test_unreadable_hashes_are_refused(folder, content):
    (folder / "hashes.json").write_bytes(content)
    with pytest.raises(UserError, match=r"incomplete|damaged"):
        checkpoint.verify(folder)


@pytest.fixture
def run_folder(trained, tmp_path: Path) -> Path:
    """A run with checkpoints of steps 9, 10 and 8, whose names sort otherwise."""
    for name, step in (("checkpoint_a", 9), ("checkpoint_b", 10), ("checkpoint_c", 8)):
        save(tmp_path / "run" / name, *trained, {**STATE, "step": step})
    (tmp_path / "run" / "checkpoint_manager_snapshot.json").write_text("{}")
    return tmp_path / "run"


def step_found(run: str) -> int | None:
    with checkpoint.newest_good(run) as folder:
        return None if folder is None else checkpoint.load_state(folder)["step"]


def test_newest_checkpoint_is_the_one_of_the_highest_step(run_folder, tmp_path):
    assert step_found(str(run_folder)) == 10
    assert step_found(str(tmp_path / "another run")) is None


def test_damaged_checkpoints_are_passed_over_and_told(run_folder, caplog):
    damaged = run_folder / "checkpoint_b" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    assert step_found(str(run_folder)) == 9
    assert "checkpoint_b is damaged: model.safetensors" in caplog.text
    (run_folder / "checkpoint_a" / "hashes.json").unlink()  # as after an upload that broke off
    assert step_found(str(run_folder)) == 8
    (run_folder / "checkpoint_c" / "state.json").write_text("not JSON")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        step_found(str(run_folder))


def test_checkpoints_on_s3_are_found_and_verified_too(run_folder, s3):
    run = f"{s3}/run"
    for path in run_folder.rglob("*"):
        if path.is_file():
            storage.write(f"{run}/{path.relative_to(run_folder)}", path.read_bytes())
    assert step_found(run) == 10
    storage.delete(f"{run}/checkpoint_b/optimizer.safetensors")
    assert step_found(run) == 9
