"""What lies in a folder or under an s3:// prefix, entry by entry, and what is ignored by name.

Nothing is passed over in silence: an entry is a file, or it is told why it is none. Links are
followed, as people make sets of them. A folder that is ignored by its name is one entry and is
not opened.
"""

from __future__ import annotations

import os
import re
from bisect import bisect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import storage

# Why an entry is ignored, and what that says of it. The names stand in manifests.
RULES = {
    "hidden": "Its name begins with a dot.",
    "system": "Desktop systems, storage servers and editors leave it behind.",
    "documents": "Its ending is that of a text, a table, a script or a program's data.",
    "empty_folders": "A folder without entries, where no class folder is expected.",
    "other_splits": "It belongs to a split that was not asked for.",
    "unused": "It lies outside of what this layout of RAW reads.",
    "not_chosen": "An image that --subset or --per-class leaves out.",
}
_BY_NAME = {  # of a base name; the first that fits counts
    "hidden": r"^\.",
    "system": r"(?i)^(Thumbs\.db|ehthumbs(_vista)?\.db|desktop\.ini|Icon\r|.*~)$",
    "documents": r"(?i)(^(README|LICEN[CS]E|COPYING|NOTICE|CHANGELOG|MD5SUMS?|SHA\d+SUMS?)"
    r"|\.(txt|text|md|rst|rtf|pdf|docx?|xlsx?|odt|csv|tsv|jsonl?|xml|ya?ml|toml|ini|cfg|log"
    r"|html?|css|js|url|lnk|py|ipynb|sh|bat|mat|npy|npz|pkl|pickle|pth?|h5|md5|sha1|sha256))$",
}
_FOLDERS_BY_NAME = {
    "hidden": r"^\.",
    "system": r"(?i)^(__MACOSX|lost\+found|@eaDir|#recycle|\$RECYCLE\.BIN"
    r"|System Volume Information)$",
}


@dataclass(frozen=True)
class Listing:
    """The entries below a place; names are relative to it. A folder is an entry only where it has
    no others below it: empty, ignored, or not to be opened."""

    files: dict[str, int]  # bytes, in the order of the names
    empty: tuple[str, ...] = ()  # folders
    ignored: dict[str, str] = field(default_factory=dict)  # folders by name → the rule
    broken: dict[str, str] = field(default_factory=dict)  # whatever cannot be read → why

    def tops(self, below: str = "") -> list[str]:
        """The base names of the entries of the folder `below` ("" or with "/" at its end)."""
        names, found = list(self.files), set()
        at = bisect(names, below)
        while at < len(names) and names[at].startswith(below):
            top, inside, _ = names[at].removeprefix(below).partition("/")
            found.add(top)
            at = bisect(names, f"{below}{top}0", at) if inside else at + 1  # "0" follows "/"
        for name in (*self.empty, *self.ignored, *self.broken):
            if name.startswith(below):
                found.add(name.removeprefix(below).split("/", 1)[0])
        return sorted(found)

    @property
    def total(self) -> int:
        return len(self.files) + len(self.empty) + len(self.ignored) + len(self.broken)


def listing(uri: str) -> Listing:
    """Raises UserError where the place itself cannot be read; {} of files if nothing is there."""
    return _of_store(uri) if storage.is_s3(uri) else _of_folder(uri)


def rules(names: Any) -> Any:
    """The rule by which each file is ignored, null where its name tells none (string arrays)."""
    base = pc.replace_substring_regex(names, r"^.*/", "")
    found = pa.nulls(len(names), pa.string())
    for rule, pattern in reversed(_BY_NAME.items()):
        found = pc.if_else(pc.match_substring_regex(base, pattern), rule, found)
    return found


def rule(name: str) -> str | None:
    """`rules` of one name."""
    found: str | None = rules(pa.array([name], pa.string()))[0].as_py()
    return found


def folder_rule(name: str) -> str | None:
    """The rule by which a folder of this base name is ignored with all that it holds."""
    return next((key for key, regex in _FOLDERS_BY_NAME.items() if re.search(regex, name)), None)


def _of_folder(uri: str) -> Listing:
    found, empty, root = Listing({}), [], Path(uri)
    folders = [""] if root.is_dir() else []
    while folders:
        prefix = folders.pop()
        try:
            with os.scandir(root / prefix) as scanned:
                entries = list(scanned)
        except OSError as error:
            if not prefix:
                raise UserError(f"{uri}: {error.strerror}") from error
            found.broken[prefix[:-1]] = f"the folder cannot be opened: {error.strerror}"
            continue
        if not entries and prefix:
            empty.append(prefix[:-1])
        for entry in entries:
            if _add(entry, prefix + entry.name, found):
                folders.append(f"{prefix}{entry.name}/")
    files = dict(sorted(found.files.items()))
    ignored, broken = dict(sorted(found.ignored.items())), dict(sorted(found.broken.items()))
    return Listing(files, tuple(sorted(empty)), ignored, broken)


def _add(entry: os.DirEntry[str], name: str, found: Listing) -> bool:
    """Whether the entry is a folder to be looked into; any other is added to `found`."""
    try:
        if entry.is_dir():
            if ignored := folder_rule(entry.name):
                found.ignored[name] = ignored
            elif entry.is_symlink() and _holds_itself(Path(entry.path)):
                found.broken[name] = "a link to a folder that holds it"
            else:
                return True
        elif entry.is_file():
            found.files[name] = entry.stat().st_size
        elif entry.is_symlink():
            found.broken[name] = "a link that leads nowhere"
        else:
            found.broken[name] = "neither a file nor a folder"
    except OSError as error:
        found.broken[name] = str(error.strerror)
    return False


def _holds_itself(link: Path) -> bool:
    """Whether following this link to a folder leads into one of those that led to it."""
    target = link.stat()
    return any(os.path.samestat(target, folder.stat()) for folder in link.parents)


def _of_store(uri: str) -> Listing:
    files: dict[str, int] = {}
    ignored: dict[str, str] = {}
    markers = []
    for name, size in storage.list_files(uri, markers=True):
        folders = name.split("/")[:-1]
        first = next((n for n, part in enumerate(folders) if folder_rule(part)), None)
        if first is not None:
            ignored["/".join(folders[: first + 1])] = str(folder_rule(folders[first]))
        elif name.endswith("/"):
            markers.append(name)
        else:
            files[name] = size
    names = list(files)
    empty = [m for m in markers if not "".join(names[bisect(names, m) :][:1]).startswith(m)]
    return Listing(files, tuple(marker[:-1] for marker in empty), ignored)
