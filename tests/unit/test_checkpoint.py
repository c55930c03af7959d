"""Checkpoints: bit-equal round trip, damage is seen, nothing in them can run code."""

import hashlib
import json
import socket
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import small_config
from torch.nn import functional as F

from alexnet import classifier
from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.optim import Rates, set_rates, sgd
from training import checkpoint
from training.config import to_dict
from training.network import load_model

FILES = {"model.safetensors", "optimizer.safetensors", "state.json", "hashes.json"}
STATE = {"step": 7, "metrics": {"val_top1": 0.25}, "lowest_loss": float("inf")}


def fresh(seed: int) -> tuple[AlexNet, torch.optim.SGD]:
    torch.manual_seed(seed)
    model = AlexNet(num_classes=3, width=1 / 32, batch_norm=True)
    model = model.to(memory_format=torch.channels_last)
    optimizer = sgd(model, momentum=0.9, weight_decay=5e-4)
    set_rates(optimizer, Rates(0.1, 0.2, 0.1, 0.2))
    return model, optimizer


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
    model.load_state_dict(checkpoint.load_tensors(folder, "model"))
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


def test_what_is_held_is_written_as_it_was_whatever_the_next_steps_do(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = fresh(0)[0].to(device)
    momentum = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    tensors = {"model": model.state_dict(), "optimizer": momentum}
    checkpoint.save(tmp_path / "then", tensors, STATE)
    write = checkpoint.held(tensors, STATE)
    for value in (*tensors["model"].values(), *momentum.values()):
        value.zero_()  # as a step does, in place
    with ThreadPoolExecutor(1) as pool:
        folder = pool.submit(write).result()
    for name in FILES:
        assert (folder / name).read_bytes() == (tmp_path / "then" / name).read_bytes(), name
    checkpoint.verify(folder)


def test_further_tensors_travel_and_are_guarded_like_the_others(trained, tmp_path):
    averaged = {name: value.float() / 2 for name, value in trained[0].state_dict().items()}
    tensors = {"model": averaged, "optimizer": {}, "raw": trained[0].state_dict()}
    checkpoint.save(tmp_path, tensors, STATE)
    for name, value in checkpoint.load_tensors(tmp_path, "raw").items():
        assert torch.equal(value, trained[0].state_dict()[name])
    (tmp_path / "raw.safetensors").unlink()
    with pytest.raises(UserError, match=r"damaged: raw\.safetensors"):
        checkpoint.verify(tmp_path)


def test_before_the_first_step_there_is_no_momentum_to_save(tmp_path):
    model, optimizer = fresh(0)
    save(tmp_path, model, optimizer, STATE)
    checkpoint.verify(tmp_path)
    checkpoint.load_optimizer(tmp_path, model, optimizer)
    assert not any("momentum_buffer" in state for state in optimizer.state.values())


def test_files_are_safetensors_and_json_only(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        ends = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
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


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x80", b"[1]", b"null", b"{}", b"[[1, 2]]", b"[" * 100_000]
)
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


def refuse_other(folder: Path, *rest: Any) -> None:
    checkpoint.refuse_other(checkpoint.load_state(folder), folder.name, *rest)


@pytest.fixture
def of_a_training(trained, tmp_path: Path) -> Path:
    state = {**STATE, "config": to_dict(small_config()), "manifest": "a" * 64}
    save(tmp_path / "checkpoint-7", *trained, state)
    return tmp_path / "checkpoint-7"


def test_checkpoint_of_the_same_training_may_go_on_elsewhere(of_a_training):
    refuse_other(of_a_training, small_config(workers=4, log_steps=7), "a" * 64)


@pytest.mark.parametrize(
    ("changes", "manifest", "told"),
    [
        ({"optim_lr": 0.5}, "a", "optim.lr: 0.01 -> 0.5"),
        ({"recipe": "paper"}, "a", "recipe: baseline -> paper"),
        ({"model_variant": "paper"}, "a", "model.variant: ungrouped -> paper"),
        ({}, "b", f"manifest: {16 * 'a'} -> {16 * 'b'}"),
    ],
)
def test_checkpoint_of_another_training_is_refused_with_what_differs(
    of_a_training, changes, manifest, told
):
    with pytest.raises(UserError) as refused:
        refuse_other(of_a_training, small_config(**changes), manifest * 64)
    assert f"({told})" in str(refused.value) and "choose another --name" in str(refused.value)


def test_checkpoint_with_the_former_names_is_of_the_same_training(of_a_training):
    state = checkpoint.load_state(of_a_training)
    state["config"]["recipe"] = state["config"]["model"]["variant"] = "deck"
    (of_a_training / "state.json").write_text(json.dumps(state))
    refuse_other(of_a_training, small_config(), "a" * 64)
    assert checkpoint.load_state(of_a_training)["config"] == to_dict(small_config())


def test_field_that_an_older_checkpoint_lacks_is_told(of_a_training):
    state = checkpoint.load_state(of_a_training)
    del state["config"]["optim"]["momentum"]
    (of_a_training / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"optim\.momentum: None -> 0\.9"):
        refuse_other(of_a_training, small_config(), "a" * 64)


def test_folder_that_cannot_be_written_is_one_line(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as told:
        save(tmp_path / "file" / "checkpoint", *trained, STATE)
    assert "cannot be written" in str(told.value) and "\n" not in str(told.value)


def test_full_disk_is_one_line_and_leaves_its_room_free(trained, small_disk):
    with pytest.raises(UserError, match=r"make room there or set TMPDIR"):
        save(small_disk / "checkpoint", *trained, STATE)
    assert list(small_disk.iterdir()) == []


def test_folders_that_killed_processes_left_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = 2**22 + 1  # more than Linux gives
    left = tmp_path / f"checkpoint-{socket.gethostname()}~{dead}~x"
    elsewhere = tmp_path / f"checkpoint-another-host~{dead}~x"
    for folder in (left, elsewhere):
        folder.mkdir()
        (folder / "model").touch()
    first = checkpoint.temporary_folder()
    second = checkpoint.temporary_folder()
    assert {*tmp_path.iterdir()} == {elsewhere, first, second}


def vouched(folder: Path, name: str, data: bytes) -> None:
    """With a hash that fits, as another program or release writes it."""
    (folder / name).write_bytes(data)
    hashes = json.loads((folder / "hashes.json").read_text())
    hashes[name] = hashlib.sha256(data).hexdigest()
    (folder / "hashes.json").write_text(json.dumps(hashes))


@pytest.mark.parametrize("name", ["../../outside.json", "/etc/passwd", "sub/x.json", "x"])
def test_hashes_of_files_elsewhere_are_refused(folder, name):
    hashes = json.loads((folder / "hashes.json").read_text()) | {name: "0" * 64}
    (folder / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(UserError, match="is no file of it"):
        checkpoint.verify(folder)


def test_step_without_end_is_that_of_no_checkpoint(run_folder):
    vouched(run_folder / "checkpoint_b", "state.json", b'{"step": 1e999}')
    assert step_found(str(run_folder)) == 9


def test_file_system_that_maps_no_files_into_memory_is_read(folder, monkeypatch):
    mapped = checkpoint.load_tensors(folder, "model")

    def refused(path: Path) -> None:
        raise OSError("No such device (os error 19)")  # as safetensors has it

    monkeypatch.setattr(classifier, "load_file", refused)
    read = checkpoint.load_tensors(folder, "model")
    assert mapped.keys() == read.keys()
    assert all(torch.equal(mapped[name], read[name]) for name in mapped)


def test_files_that_fit_their_hashes_but_are_none_are_one_line(folder):
    for content in (b"[]", b"{", b"[" * 100_000):
        vouched(folder, "state.json", content)
        with pytest.raises(UserError, match=r"damaged: state\.json"):
            load_model(str(folder))
    vouched(folder, "model.safetensors", b"\x08")
    with pytest.raises(UserError, match=r"damaged: model\.safetensors"):
        checkpoint.load_tensors(folder, "model")


def test_claim_of_a_huge_network_takes_no_memory(of_a_training):
    """300 million classes would be 5 TB of weights; the file has three classes' worth."""
    state = checkpoint.load_state(of_a_training) | {"num_classes": 300_000_000}
    vouched(of_a_training, "state.json", json.dumps(state).encode())
    with pytest.raises(UserError, match="is from another release"):
        load_model(str(of_a_training))
