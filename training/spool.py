"""Metric values that wait until MLflow answers: in a file, or in memory while that cannot be."""

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from alexnet.errors import UserError
from pipelines import storage

logger = logging.getLogger("training")

Row = tuple[str, float, int, int]  # name, value, milliseconds since 1970, step


class Spool:
    """State: the file, and the rows that it could not take."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[Row] = []  # with what the file holds

    def rows(self) -> list[Row]:
        """All that wait, oldest first."""
        if self._unwritten:
            return list(self._unwritten)
        rows: list[Row] = []
        try:
            for line in self.path.read_text().splitlines():
                key, value, at, step = json.loads(line)
                rows.append((str(key), float(value), int(at), int(step)))
        except FileNotFoundError:
            return []
        except (OSError, TypeError, ValueError) as error:
            logger.warning(f"values that wait in {self.path} are lost from here on: {error}")
        return rows

    def keep(self, rows: Sequence[Row]) -> str:
        """Keeps `rows` alone, and says where. A full or broken disk is no reason to end a
        training."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            storage.write(str(self.path), text.encode())
        except UserError as error:
            self._unwritten = list(rows)
            return f"in memory ({error})"
        self._unwritten = []
        return "on disk"

    def clear(self) -> None:
        self._unwritten = []
        with contextlib.suppress(OSError):  # sent again, they are the same values
            self.path.unlink(missing_ok=True)
