"""What goes on without something that a file system or a store does not offer."""

import contextlib
import sys
import threading

_made: set[str] = set()
_making = threading.Lock()


def note(text: str, about: str) -> None:
    """A line on stderr, the first time that this process has one about `about`."""
    with _making:
        if about in _made:
            return
        _made.add(about)
    with contextlib.suppress(OSError):  # a stderr that is closed or full ends no work
        print(f"note: {text}", file=sys.stderr, flush=True)
