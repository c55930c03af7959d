"""How many faults, from which seed, and the table of what they did.

    python -m pytest tests/faults --fault-runs 20 [--fault-seed SEED]

Without --fault-runs each attack runs once, with the same draws every time.
"""

import secrets
import statistics
from collections import defaultdict

import pytest
from attacks import Attack, Survivals

_SURVIVALS = pytest.StashKey[Survivals]()
_FIRST_SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-runs", type=int, help="runs of each attack")
    parser.addoption("--fault-seed", type=int, help="of the first run, to have it again")


def pytest_configure(config: pytest.Config) -> None:
    first = config.getoption("--fault-seed", default=None)
    if first is None:
        first = secrets.randbits(31) if config.getoption("--fault-runs", default=None) else 0
    config.stash[_FIRST_SEED] = first
    config.stash[_SURVIVALS] = defaultdict(list)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "attack" in metafunc.fixturenames:
        first = metafunc.config.stash[_FIRST_SEED]
        runs = metafunc.config.getoption("--fault-runs", default=None) or 1
        seeds = range(first, first + runs)
        metafunc.parametrize("attack", seeds, indirect=True, ids=[f"seed{n}" for n in seeds])


@pytest.fixture
def attack(request: pytest.FixtureRequest) -> Attack:
    return Attack(request.param, request.config.stash[_SURVIVALS])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    survivals = terminalreporter.config.stash.get(_SURVIVALS, {})
    if not survivals:
        return
    write = terminalreporter.write_line
    write(f"first seed {terminalreporter.config.stash[_FIRST_SEED]}; survived:")
    write("| fault | place | runs | faults | seconds lost, median | worst |")
    write("|---|---|---|---|---|---|")
    for (fault, place), runs in sorted(survivals.items()):
        lost = [run.seconds_lost for run in runs if run.seconds_lost is not None]
        times = [f"{statistics.median(lost):.1f}", f"{max(lost):.1f}"] if lost else ["", ""]
        faults = sum(run.faults for run in runs)
        write(f"| {fault} | {place} | {len(runs)} | {faults} | {' | '.join(times)} |")
