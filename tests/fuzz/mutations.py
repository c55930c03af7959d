"""Strategies: valid files with a few edits, which Hypothesis makes fewer and simpler on a find."""

import json
import struct
from collections.abc import Sequence
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
_KINDS = ("cut", "double", "drop", "flip", "number", "set", "splice", "swap", "word")
_Place = st.integers(0, 2**20)


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes], most: int = 6) -> bytes:
    """One of `seeds`, as it is or with up to `most` edits."""
    data, other = bytearray(draw(st.sampled_from(seeds))), draw(st.sampled_from(seeds))
    edit = st.tuples(st.sampled_from(_KINDS), _Place, _Place, st.integers(0, 2**16))
    for kind, place, length, value in draw(st.lists(edit, max_size=most)):
        if data:
            _edit(data, kind, place % len(data), length, value, other)
    return bytes(data)


def _edit(data: bytearray, kind: str, place: int, length: int, value: int, other: bytes) -> None:
    # Mostly short, sometimes blocks of 512, as tars have them.
    reach = 512 * (1 + length % 4) if value % 4 == 0 else 1 + length % 40
    match kind:
        case "set":
            data[place] = value % 256
        case "flip":
            data[place] ^= 1 << value % 8
        case "cut":
            del data[place:]
        case "drop":
            del data[place : place + reach]
        case "double":
            data[place:place] = data[place : place + reach]
        case "swap":
            there, size = length % len(data), 1 + value % 64
            first, second = data[place : place + size], data[there : there + size]
            if len(first) == len(second):
                data[place : place + size], data[there : there + size] = second, first
        case "number":
            form, number = _PACKINGS[length % len(_PACKINGS)], _NUMBERS[value % len(_NUMBERS)]
            size = struct.calcsize(form)
            data[place : place + size] = struct.pack(form, number % 256**size)
        case "word":
            word = _WORDS[value % len(_WORDS)]
            data[place : place + (len(word) if length % 2 else 0)] = word
        case "splice":
            start = length % (len(other) + 1)
            data[place : place + reach] = other[start : start + reach]


_ODD = (
    *(None, True, False, 0, -1, 1, 3, 0.5, -0.5, 2**31, 2**63, 10**30, 10**400, 1e308),
    *(float("nan"), float("inf"), "", "x", "0", "../../../escaped", "/etc/hostname", "a\nb"),
    *("\x1b[2J", "\ud800", "é", "x" * 3000, [], [0], [[]], {}, {"a": 1}, ["a", "b"], [1, "a"]),
    json.loads("[" * 50 + "]" * 50),
)


@st.composite
def mutated_json(draw: st.DrawFn, document: Any) -> bytes:
    """A document with up to three values replaced, removed or exchanged; sometimes as bytes that
    are edited in turn."""
    document = json.loads(json.dumps(document))
    kinds = st.sampled_from(("new", "gone", "swap", "key"))
    for kind, first, second, odd in draw(
        st.lists(st.tuples(kinds, _Place, _Place, st.sampled_from(_ODD)), max_size=3)
    ):
        if places := _places(document):
            (holder, key), (other, there) = (places[n % len(places)] for n in (first, second))
            if kind == "gone":
                del holder[key]
            elif kind == "swap":
                holder[key], other[there] = other[there], json.loads(json.dumps(holder[key]))
            elif kind == "key" and isinstance(holder, dict):
                holder[str(odd)] = holder.pop(key)
            else:
                holder[key] = odd
        elif kind == "new":
            document = odd
    data = json.dumps(document).encode()
    return draw(mutated([data], 2)) if draw(st.integers(0, 3)) == 3 else data


def _places(document: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every value inside."""
    keys = range(len(document)) if isinstance(document, list) else document
    found: list[tuple[Any, Any]] = []
    for key in keys if isinstance(document, dict | list) else ():
        found += [(document, key), *_places(document[key])]
    return found
