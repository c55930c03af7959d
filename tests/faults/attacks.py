"""One run of an attack on the program, and what it survived."""

import random
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Survived:
    """Faults of one run after which every invariant held."""

    faults: int
    seconds_lost: float | None  # against the undisturbed work, its restart included


Survivals = dict[tuple[str, str], list[Survived]]


@dataclass(frozen=True)
class Attack:
    """One run of an attack: where its draws come from, and where it tells that it was survived."""

    seed: int
    survivals: Survivals = field(repr=False)
    draw: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "draw", random.Random(self.seed))

    def survived(
        self, fault: str, place: str, *, faults: int = 1, seconds_lost: float | None = None
    ) -> None:
        """To be called last, when all invariants have been checked."""
        self.survivals[fault, place].append(Survived(faults, seconds_lost))
