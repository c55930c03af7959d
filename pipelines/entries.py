"""What lies in a folder or under an s3:// prefix, and what became of each entry: an image, a file
that is read, or why it is neither.

Nothing is passed over in silence: an entry is a file, or it is told why it is none. Links are
followed, as people make sets of them. A folder that is ignored by its name is one entry and is
not opened.
"""

from __future__ import annotations

import os
import re
from bisect import bisect
from collections.abc import Mapping, Sequence
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
_NAMED = 5  # in one line
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


# What became of them


@dataclass(frozen=True)
class Accounts:
    """total = images + used + the sum of `ignored` + the number of `left_out`."""

    total: int = 0
    images: int = 0  # files that are images by themselves
    used: int = 0  # archives, lists, devkits
    ignored: dict[str, int] = field(default_factory=dict)  # by RULES
    left_out: dict[str, str] = field(default_factory=dict)  # by --partial: name → why
    ignored_members: dict[str, int] = field(default_factory=dict)  # inside of archives, by archive
    first: dict[str, str] = field(default_factory=dict)  # of each rule an entry, for people

    def to_json(self) -> dict[str, Any]:
        names = ("total", "images", "used", "ignored", "left_out", "ignored_members")
        return {name: getattr(self, name) for name in names}

    def notes(self) -> tuple[str, ...]:
        """One line for what is ignored that the user did not leave out by a flag, and one for what
        --partial leaves out."""
        lines = []
        told = {r: n for r, n in self.ignored.items() if r not in ("other_splits", "not_chosen")}
        if told:
            parts = [f"{n:,} {rule} (first {self.first[rule]})" for rule, n in told.items()]
            lines.append(f"ignored {entries_told(sum(told.values()))}: {', '.join(parts)}")
        if self.left_out:
            lines.append(f"left out {entries_told(len(self.left_out))}: {named(self.left_out)}")
        return tuple(lines)


def named(reasons: Mapping[str, str]) -> str:
    """ "a (why), b (why)"; the first few of them when there are many."""
    shown = [f"{name} ({why})" for name, why in [*reasons.items()][:_NAMED]]
    more = ", …" * (len(reasons) > _NAMED)
    return f"{', '.join(shown)}{more}"


def entries_told(number: int) -> str:
    return f"{number:,} {'entry' if number == 1 else 'entries'}"


def account(
    found: Listing,
    images: pa.ChunkedArray,
    used: Sequence[str],
    lists: str,
    places: Mapping[str, str],
    left_out: Mapping[str, str],
    ignored_members: Mapping[str, int],
) -> Accounts:
    """images: sources of the table's rows; used: the containers among them; lists: regex of what
    else the layout reads; places: regex of the entries of each split that was not asked for."""
    names = pa.array(list(found.files), pa.string())
    others = "|".join(places.values()) or r"^$^"
    containers = pa.array([*used], pa.string())
    became = pa.nulls(len(names), pa.string())
    became = pc.if_else(pc.match_substring_regex(names, others), "other_splits", "unused")
    became = pc.coalesce(rules(names), became)
    for what, chosen in [
        ("used", pc.match_substring_regex(names, lists)),
        ("images", pc.is_in(names, value_set=pc.unique(images))),
        ("used", pc.is_in(names, value_set=containers)),
        ("left_out", pc.is_in(names, value_set=pa.array([*left_out], pa.string()))),
    ]:
        became = pc.if_else(chosen, what, became)
    counts = {row["values"]: row["counts"] for row in pc.value_counts(became).to_pylist()}
    first = {what: names[pc.index(became, what).as_py()].as_py() for what in counts}
    for name in [*found.ignored, *found.empty, *found.broken]:
        what = found.ignored.get(name) or _odd(name, name in found.empty, others, left_out)
        counts[what] = counts.get(what, 0) + 1
        first.setdefault(what, name)
    images_there, used_there = counts.get("images", 0), counts.get("used", 0)
    ignored = {rule: counts[rule] for rule in RULES if rule in counts}
    told = images_there + used_there + sum(ignored.values()) + len(left_out)
    assert told == found.total, f"{told} of {found.total} entries are accounted for"
    return Accounts(
        found.total, images_there, used_there, ignored, {**left_out}, {**ignored_members}, first
    )


def _odd(name: str, empty: bool, others: str, left_out: Mapping[str, str]) -> str:
    """What became of an empty folder, or of what cannot be read."""
    if name in left_out:
        return "left_out"
    if empty:
        return "empty_folders"
    by_place = "other_splits" if re.search(others, name) else "unused"
    return rule(name.rsplit("/", 1)[-1]) or by_place
