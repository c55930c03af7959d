"""Builds, checks and repairs from and to a bad store: the undisturbed set in the end."""

from collections.abc import Callable
from pathlib import Path

import pytest
from attacks import Attack
from bad_weather import SMALL, survived, weather_of
from made import contents
from store_proxy import ANYWHERE, FAULTS, OF_READS, OF_WRITES, Proxy, Weather

from pipelines import storage

pytest_plugins = ["bad_store", "store_commands"]
pytestmark = pytest.mark.usefixtures("home", "without_ray")

# A listing of the past makes whole sets look damaged: what is checked must not change meanwhile.
NOT_STALE = (*ANYWHERE, *OF_READS, *OF_WRITES, "page for a list")


def test_a_set_built_through_a_bad_store_is_the_undisturbed_one(
    attack: Attack,
    proxy: Proxy,
    bucket: str,
    raw_on_store: str,
    built_here: dict[str, bytes],
    lived: Callable[..., float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def build(out: str) -> list[str]:
        return ["build", "--raw", raw_on_store, "--out", f"{bucket}/{out}", *SMALL]

    def check() -> None:
        found = contents(f"{bucket}/out")
        assert all(built_here[name] == data for name, data in found.items()), "a part or other"

    usual = lived(build("before"), Weather())
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "another"))  # RAW is scanned once more
    proxy.foul(weather := weather_of(attack, FAULTS))
    seconds = lived(build("out"), weather, check)
    seen = proxy.fair()
    assert contents(f"{bucket}/out") == built_here
    survived(attack, "build", seen, max(0.0, seconds - usual))


def test_a_set_is_checked_and_mended_through_a_bad_store(
    attack: Attack,
    proxy: Proxy,
    raw_on_store: str,
    set_on_store: str,
    built_here: dict[str, bytes],
    lived: Callable[..., float],
) -> None:
    weather, out = weather_of(attack, NOT_STALE), set_on_store
    usual = lived(["verify", out, "--full"], Weather())
    proxy.foul(weather)
    seconds = lived(["verify", out, "--full"], weather)
    name = attack.draw.choice([name for name in built_here if not name.startswith("_meta/")])
    data = bytearray(built_here[name] or b"x")
    data[attack.draw.randrange(len(data))] ^= 1
    storage.write(f"{out}/{name}", bytes(data))
    repair = ["verify", out, "--full", "--repair", "--raw", raw_on_store]
    lived(repair, weather)
    seen = proxy.fair()
    assert contents(out) == built_here, name
    survived(attack, "verify --repair", seen, max(0.0, seconds - usual))
