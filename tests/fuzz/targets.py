"""What eats foreign bytes, by name. A target takes an input and an empty folder of its own, and
returns where the result is right, by an oracle that shares no code with the parser.

It raises UserError or Refused for what is refused; every other exception is a find.
"""

from collections.abc import Callable
from pathlib import Path

from refused import Refused
from targets_models import MODELS
from targets_raw import RAW
from targets_sets import SETS

__all__ = ["TARGETS", "Refused"]

TARGETS: dict[str, Callable[[bytes, Path], None]] = {**RAW, **SETS, **MODELS}
