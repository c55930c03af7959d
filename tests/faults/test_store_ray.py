"""The command as users run it, on a Ray whose workers know a bad store only."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks import Attack
from bad_weather import SMALL, survived, weather_of
from made import contents, started
from own_ray import own_ray
from store_proxy import FAULTS, Proxy, Weather

pytest_plugins = ["bad_store", "store_commands"]

_MOST_LIVES = 4


@pytest.fixture(scope="module")
def environment(good_store: dict[str, str], proxy: Proxy) -> Iterator[dict[str, str]]:
    """Of a driver: the proxy in the place of the store, and a Ray whose workers have it too."""
    with own_ray(good_store | {"AWS_ENDPOINT_URL": proxy.url}) as known:
        yield known


def test_a_build_on_ray_succeeds_or_says_why_in_a_line_and_then_succeeds(
    attack: Attack,
    proxy: Proxy,
    bucket: str,
    raw_on_store: str,
    built_here: dict[str, bytes],
    environment: dict[str, str],
    home: Path,
    tmp_path: Path,
) -> None:
    out = f"{bucket}/out"
    proxy.foul(weather := weather_of(attack, FAULTS))
    for life in range(_MOST_LIVES):
        proxy.weather = weather if life < _MOST_LIVES - 1 else Weather()
        run = started(["build", "--raw", raw_on_store, "--out", out, *SMALL], tmp_path, environment)
        _, errors = run.communicate(timeout=200)
        proxy.weather = Weather()
        found = contents(out)
        assert all(built_here[name] == data for name, data in found.items()), "a part or other"
        if run.returncode == 0:
            break
        assert errors.strip().splitlines()[-1].startswith(("error: ", "failed: ")), errors
        assert "Traceback" not in errors
    assert contents(out) == built_here
    survived(attack, "build on Ray", proxy.fair())
