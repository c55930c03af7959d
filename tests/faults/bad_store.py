"""A store behind a proxy that errs, sets on it, and commands that go on until they succeed."""

import secrets
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from made import contents, made_shards
from seaweed import Seaweed
from store_proxy import FAULTS, PAGE, Proxy, Weather, proxied

from pipelines import storage
from pipelines.cli import main
from pipelines.plan import Recipe

# Flags of a build whose set is that of the fixture `built_here`.
SMALL = ["--samples-per-shard", "8", "--max-rejected", "3%"]
_MOST_LIVES = 8


@pytest.fixture(scope="session")
def proxy(seaweed: Seaweed) -> Iterator[Proxy]:
    with proxied(seaweed.endpoint) as running:
        yield running


@pytest.fixture
def bucket(seaweed: Seaweed, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """s3:// URI of an empty bucket, which this process finds through the proxy."""
    for name, value in (seaweed.environment() | {"AWS_ENDPOINT_URL": proxy.url}).items():
        monkeypatch.setenv(name, value)
    proxy.fair()
    name = f"bucket-{secrets.token_hex(4)}"
    boto3.session.Session().client("s3").create_bucket(Bucket=name)
    yield f"s3://{name}"
    proxy.fair()
    seaweed.client().delete_bucket(Bucket=name)  # SeaweedFS deletes what is in it


@pytest.fixture(scope="module")
def built_here(drawn_raw: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the set that a build makes of RAW without a store."""
    out = str(tmp_path_factory.mktemp("here") / "out")
    made_shards(drawn_raw, out, Recipe(samples_per_shard=8))
    return contents(out)


@pytest.fixture
def raw_on_store(bucket: str, drawn_raw: str) -> str:
    """RAW, to be built with `SMALL`."""
    for path in Path(drawn_raw).iterdir():
        storage.write(f"{bucket}/raw/{path.name}", path.read_bytes())
    return f"{bucket}/raw"


@pytest.fixture
def set_on_store(bucket: str, built_here: dict[str, bytes]) -> str:
    """The finished set."""
    for name, data in built_here.items():
        storage.write(f"{bucket}/out/{name}", data)
    return f"{bucket}/out"


@pytest.fixture
def lived(proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs a command through bad weather until it has succeeded; each failure must be one line and
    leave what `check` wants."""

    def run(argv: list[str], weather: Weather, check: Callable[[], None] = lambda: None) -> None:
        for life in range(_MOST_LIVES):
            proxy.weather = weather if life < _MOST_LIVES - 1 else Weather()
            capsys.readouterr()
            code = main(argv)
            proxy.weather = Weather()
            check()
            if code == 0:
                return
            last = capsys.readouterr().err.strip().splitlines()[-1]
            assert last.startswith(("error: ", "failed: ")), last
        raise AssertionError(f"never succeeded: {last}")

    return run


def weather_of(attack: Any, faults: Collection[str] = FAULTS, rate: float = 0.3) -> Weather:
    """All of `faults` in the first run, then one of them after the other; up to `rate` of the
    requests, of listings alone most, since there are few."""
    turn = attack.seed % (len(faults) + 1)
    chosen = list(faults)[turn - 1 : turn] or faults
    if {*chosen} == {PAGE}:
        rate = 0.9
    return Weather(attack.seed, attack.draw.uniform(rate / 2, rate), chosen)
