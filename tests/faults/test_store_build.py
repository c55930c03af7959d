"""Builds, checks and repairs from and to a bad store: the undisturbed set in the end."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attacks import Attack
from bad_weather import survived, weather_of
from made import contents, made_shards
from store_proxy import ANYWHERE, FAULTS, OF_READS, OF_WRITES, Proxy, Weather

import pipelines.build
from pipelines import cluster, storage
from pipelines.cli import main
from pipelines.plan import Recipe
from pipelines.progress import BuildFailed

pytest_plugins = ["bad_store"]
pytestmark = pytest.mark.usefixtures("home", "without_ray")

FLAGS = ["--samples-per-shard", "8", "--max-rejected", "3%"]
# A listing of the past makes whole sets look damaged: what is checked must not change meanwhile.
NOT_STALE = (*ANYWHERE, *OF_READS, *OF_WRITES, "page for a list")
_MOST_LIVES = 8


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run here, one after the other: a store fails alike wherever they run."""

    def statuses(job: Any, plan: Any, numbers: list[int], _: Any) -> Iterator[dict[str, Any]]:
        for number in numbers:
            shard = plan.shards[number]
            row = {"number": number, "name": shard.name, "shard_id": shard.id}
            status = pipelines.build._task(job, row)
            if status["error"]:
                raise BuildFailed(f"shard {shard.name}: {status['error']}")
            yield status

    monkeypatch.setattr(pipelines.build, "_statuses", statuses)
    monkeypatch.setattr(cluster, "connected", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(cluster, "refuse_local_paths", lambda *_, **__: None)


@pytest.fixture(scope="module")
def undisturbed(drawn_raw: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = str(tmp_path_factory.mktemp("undisturbed") / "out")
    made_shards(drawn_raw, out, Recipe(samples_per_shard=8))
    return contents(out)


@pytest.fixture
def raw(bucket: str, drawn_raw: str) -> str:
    for path in Path(drawn_raw).iterdir():
        storage.write(f"{bucket}/raw/{path.name}", path.read_bytes())
    return f"{bucket}/raw"


@pytest.fixture
def out(bucket: str, undisturbed: dict[str, bytes]) -> str:
    """The finished set on the store."""
    for name, data in undisturbed.items():
        storage.write(f"{bucket}/out/{name}", data)
    return f"{bucket}/out"


Lived = Callable[..., float]


@pytest.fixture
def lived(proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> Lived:
    """Runs a command through bad weather until it has succeeded; each failure must be one line and
    leave what `check` wants. Returns the seconds that it took."""

    def run(argv: list[str], weather: Weather, check: Callable[[], None] = lambda: None) -> float:
        began = time.monotonic()
        for life in range(_MOST_LIVES):
            proxy.weather = weather if life < _MOST_LIVES - 1 else Weather()
            capsys.readouterr()
            code = main(argv)
            proxy.weather = Weather()
            check()
            if code == 0:
                return time.monotonic() - began
            last = capsys.readouterr().err.strip().splitlines()[-1]
            assert last.startswith(("error: ", "failed: ")), last
        raise AssertionError(f"never succeeded: {last}")

    return run


def test_a_set_built_through_a_bad_store_is_the_undisturbed_one(
    attack: Attack,
    proxy: Proxy,
    bucket: str,
    raw: str,
    undisturbed: dict[str, bytes],
    lived: Lived,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def build(out: str) -> list[str]:
        return ["build", "--raw", raw, "--out", f"{bucket}/{out}", *FLAGS]

    def check() -> None:
        found = contents(f"{bucket}/out")
        assert all(undisturbed[name] == data for name, data in found.items()), "a part or other"

    usual = lived(build("before"), Weather())
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "another"))  # RAW is scanned once more
    proxy.foul(weather := weather_of(attack, FAULTS))
    seconds = lived(build("out"), weather, check)
    seen = proxy.fair()
    assert contents(f"{bucket}/out") == undisturbed
    survived(attack, "build", seen, max(0.0, seconds - usual))


def test_a_set_is_checked_and_mended_through_a_bad_store(
    attack: Attack,
    proxy: Proxy,
    raw: str,
    out: str,
    undisturbed: dict[str, bytes],
    lived: Lived,
) -> None:
    weather = weather_of(attack, NOT_STALE)
    usual = lived(["verify", out, "--full"], Weather())
    proxy.foul(weather)
    seconds = lived(["verify", out, "--full"], weather)
    name = attack.draw.choice(sorted(set(undisturbed) - {"_meta/plan.json", "_meta/plan.parquet"}))
    data = bytearray(undisturbed[name] or b"x")
    data[attack.draw.randrange(len(data))] ^= 1
    storage.write(f"{out}/{name}", bytes(data))
    repair = ["verify", out, "--full", "--repair", "--raw", raw]
    lived(repair, weather)
    seen = proxy.fair()
    assert contents(out) == undisturbed, name
    survived(attack, "verify --repair", seen, max(0.0, seconds - usual))
