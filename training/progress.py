"""Where the log lines go: one after another, or on a terminal one that is renewed."""

import logging
import shutil
from typing import TextIO

from training.meter import log_line

logger = logging.getLogger("training")

_BAR = 20


class Progress:
    """Shows metrics as lines of the log; on a terminal, those of the steps replace each other."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = stream, stream.isatty()

    def show(self, metrics: dict[str, float], step: int) -> None:
        line = log_line(metrics, step)
        self.clear()
        if self._terminal and "progress" in metrics:
            done = round(_BAR * metrics["progress"])
            text = f"[{'#' * done}{'-' * (_BAR - done)}] {line}"
            # Longer than the window, it would wrap and each renewal leave a line behind.
            self._stream.write(text[: shutil.get_terminal_size().columns - 1])
            self._stream.flush()
            return
        logger.info(line)

    def clear(self) -> None:
        """Takes the renewed line away, so that something else can be written there."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
