"""Commands of `pipelines`, run in this process on a bad store until they succeed. A pytest plugin.

A module that has it needs the plugin `bad_store` too.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from made import contents, made_shards
from store_proxy import Proxy, Weather

from pipelines import storage
from pipelines.cli import main
from pipelines.plan import Recipe

_MOST_LIVES = 8


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
def lived(proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> Callable[..., float]:
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
