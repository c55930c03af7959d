"""Contenders that take turns, so that what disturbs the machine disturbs all of them."""

from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def in_turns(contenders: Mapping[str, Callable[[int], T]], rounds: int) -> dict[str, list[T]]:
    """Each is called with the number of the round; every second round runs in reverse order."""
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(contenders[name](number))
    return results


def ratios(mine: list[float], theirs: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(mine, theirs, strict=True)]
