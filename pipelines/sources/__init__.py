"""RAW, in any layout known here, as one table: where each image lies and what its label is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from alexnet.errors import UserError
from pipelines import entries, storage
from pipelines.sources import folders, huggingface, ilsvrc, kaggle, table, webdataset
from pipelines.sources.table import (
    SPLITS,
    TABLE,
    UNLABELLED,
    Layout,
    Shuffle,
    Source,
    StoredAs,
    hold_out,
    parse_subset,
    select,
)

__all__ = [
    "SPLITS",
    "TABLE",
    "UNLABELLED",
    "Layout",
    "Shuffle",
    "Source",
    "StoredAs",
    "hold_out",
    "parse_subset",
    "scan",
    "select",
]

_OWN_NOTES = r"^(demo-raw|fetch)\.json$"  # by which these commands know their folder again
_NO_TEXT = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are not UTF-8
_REQUESTS = 16  # at a time
_LAYOUTS = (
    *(ilsvrc.LAYOUT, folders.LAYOUT, kaggle.LAYOUT, huggingface.LAYOUT),
    webdataset.OWN_LAYOUT,
)
_WITHOUT_OTHERS = (webdataset.LAYOUT, folders.UNSPLIT_LAYOUT)  # the first where there is no other


def scan(raw: str, splits: Sequence[str], partial: bool = False) -> Source:
    """Recognise the layout of `raw`, find every image of `splits` and label it.

    Raises UserError when the layout is unknown, ambiguous or incomplete, when an archive is
    damaged, when two sources of a label contradict each other, and, unless `partial`, when there
    are fewer or more images than the devkit, the lists or the published archives announce, or
    when an entry where the layout looks for images cannot be read.
    """
    found = entries.listing(raw)
    files = found.files
    if not files and not found.broken:
        raise UserError(
            f"{raw}: there is no folder with files of that name; --raw wants the folder or s3:// "
            "prefix that holds the raw data"
        )
    _refuse_names(raw, [*files, *found.empty, *found.ignored, *found.broken])
    # A tar that was unpacked beside itself is not another layout.
    layouts = [layout for layout in _LAYOUTS if layout.recognises(found)]
    layouts = layouts or [one for one in _WITHOUT_OTHERS if one.recognises(found)][:1]
    if len(layouts) > 1:
        names = " and also ".join(layout.name for layout in layouts)
        raise UserError(f"{raw} is ambiguous: it holds {names}; give each its own folder")
    if not layouts:
        expected = "; or ".join(layout.expected for layout in (*_LAYOUTS, *_WITHOUT_OTHERS))
        raise UserError(
            f"{raw}: no known layout; expected {expected}; found {_tops(found)}{_deeper(found)}"
        )
    (layout,) = layouts
    left_out = _unreadable(raw, found, layout, splits, partial)
    archives = _versions(raw, [name for name in files if name.endswith(".tar")])
    source = layout.scan(raw, found, splits, partial)
    table.check(raw, source.table)
    accounts = entries.account(
        found,
        source.table["source"],
        [name for name, _ in source.containers],
        f"{layout.lists}|{_OWN_NOTES}",
        {split: place for split, place in layout.places(found).items() if split not in splits},
        left_out | source.left_out,
        source.ignored_members,
    )
    return replace(
        source,
        archives=archives,
        accounts=accounts,
        notes=(*source.notes, *accounts.notes()),
        other_splits=tuple(
            split
            for split, place in layout.places(found).items()
            if split not in splits and any(re.search(place, name) for name in files)
        ),
    )


def _refuse_names(raw: str, names: Sequence[str]) -> None:
    """Raises UserError for names that are no text, which no index or list could hold."""
    bad = [name for name in names if _NO_TEXT.search(name)]
    if bad:
        shown = ", ".join(map(ascii, bad[:5])) + ", …" * (len(bad) > 5)
        raise UserError(f"{raw}: {len(bad):,} names are not UTF-8 ({shown}); rename them")


def _unreadable(
    raw: str, found: entries.Listing, layout: Layout, splits: Sequence[str], partial: bool
) -> dict[str, str]:
    """What cannot be read where this layout looks for images of `splits` or for its lists, and
    why. Raises UserError for it unless `partial`."""
    places = layout.places(found)
    wanted = "|".join(places[split] for split in splits if split in places) or r"^$^"
    broken = {
        name: why
        for name, why in found.broken.items()
        if re.search(layout.lists, name) or (re.search(wanted, name) and not entries.rule(name))
    }
    if broken and not partial:
        raise UserError(
            f"{raw}: {entries.entries_told(len(broken))} cannot be read: "
            f"{entries.named(broken)}; mend or remove what is named, or pass --partial to leave "
            "it out"
        )
    return broken


def _tops(found: entries.Listing) -> str:
    """What lies at the top, for a person who wonders why it is no layout."""
    return ", ".join(
        f"{top} ({found.broken[top]})" if top in found.broken else top for top in found.tops()[:5]
    )


def _deeper(found: entries.Listing) -> str:
    """Where RAW seems to be instead, one folder below."""
    for top in found.tops():
        below = {
            name.removeprefix(f"{top}/"): size
            for name, size in found.files.items()
            if name.startswith(f"{top}/")
        }
        if any(one.recognises(entries.Listing(below)) for one in (*_LAYOUTS, *_WITHOUT_OTHERS)):
            return f"; did you mean the folder {top} in it?"
    return ""


def _versions(raw: str, names: list[str]) -> dict[str, str]:
    """Taken before the look into them, so that no change goes unseen."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        found = pool.map(storage.version, [storage.join(raw, name) for name in names])
        return dict(zip(names, found, strict=True))
