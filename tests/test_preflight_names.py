"""Names that a user gives: those that every place can hold, and no others."""

import tempfile
import unicodedata
from pathlib import Path

import pytest

from alexnet.errors import UserError
from pipelines import storage
from training.preflight import LONGEST_NAME, checked_name, checked_place, refuse_unwritable_path


@pytest.mark.parametrize("name", ["a", "fast-2.1_b", "Größe", "训练一", "प्रशिक्षण", "ชื่อ", "0"])
def test_letters_and_digits_of_any_script_make_a_name(name):
    assert checked_name(name, "--name") == name


def test_same_letters_are_one_name_however_they_are_composed():
    apart = unicodedata.normalize("NFD", "Größe")
    assert apart != "Größe" and checked_name(apart, "--name") == "Größe"


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "...", "-x", ".x", "x.", "a/b", "../a", "a b", "a ", " ", "a'b", 'a"b'),
        *("a\nb", "a\0", "a\x1b[0m", "\udcff", "a:b", "a*", "$a", "a\\b", "😀"),
        *("a" * (LONGEST_NAME + 1), "ü" * (LONGEST_NAME // 2 + 1), "a" * 100_000),
    ],
)
def test_other_names_are_one_short_line(name):
    with pytest.raises(UserError) as told:
        checked_name(name, "--name")
    line = str(told.value)
    assert line.startswith("--name ") and line.isprintable() and len(line) < 250


def test_longest_name_fits_into_a_file_system_with_all_that_we_add(tmp_path, monkeypatch):
    """As a file beside others, written by a process of the host with the longest name."""
    monkeypatch.setattr(storage.socket, "gethostname", lambda: "h" * 64)
    monkeypatch.setattr(storage.os, "getpid", lambda: 4_194_304)  # Linux' highest
    made, mkstemp = [], tempfile.mkstemp
    monkeypatch.setattr(
        storage.tempfile, "mkstemp", lambda **how: made.append(mkstemp(**how)) or made[-1]
    )
    name = checked_name("训" * (LONGEST_NAME // 3), "--name")
    storage.write(str(tmp_path / f"{name}.jsonl"), b"")
    ((_, temporary),) = made
    assert len(Path(temporary).name.encode()) <= 255


@pytest.mark.parametrize("place", ["a\nb", "a\0b", "\udcff", "x://y"])
def test_place_that_cannot_be_told_or_written_is_refused(place):
    with pytest.raises(UserError) as told:
        checked_place(place, "--storage")
    assert str(told.value).isprintable()


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("s3://b/a//b", "a part that is empty"),
        ("s3://b/../b", "a part that is empty"),
        (f"s3://b/{'k' * 900}", "1,024 at most"),
        ("/a" * 2100, "4,096 at most"),
    ],
)
def test_storage_whose_checkpoints_would_have_impossible_names_is_refused(place, told):
    refuse_unwritable_path("s3://b", "n")
    with pytest.raises(UserError, match=told):
        refuse_unwritable_path(place, "n")
