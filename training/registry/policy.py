"""The policy file of the gate: what a version must show, by recipe."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexnet import FORMER_RECIPES
from alexnet.errors import UserError

SHIPPED = Path(__file__).with_name("policy.toml")
# The number of classes that the floors of top-1 and top-5 are about.
FULL_SET = 1000


@dataclass(frozen=True)
class Policy:
    """Limits; policy.toml says what each one means."""

    top1: float
    top5: float
    above_chance: float
    worst_class: float
    margin: float
    latency_ms: float
    size_mb: float

    def floors(self, classes: int) -> tuple[float, float | None]:
        """Lowest top-1 and top-5 for a set of so many classes; None asks for no top-5."""
        if classes == FULL_SET:
            return self.top1, self.top5
        chance = 1 / classes
        return chance + self.above_chance * (1 - chance), None


def read_policy(path: str | Path, recipe: str) -> Policy:
    """That of a recipe. The whole file is checked, also the tables of others.

    Raises UserError for a file that is not there, is no TOML, or has a key that means nothing, a
    value out of its range, or no whole [default].
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"policy {path}: {error.strerror}; pass a file with --policy") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"policy {path} is not TOML ({error}); {_SHOWN}") from error
    for name, table in tables.items():
        _check(f"policy {path}", name, table)
    tables = {FORMER_RECIPES.get(name, name): table for name, table in tables.items()}
    default = tables.get("default", {})
    missing = sorted(_NAMES - default.keys())
    if missing:
        raise UserError(f"policy {path}: [default] lacks {', '.join(missing)}; {_SHOWN}")
    return Policy(**{key: float(v) for key, v in (default | tables.get(recipe, {})).items()})


_SHOWN = f"{SHIPPED} is a whole one"
_NAMES = {field.name for field in dataclasses.fields(Policy)}


def _check(file: str, name: str, table: Any) -> None:
    if not isinstance(table, dict):
        raise UserError(f"{file}: {name} stands outside of a table such as [default]; {_SHOWN}")
    for key, value in table.items():
        if key not in _NAMES:
            raise UserError(f"{file}: [{name}] has an unknown key {key}; {_SHOWN}")
        highest = float("inf") if key in ("latency_ms", "size_mb") else 1.0
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= highest:
            raise UserError(
                f"{file}: [{name}] {key} is {value!r}; pass a number from 0 to {highest:g}"
            )
