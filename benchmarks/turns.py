"""Contenders that take turns, so that what disturbs the machine disturbs all of them."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def in_turns(contenders: Mapping[str, Callable[[int], T]], rounds: int) -> dict[str, list[T]]:
    """Each is called with the number of the round; every second round runs in reverse order.
    After each but the last a line on stderr says for how long the others may take."""
    results: dict[str, list[T]] = {name: [] for name in contenders}
    began = time.monotonic()
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(contenders[name](number))
        if left := rounds - number - 1:
            minutes = (time.monotonic() - began) / (number + 1) * left / 60
            print(f"round {number + 1} of {rounds}, {minutes:.1f} min left", file=sys.stderr)
    return results


def ratios(mine: list[float], theirs: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(mine, theirs, strict=True)]
