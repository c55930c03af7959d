"""The longest files begin, so that of two processes none is left alone with one at the end."""

import pytest

LONGEST = ("test_smoke.py", "test_screen.py", "test_registry_served.py", "test_metrics.py")
LONGEST += ("test_processes.py", "test_result.py", "test_tracking.py", "test_loop_options.py")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would put files of few tests last


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
