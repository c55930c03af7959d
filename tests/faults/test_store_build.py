"""Builds, checks and repairs from and to a store that errs or dies: the undisturbed set
in the end."""

from collections.abc import Iterator

import numpy as np
import pytest
from bad_store import SMALL, weather_of
from made import contents
from store_proxy import SILENT, Weather

from alexnet.errors import UserError
from pipelines import s3, storage
from pipelines.cli import main
from pipelines.shards import load_manifest
from training.loader import Loader

pytestmark = pytest.mark.usefixtures("home", "without_ray")

GONE = ("reset before", SILENT)
TRIES = s3._TRIES
AWAY = "cannot be reached; check AWS_ENDPOINT_URL and the network"


def check_parts(out: str, built_here: dict[str, bytes]) -> None:
    found = contents(out)
    assert all(built_here[name] == data for name, data in found.items()), "a part or other"


def test_a_set_built_through_a_bad_store_is_the_undisturbed_one(
    attack, proxy, bucket, raw_on_store, built_here, lived
):
    out = f"{bucket}/out"
    build = ["build", "--raw", raw_on_store, "--out", out, *SMALL]
    proxy.foul(weather := weather_of(attack))
    lived(build, weather, lambda: check_parts(out, built_here))
    assert proxy.faults or attack.seed  # later runs have a single kind
    proxy.fair()
    assert contents(out) == built_here


def test_a_set_is_checked_and_repaired_through_a_bad_store(
    attack, proxy, raw_on_store, set_on_store, built_here, lived
):
    weather, out = weather_of(attack), set_on_store
    proxy.foul(weather)
    lived(["verify", out, "--full"], weather)
    name = attack.draw.choice([name for name in built_here if not name.startswith("_meta/")])
    data = bytearray(built_here[name] or b"x")
    data[attack.draw.randrange(len(data))] ^= 1
    storage.write(f"{out}/{name}", bytes(data))
    lived(["verify", out, "--full", "--repair", "--raw", raw_on_store], weather)
    assert proxy.faults or attack.seed  # later runs have a single kind
    proxy.fair()
    assert contents(out) == built_here, name


# Away


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A third of a second of silence is a failure, and half a second of failures too long."""
    monkeypatch.setattr(s3, "_SILENCE", 0.3)
    monkeypatch.setattr(s3, "_PATIENCE", 0.5)
    s3._store_for.cache_clear()
    yield
    s3._store_for.cache_clear()


def test_a_store_that_dies_under_a_build_is_told_and_the_build_goes_on_later(
    attack, proxy, bucket, raw_on_store, built_here, impatient, capsys
):
    out = f"{bucket}/out"
    build = ["build", "--raw", raw_on_store, "--out", out, *SMALL]
    fault, begins = attack.draw.choice(GONE), attack.draw.randrange(90)  # of about 100 requests
    proxy.foul(Weather(attack.seed, 1.0, [fault], begins))
    if main(build):  # else it was done before
        assert AWAY in capsys.readouterr().err.strip().splitlines()[-1]
        assert proxy.requests - begins <= 12 * TRIES, "it should have given up"
        proxy.fair()
        check_parts(out, built_here)
    proxy.fair()
    assert main(build) == 0
    assert contents(out) == built_here


@pytest.mark.parametrize("fault", GONE)
def test_a_training_does_not_wait_for_ever_for_a_shard(
    fault, proxy, set_on_store, impatient, monkeypatch
):
    monkeypatch.setattr("training.shard_cache._WAITS", (0.05,) * 20)
    manifest = load_manifest(set_on_store)
    with Loader(set_on_store, manifest, "train", threads=2, cache_gb=1) as loader:
        proxy.foul(Weather(0, 1.0, [fault]))
        with pytest.raises(UserError, match=r"gave up after \d+ s: start the same --name again"):
            loader.read(np.array([0]))
        assert proxy.requests <= 4 * 5 * TRIES, "more patience than the pauses add up to"
