"""How much garbage, from which seed, and the process that eats it.

    python -m pytest tests/fuzz --fuzz-inputs 10000 [--fuzz-seed SEED]

Without --fuzz-inputs each parser gets a short selection, the same in every run.
"""

import secrets
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from child import Child
from hypothesis import HealthCheck, Phase, configuration
from hypothesis.strategies import SearchStrategy
from registered import Built

SHORT = 40  # inputs of each target in `make test-all`
BATCH = 1000  # inputs that one seed makes: Hypothesis remembers all of a batch
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
def good(child: Child, drawn_shards: str, registered_models: Built) -> Path:
    """Good files, of which a target gets one damaged: a set, a checkpoint, a registered model."""
    (sums,) = (registered_models.folder / "foreign").rglob("SHA256SUMS")
    for name, folder in (
        ("set", drawn_shards),
        ("checkpoint", registered_models.checkpoint),
        ("model", sums.parent),
    ):
        shutil.copytree(folder, child.good / name)
    return child.good


@pytest.fixture
def attack(child: Child, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Gives a target its inputs and fails with the smallest that is a find."""
    inputs = pytestconfig.getoption("--fuzz-inputs", default=None)
    first = pytestconfig.getoption("--fuzz-seed", default=None)
    if first is None:
        first = secrets.randbits(32) if inputs else 0
    counts = pytestconfig.stash.setdefault(_COUNTS, {})

    def run(target: str, drawn: SearchStrategy[bytes]) -> None:
        counted = counts.setdefault(target, Counter())

        def batch(seed: int, number: int) -> None:
            @hypothesis.seed(seed)
            @hypothesis.settings(
                max_examples=number,
                database=None,
                deadline=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            )
            @hypothesis.given(drawn)
            def check(data: bytes) -> None:
                outcome, text = child.ask(target, data)
                counted[outcome] += 1
                if outcome == "bug":  # the last one written is the smallest
                    find = child.folder / f"find-{target}"
                    find.write_bytes(data)
                    again = f"again with --fuzz-seed {seed} --fuzz-inputs {number}"
                    raise AssertionError(f"{target}: {text}\nin {find}; {again}")

            check()

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Generating overly large repr")
            for start in range(0, left := inputs or SHORT, BATCH):
                batch(first + start // BATCH, min(BATCH, left - start))
        assert counted["right"], f"{target} refused even the inputs without an edit"

    return run
