"""What each attack through a bad store draws, and how it tells that it was survived."""

from collections.abc import Collection

from attacks import Attack
from store_proxy import FAULTS, OF_LISTS, Seen, Weather

# Flags of a build whose set is that of the fixture `built_here`.
SMALL = ["--samples-per-shard", "8", "--max-rejected", "3%"]


def weather_of(attack: Attack, faults: Collection[str] = FAULTS, rate: float = 0.3) -> Weather:
    """All of `faults` in the first run, then one of them after the other; up to `rate` of the
    requests, of listings alone most, since there are few."""
    turn = attack.seed % (len(faults) + 1)
    chosen = list(faults)[turn - 1 : turn] or faults
    if {*chosen} <= {*OF_LISTS}:
        rate = 0.9
    return Weather(attack.seed, attack.draw.uniform(rate / 2, rate), chosen)


def survived(attack: Attack, place: str, seen: Seen, seconds_lost: float | None = None) -> None:
    """Tells each kind of fault; the time lost where there was one kind only."""
    for fault, number in seen.faults.items():
        lost = seconds_lost if len(seen.faults) == 1 else None
        attack.survived(f"store: {fault}", place, faults=number, seconds_lost=lost)
    if len(seen.faults) > 1 and seconds_lost is not None:
        attack.survived("store: several", place, faults=0, seconds_lost=seconds_lost)
