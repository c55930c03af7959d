"""Names and places that a user gives, checked where they enter for all that will hold them."""

import unicodedata

from alexnet.errors import UserError
from pipelines import storage

# Bytes. A name is a folder, or a file that is written as .HOST~PID~NAME.jsonl.XXXXXXXX.tmp first
# (pipelines/storage.py): file systems take 255, of which a host's name may have 64. MLflow's own
# databases take 250 characters.
LONGEST_NAME = 150
_LONGEST_PATH = 4096  # of Linux
_LONGEST_KEY = 1024  # of S3
_BELOW = (
    len("/checkpoint-00000000-000000/optimizer.safetensors") + 96
)  # as above, before its rename


def checked_name(name: str, flag: str) -> str:
    """The name as all will know it: in Unicode's form NFC, so that the same letters are one name
    whoever typed them. flag: how the user gave it.

    Letters and digits of any script, '-', '_' and '.', not at the ends: such a name needs no quotes
    in a shell or in MLflow's filters, and is one part of a path, of a key in S3 and of a log line.
    Raises UserError for any other, and for one that is too long.
    """
    name = unicodedata.normalize("NFC", name)
    shown = repr(name if len(name) <= 40 else f"{name[:40]}…")
    if bad := sorted({letter for letter in name if not _is_usual(letter)}):
        listed = " ".join(map(repr, bad[:5]))
        raise UserError(f"{flag} {shown} holds {listed}; use letters, digits, '-', '_' and '.'")
    if not name.strip("."):
        raise UserError(f"{flag} {shown} is no name; use letters, digits, '-', '_' and '.'")
    if name[0] in "-." or name[-1] == ".":
        raise UserError(f"{flag} {shown} begins with '-' or '.', or ends with '.'; leave that away")
    if (size := len(name.encode())) > LONGEST_NAME:
        raise UserError(
            f"{flag} {shown} has {size} bytes in UTF-8, file systems have room for {LONGEST_NAME} "
            "of a name; pass a shorter one"
        )
    return name


def checked_place(uri: str, flag: str) -> str:
    """A folder or s3:// prefix, absolute, that can stand in a log line and in MLflow's database.
    Raises UserError for any other."""
    if bad := [
        letter for letter in uri if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")
    ]:
        raise UserError(
            f"{flag} {uri[:80]!r} holds {bad[0]!r}, which is no letter of UTF-8 that can be shown; "
            "rename the folder"
        )
    return storage.absolute(uri)


def refuse_unwritable_path(place: str, name: str) -> None:
    """Raises UserError where the files of a run's checkpoints, at place/name, would have names
    that the file system or S3 does not take."""
    path = storage.join(place, name)
    size, limit = len(path.encode()) + _BELOW, _LONGEST_PATH
    if storage.is_s3(place):
        size, limit = len(path.split("/", 3)[3].encode()) + _BELOW, _LONGEST_KEY
        if any(part in ("", ".", "..") for part in path.removeprefix("s3://").split("/")):
            raise UserError(f"--storage {place[:200]} has a part that is empty, '.' or '..'")
    if size > limit:
        raise UserError(
            f"--storage {place[:80]}… with --name {name[:40]} makes names of {size:,} bytes for "
            f"checkpoints, {limit:,} at most; pass a shorter --storage"
        )


def _is_usual(letter: str) -> bool:
    """Marks are parts of letters, as in Hindi and Thai."""
    return letter in "-_." or letter.isalnum() or unicodedata.category(letter).startswith("M")
