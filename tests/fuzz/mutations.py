"""Strategies: valid files with a few edits, which Hypothesis makes fewer and simpler on a find."""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hypothesis import strategies as st

# Numbers at the limits of the fields of file formats, and the words of a few.
_NUMBERS = (0, 1, 2, 127, 128, 255, 256, 511, 512, 513, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1)
_NUMBERS += (2**40, 2**63 - 1, 2**64 - 1)
_PACKINGS = ("<B", "<H", ">H", "<I", ">I", "<Q", ">Q")
_WORDS = (
    *(b"../../../escaped", b"/etc/hostname", b"\n", b"\0", b"\x1b[31m", b"-00000002000", b"0o17"),
    *(b"-1", b"1_000", b"9" * 5000, b"1e999", b"NaN", b"\xff\xd8", b"\xff\xd9", b"\xff" * 8),
    *(b"\xf4\x90\x80\x80", "é".encode(), b"null", b"[" * 3000, b",", b'"', b"n00000010", b" "),
    *(b"30 size=99999999999999999999\n", b"path=../x"),
)

Edit = tuple[str, int, int, int]
_Place = st.integers(0, 2**20)


def edits(most: int = 6) -> st.SearchStrategy[list[Edit]]:
    one = st.tuples(st.sampled_from(sorted(_KINDS)), _Place, _Place, st.integers(0, 2**16))
    return st.lists(one, max_size=most)


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds`, as it is or with up to six edits."""
    data = bytearray(draw(st.sampled_from(seeds)))
    other = draw(st.sampled_from(seeds))
    for kind, place, length, value in draw(edits()):
        if data:
            _KINDS[kind](data, place % len(data), length, value, other)
    return bytes(data)


def _set(data: bytearray, place: int, _length: int, value: int, _other: bytes) -> None:
    data[place] = value % 256


def _flip(data: bytearray, place: int, _length: int, value: int, _other: bytes) -> None:
    data[place] ^= 1 << value % 8


def _cut(data: bytearray, place: int, _length: int, _value: int, _other: bytes) -> None:
    del data[place:]


def _drop(data: bytearray, place: int, length: int, value: int, _other: bytes) -> None:
    del data[place : place + _reach(length, value)]


def _double(data: bytearray, place: int, length: int, value: int, _other: bytes) -> None:
    part = data[place : place + _reach(length, value)]
    data[place:place] = part


def _swap(data: bytearray, place: int, length: int, value: int, _other: bytes) -> None:
    reach = 1 + value % 64
    there = length % len(data)
    first, second = bytes(data[place : place + reach]), bytes(data[there : there + reach])
    if len(first) == len(second):
        data[place : place + reach], data[there : there + reach] = second, first


def _number(data: bytearray, place: int, length: int, value: int, _other: bytes) -> None:
    form, number = _PACKINGS[length % len(_PACKINGS)], _NUMBERS[value % len(_NUMBERS)]
    size = struct.calcsize(form)
    data[place : place + size] = struct.pack(form, number % 256**size)


def _word(data: bytearray, place: int, length: int, value: int, _other: bytes) -> None:
    word = _WORDS[value % len(_WORDS)]
    data[place : place + (len(word) if length % 2 else 0)] = word


def _splice(data: bytearray, place: int, length: int, value: int, other: bytes) -> None:
    start = length % (len(other) + 1)
    data[place : place + _reach(length, value)] = other[start : start + _reach(length, value)]


def _reach(length: int, value: int) -> int:
    """Mostly short, sometimes blocks of 512, as tars have them."""
    return 512 * (1 + length % 4) if value % 4 == 0 else 1 + length % 40


_KINDS: dict[str, Callable[[bytearray, int, int, int, bytes], None]] = {
    "cut": _cut,
    "double": _double,
    "drop": _drop,
    "flip": _flip,
    "number": _number,
    "set": _set,
    "splice": _splice,
    "swap": _swap,
    "word": _word,
}

# JSON

_ODD = (
    *(None, True, False, 0, -1, 1, 3, 0.5, -0.5, 2**31, 2**63, 10**30, 10**400, 1e308),
    *(float("nan"), float("inf"), "", "x", "0", "../../../escaped", "/etc/hostname", "a\nb"),
    *("\x1b[2J", "\ud800", "é", "x" * 3000, [], [0], [[]], {}, {"a": 1}, ["a", "b"], [1, "a"]),
)
_JSON_EDITS = ("new", "gone", "swap", "key", "deep")


@st.composite
def mutated_json(draw: st.DrawFn, documents: Sequence[Any]) -> bytes:
    """A document with up to three values replaced, removed or exchanged; sometimes as bytes that
    are edited in turn."""
    document = json.loads(json.dumps(draw(st.sampled_from(documents))))
    for kind, first, second, odd in draw(
        st.lists(st.tuples(st.sampled_from(_JSON_EDITS), _Place, _Place, _Place), max_size=3)
    ):
        places = list(_places(document))
        if places:
            here, there = places[first % len(places)], places[second % len(places)]
            _edit_json(kind, here, there, odd)
        elif kind == "new":
            document = _ODD[odd % len(_ODD)]
    data = bytearray(json.dumps(document).encode())
    if draw(st.integers(0, 3)) == 3:
        for kind, place, length, value in draw(edits(2)):
            if data:
                _KINDS[kind](data, place % len(data), length, value, bytes(data))
    return bytes(data)


def _edit_json(kind: str, here: tuple[Any, Any], there: tuple[Any, Any], odd: int) -> None:
    holder, key = here
    if kind == "gone":
        del holder[key]
    elif kind == "swap":
        holder[key], there[0][there[1]] = there[0][there[1]], _copy(holder[key])
    elif kind == "key" and isinstance(holder, dict):
        holder[str(_ODD[odd % len(_ODD)])] = holder.pop(key)
    elif kind == "deep":
        deep: Any = []
        for _ in range(50):
            deep = [deep]
        holder[key] = deep
    else:
        holder[key] = _copy(_ODD[odd % len(_ODD)])


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _places(document: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every value inside."""
    found: list[tuple[Any, Any]] = []
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(document, dict | list):
        inside = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in inside:
        found += [(document, key), *_places(value)]
    return found
