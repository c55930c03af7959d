"""Ports for servers that are told theirs before they start."""

import contextlib
import random
import socket

# Ray gives 10002 to 19999 to its workers. From 32768 on the kernel chooses for whoever does not
# care, so that a port which is free now may be an outgoing connection's when the server starts.
_RANGE = range(20000, 32768)


def free_ports(count: int) -> list[int]:
    """Nobody listens on them now, and nobody gets them without asking for these very numbers."""
    with contextlib.ExitStack() as held:  # all at once, so that they differ
        found: list[int] = []
        for port in random.SystemRandom().sample(_RANGE, len(_RANGE)):
            if len(found) == count:
                return found
            with contextlib.suppress(OSError):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
    raise OSError(f"there are no {count} free ports")
