"""What a cluster may leave behind, looked for from outside."""

import subprocess
from pathlib import Path


def left_of(folder: Path) -> list[str]:
    """Its folder, and all processes that name it on their command line or in their environment."""
    found = [str(folder)] if folder.exists() else []
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                told = (process / name).read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if str(folder).encode() in told:
                found.append(f"{process.name}: {told.replace(bytes(1), b' ')[:200].decode()}")
    return found


def networks() -> set[str]:
    """Namespaces and bridges of this host that are made as up.sh makes them."""
    found: set[str] = set()
    for command in (["ip", "netns", "list"], ["ip", "-br", "link"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:  # no iproute2, no networks
            continue
        names = (line.split()[0].partition("@")[0] for line in done.stdout.splitlines() if line)
        found |= {name for name in names if name.startswith(("alexnet-", "ax"))}
    return found
