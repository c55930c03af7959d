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
from torch import nn

from alexnet import classifier
from alexnet.errors import UserError
from training import checkpoint
from training.config import to_dict
from training.network import build_model, load_model

FILES = ["hashes.json", "model.safetensors", "optimizer.safetensors", "state.json"]
STATE = {"step": 7, "metrics": {"val_top1": 0.25}, "lowest_loss": float("inf")}


def fresh(seed: int) -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    model = model.to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    momentum = checkpoint.momentum(model, optimizer)
    checkpoint.save(folder, {"model": model.state_dict(), "optimizer": momentum}, state)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.optim.SGD]:
    model, optimizer = fresh(0)
    model(torch.randn(4, 3, 8, 8)).exp().sum().backward()
    optimizer.step()
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
    for name, value in trained[0].state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for mine, theirs in zip(model.parameters(), trained[0].parameters(), strict=True):
        buffer = optimizer.state[mine]["momentum_buffer"]
        assert torch.equal(buffer, trained[1].state[theirs]["momentum_buffer"]) and buffer.any()
        assert buffer.stride() == mine.stride(), "fused SGD would step the wrong elements"
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


def test_files_are_safetensors_and_json_only(folder):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        ends = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
        assert 8 + length + max(ends) == len(data), "bytes that no tensor accounts for"


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("damage", ["one bit", "cut", "gone"])
def test_damaged_file_is_refused(folder, name, damage):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data if damage == "one bit" else data[: len(data) // 2])
    if damage == "gone":
        (folder / name).unlink()
    with pytest.raises(UserError, match=f"damaged: {name} does not match"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x80", b"[1]", b"null", b"{}", b"[" * 100_000])
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


def test_newest_checkpoint_is_that_of_the_highest_step_without_the_damaged_ones(run_folder, caplog):
    assert step_found(str(run_folder)) == 10
    assert step_found(str(run_folder.parent / "another run")) is None
    damaged = run_folder / "checkpoint_b" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    assert step_found(str(run_folder)) == 9
    assert "checkpoint_b is damaged: model.safetensors" in caplog.text
    (run_folder / "checkpoint_a" / "hashes.json").unlink()  # as after an upload that broke off
    assert step_found(str(run_folder)) == 8
    vouched(run_folder / "checkpoint_c", "state.json", b'{"step": 1e999}')  # of no step
    (run_folder / "checkpoint_c" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        step_found(str(run_folder))


def of_a_run() -> dict[str, Any]:
    return {**STATE, "config": to_dict(small_config()), "manifest": "a" * 64}


def test_checkpoint_of_the_same_run_may_go_on_elsewhere_and_under_the_former_names(tmp_path):
    state = of_a_run()
    state["config"]["recipe"] = state["config"]["model"]["variant"] = "deck"
    (tmp_path / "state.json").write_text(json.dumps(state))
    state = checkpoint.load_state(tmp_path)
    assert state["config"] == to_dict(small_config())
    checkpoint.refuse_other(state, "c", small_config(workers=4, log_steps=7), "a" * 64)


@pytest.mark.parametrize(
    ("changes", "manifest", "told"),
    [
        ({"optim_lr": 0.5}, "a", "optim.lr: 0.01 -> 0.5"),
        ({"model_variant": "paper"}, "a", "model.variant: ungrouped -> paper"),
        ({}, "b", f"manifest: {16 * 'a'} -> {16 * 'b'}"),
        ({}, "a", "optim.momentum: None -> 0.9"),  # a field that an older checkpoint lacks
    ],
)
def test_checkpoint_of_another_run_is_refused_with_what_differs(changes, manifest, told):
    state = of_a_run()
    if "None" in told:
        del state["config"]["optim"]["momentum"]
    with pytest.raises(UserError) as refused:
        checkpoint.refuse_other(state, "c", small_config(**changes), manifest * 64)
    assert f"({told})" in str(refused.value) and "choose another --name" in str(refused.value)


def test_full_disk_is_one_line_and_leaves_its_room_free(small_disk):
    with pytest.raises(UserError, match=r"^a checkpoint cannot .*; make room there or set TMPDIR"):
        checkpoint.save(small_disk / "checkpoint", {"model": {"w": torch.zeros(20_000)}}, STATE)
    assert list(small_disk.iterdir()) == []


def test_folders_that_killed_processes_left_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = 2**22 + 1  # more than Linux gives
    left = tmp_path / f"checkpoint-{socket.gethostname()}~{dead}~x"
    elsewhere = tmp_path / f"checkpoint-another-host~{dead}~x"
    (left / "files").mkdir(parents=True)
    elsewhere.mkdir()
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


def test_file_system_that_maps_no_files_into_memory_is_read(folder, monkeypatch):
    mapped = checkpoint.load_tensors(folder, "model")

    def refused(path: Path) -> None:
        raise OSError("No such device (os error 19)")  # as safetensors has it

    monkeypatch.setattr(classifier, "load_file", refused)
    read = checkpoint.load_tensors(folder, "model")
    assert all(torch.equal(mapped[name], read[name]) for name in mapped.keys() | read.keys())


def test_files_that_fit_their_hashes_but_are_none_are_one_line(folder):
    for content in (b"[]", b"{", b"[" * 100_000):
        vouched(folder, "state.json", content)
        with pytest.raises(UserError, match=r"damaged: state\.json"):
            load_model(str(folder))
    vouched(folder, "model.safetensors", b"\x08")
    with pytest.raises(UserError, match=r"damaged: model\.safetensors"):
        checkpoint.load_tensors(folder, "model")


def test_claim_of_a_huge_network_takes_no_memory(tmp_path):
    """Weights of 300 million classes would be 5 TB; the file has three classes' worth."""
    config, file = small_config(model_width=1.0), tmp_path / "model.safetensors"
    checkpoint.save_file(build_model(small_config(), 3).state_dict(), file)
    fields = to_dict(config)["model"] | {"num_classes": 300_000_000}
    del fields["init"]
    with pytest.raises(UserError, match="size mismatch"):
        classifier.load_network(file, fields)
