"""A store that is away: for good, at some instant, or for the seconds of a restart."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from attacks import Attack
from bad_weather import SMALL
from made import contents
from store_proxy import SILENT, Proxy, Weather

from alexnet.errors import UserError
from pipelines import s3, storage
from pipelines.cli import main
from pipelines.shards import load_manifest
from training.loader import Loader

pytest_plugins = ["bad_store", "store_commands"]
pytestmark = pytest.mark.usefixtures("home", "without_ray")

GONE = ("reset before", SILENT)
TRIES = s3._TRIES


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A third of a second of silence is a failure, and half a second of failures too long."""
    monkeypatch.setattr(s3, "_SILENCE", 0.3)
    monkeypatch.setattr(s3, "_PATIENCE", 0.5)
    s3._store_for.cache_clear()
    yield
    s3._store_for.cache_clear()


@pytest.mark.parametrize("fault", GONE)
def test_a_store_that_never_answered_is_told_after_few_tries(
    fault: str, proxy: Proxy, bucket: str, impatient: None
) -> None:
    for action in (
        lambda: storage.read(f"{bucket}/file"),
        lambda: storage.list_files(bucket),
        lambda: storage.write_new(f"{bucket}/file", b"content"),
    ):
        proxy.foul(Weather(0, 1.0, [fault]))
        with pytest.raises(UserError) as told:
            action()
        assert str(told.value).endswith(
            f"{proxy.url} cannot be reached; check AWS_ENDPOINT_URL and the network"
        )
        assert proxy.fair().requests == TRIES


def test_a_store_that_dies_under_a_build_is_told_and_the_build_goes_on_later(
    attack: Attack,
    proxy: Proxy,
    bucket: str,
    raw_on_store: str,
    built_here: dict[str, bytes],
    impatient: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = f"{bucket}/out"
    build = ["build", "--raw", raw_on_store, "--out", out, *SMALL]
    fault, begins = attack.draw.choice(GONE), attack.draw.randrange(90)  # of about 100 requests
    proxy.foul(Weather(attack.seed, 1.0, [fault], begins))
    code = main(build)
    seen = proxy.fair()
    said = capsys.readouterr().err.strip().splitlines()
    if code:  # else it was done before
        assert "cannot be reached; check AWS_ENDPOINT_URL and the network" in said[-1]
        assert seen.requests - begins <= 12 * TRIES, "it should have given up"
        found = contents(out)
        assert all(built_here[name] == data for name, data in found.items()), "a part or other"
    assert main(build) == 0
    assert contents(out) == built_here
    attack.survived(f"store dead: {fault}", "build", faults=bool(code))


@pytest.mark.parametrize("command", ["build", "verify"])
def test_a_restart_of_the_store_costs_seconds_and_no_failure(
    attack: Attack,
    command: str,
    proxy: Proxy,
    bucket: str,
    raw_on_store: str,
    built_here: dict[str, bytes],
    lived: Callable[..., float],
) -> None:
    out = f"{bucket}/out"
    build = ["build", "--raw", raw_on_store, "--out", out, *SMALL]
    if command == "verify":
        assert main(build) == 0
    argv = build if command == "build" else ["verify", out, "--full"]
    proxy.foul(Weather(attack.seed, 1.0, ["reset before"], begins=attack.draw.randint(2, 30)))
    mended = threading.Event()

    def mend() -> None:
        while not proxy.seen.faults and not mended.wait(0.01):
            pass
        mended.wait(2.0)
        proxy.weather = Weather()

    restart = threading.Thread(target=mend)
    restart.start()
    began = time.monotonic()
    try:
        assert main(argv) == 0
    finally:
        mended.set()
        restart.join()
    seconds = time.monotonic() - began
    faults = bool(proxy.fair().faults)
    assert contents(out) == built_here
    again = argv if command == "verify" else [*build[:4], f"{bucket}/again", *SMALL]
    lost = max(0.0, seconds - lived(again, Weather()))
    attack.survived("store away for 2 s", command, faults=faults, seconds_lost=lost)


@pytest.mark.parametrize("fault", GONE)
def test_a_training_does_not_wait_for_ever_for_a_shard(
    fault: str,
    proxy: Proxy,
    set_on_store: str,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.shard_cache._WAITS", (0.05,) * 20)
    manifest = load_manifest(set_on_store)
    with Loader(set_on_store, manifest, "train", threads=2, cache_gb=1) as loader:
        proxy.foul(Weather(0, 1.0, [fault]))
        with pytest.raises(UserError, match=r"gave up after \d+ s: start the same --name again"):
            loader.read(np.array([0]))
        assert proxy.fair().requests <= 4 * 5 * TRIES, "more patience than the pauses add up to"
