"""Commands of `pipelines`, run in this process on a bad store until they succeed. A pytest plugin.

A module that has it needs the plugin `bad_store` too.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made import contents, made_shards
from store_proxy import Proxy, Weather

import pipelines.build
from pipelines import cluster, storage
from pipelines.cli import main
from pipelines.plan import Recipe
from pipelines.progress import BuildFailed

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
