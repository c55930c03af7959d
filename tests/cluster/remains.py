"""What a cluster may leave behind, looked for from outside."""

import shutil
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


def orphaned_networks() -> list[str]:
    """Namespaces that are named as up.sh does and in which nothing runs, and bridges without any.

    Those of another cluster that is just being started look the same for some seconds.
    """
    if shutil.which("ip") is None:
        return []
    spaces = [name for name in _first_words("ip", "netns", "list") if name.startswith("alexnet-")]
    links = _first_words("ip", "-br", "link", "show", "type", "bridge")
    found = [name for name in spaces if not _first_words("ip", "netns", "pids", name)]
    used = {name.rsplit("-", 1)[0] for name in spaces}
    return found + [link for link in links if link.startswith("alexnet-") and link not in used]


def _first_words(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    return [line.split()[0] for line in done.stdout.splitlines() if line]
