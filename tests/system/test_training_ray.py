"""Through Ray: scores are those of one process, and a stop that is asked for arrives."""

import numpy as np
import pytest
import ray
import torch
from shard_sets import write_shard_set
from small_training import CPU
from waiting import wait_until

from alexnet.errors import UserError
from alexnet.model import AlexNet
from pipelines.shards import load_manifest
from training.accuracy import Scored
from training.config import TrainConfig
from training.evaluate import score
from training.network import input_spec
from training.worker import _stopping, ask_to_stop

CLASSES = 7


@pytest.fixture(scope="module")
def network() -> AlexNet:
    torch.manual_seed(2)
    return AlexNet(num_classes=CLASSES, width=1 / 16, init="he").eval()


def scored(network: AlexNet, uri: str, workers: int | None) -> Scored:
    manifest = load_manifest(uri)
    return score(network, input_spec(manifest, TrainConfig()), uri, manifest, workers=workers)


def test_ray_gives_the_same_integers_as_one_process(local_ray, tmp_path, network, monkeypatch):
    """In whichever order the shards' scores arrive: here the last that was begun comes first."""
    monkeypatch.setattr(ray, "wait", lambda running: ([running[-1]], running[:-1]))
    uri = write_shard_set(tmp_path, train=(3,), val=(9, 4, 1, 6), classes=CLASSES, side=229)
    alone, on_ray = (scored(network, uri, workers) for workers in (None, 3))
    assert on_ray.keys == alone.keys
    for name in ("labels", "place", "top"):
        np.testing.assert_array_equal(getattr(on_ray, name), getattr(alone, name))
    assert len(set(alone.place.tolist())) > 1, "a network that cannot tell wrong order"
    np.testing.assert_allclose(on_ray.loss, alone.loss, rtol=1e-5)
    np.testing.assert_allclose(on_ray.probabilities, alone.probabilities, rtol=1e-5)
    assert next(network.parameters()).device == CPU, "the caller's network was moved"


def test_a_changed_shard_is_one_line_from_this_process_and_from_ray(local_ray, tmp_path, network):
    uri = write_shard_set(tmp_path, train=(1,), val=(2, 2), classes=CLASSES, side=229)
    path = tmp_path / "val-000001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for workers in (None, 1):
        with pytest.raises(UserError, match=r"val-000001.tar has .* sha256 .* verify"):
            scored(network, uri, workers)


def test_a_stop_that_the_driver_asks_for_reaches_the_training_of_that_lease_alone(local_ray):
    assert not ask_to_stop("mine"), "nobody has begun"
    with _stopping("mine") as mine, _stopping("another's") as others:
        assert not mine()
        assert ask_to_stop("mine")
        wait_until(mine)
        assert not others()
