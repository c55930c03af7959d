"""How much garbage, from which seed, and the process that eats it.

    python -m pytest tests/fuzz --fuzz-inputs 10000 [--fuzz-seed SEED]

Without --fuzz-inputs each parser gets a short selection, the same in every run.
"""

import secrets
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from child import Child
from hypothesis import HealthCheck, Phase, configuration
from hypothesis.strategies import SearchStrategy

SHORT = 40  # inputs of each target in `make test-all`
BATCH = 1000  # inputs that one seed makes: Hypothesis remembers all of a batch

Attack = Callable[[str, SearchStrategy[bytes]], None]
_COUNTS = pytest.StashKey[dict[str, Counter[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-inputs", type=int, help="garbage for each parser")
    parser.addoption("--fuzz-seed", type=int, help="what it is drawn from, to have it again")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fuzz-inputs", default=None):
        for item in items:  # each input has a limit of its own
            if "fuzz" in item.path.parts:
                item.add_marker(pytest.mark.timeout(0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for target, counts in sorted(terminalreporter.config.stash.get(_COUNTS, {}).items()):
        listed = ", ".join(f"{number:,} {outcome}" for outcome, number in sorted(counts.items()))
        terminalreporter.write_line(f"fuzz {target}: {counts.total():,} inputs, {listed}")


@pytest.fixture(scope="session")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    folder = tmp_path_factory.mktemp("fuzz")
    configuration.set_hypothesis_home_dir(folder / "hypothesis")
    running = Child(folder)
    yield running
    running.close()


@pytest.fixture(scope="session")
def good(child: Child) -> Path:
    """For the good files that targets need besides an input."""
    return child.good


@pytest.fixture
def attack(child: Child, pytestconfig: pytest.Config) -> Attack:
    """Gives a target its inputs and fails with the smallest that is a find."""
    inputs = pytestconfig.getoption("--fuzz-inputs", default=None)
    first = pytestconfig.getoption("--fuzz-seed", default=None)
    if first is None:
        first = secrets.randbits(32) if inputs else 0
    counts = pytestconfig.stash.setdefault(_COUNTS, {})

    def run(target: str, drawn: SearchStrategy[bytes]) -> None:
        for start in range(0, left := inputs or SHORT, BATCH):
            seed = first + start // BATCH
            counted = counts.setdefault(target, Counter())
            _batch(child, counted, target, drawn, seed, min(BATCH, left - start))
        assert counts[target]["right"], f"{target} refused even the inputs without an edit"

    return run


def _batch(
    child: Child,
    counted: Counter[str],
    target: str,
    drawn: SearchStrategy[bytes],
    seed: int,
    number: int,
) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(drawn)
    def one(data: bytes) -> None:
        verdict = child.ask(target, data)
        counted[verdict.outcome] += 1
        if verdict.outcome == "bug":  # the last one written is the smallest
            find = child.folder / f"find-{target}"
            find.write_bytes(data)
            again = f"again with --fuzz-seed {seed} --fuzz-inputs {number}"
            raise AssertionError(f"{target}: {verdict.text}\nin {find}; {again}")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Generating overly large repr")
        one()
