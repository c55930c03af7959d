"""How many faults, and from which seed; the fixtures of what is attacked.

    python -m pytest tests/faults --fault-runs 20 [--fault-seed SEED]

Without --fault-runs each attack runs once, with the same draws every time.
"""

import random
import secrets
from types import SimpleNamespace

import pytest
from bad_store import bucket, built_here, lived, proxy, raw_on_store, set_on_store  # noqa: F401
from build_set import folders, mended, tars  # noqa: F401
from trainings import training, whole  # noqa: F401

_FIRST_SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-runs", type=int, help="runs of each attack")
    parser.addoption("--fault-seed", type=int, help="of the first run, to have it again")


def pytest_configure(config: pytest.Config) -> None:
    first = config.getoption("--fault-seed", default=None)
    if first is None:
        first = secrets.randbits(31) if config.getoption("--fault-runs", default=None) else 0
    config.stash[_FIRST_SEED] = first


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "attack" in metafunc.fixturenames:
        first = metafunc.config.stash[_FIRST_SEED]
        runs = metafunc.config.getoption("--fault-runs", default=None) or 1
        seeds = range(first, first + runs)
        metafunc.parametrize("attack", seeds, indirect=True, ids=[f"seed{n}" for n in seeds])


@pytest.fixture
def attack(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One run of an attack: its seed, and where its draws come from."""
    return SimpleNamespace(seed=request.param, draw=random.Random(request.param))
