"""patch_images.tar of ILSVRC2010: pictures that replace those of the same name."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import storage
from pipelines.sources import index


def apply(
    raw: str,
    name: str,
    parts: dict[str, pa.Table],
    partial: bool,
    notes: list[str],
    ignored: dict[str, int],
) -> dict[str, pa.Table]:
    """The rows of each split (as `part` gives them) with the places of their replacements: the
    members {train,val,test}/NAME of the archive `name`. Adds to `notes` and `ignored`.

    Raises UserError for another member, for two replacements of one picture and, unless `partial`,
    for a replacement of a picture that is not there.
    """
    uri = storage.join(raw, name)
    found = index.without_litter(name, index.flat(uri), notes, ignored)
    pictures = pc.match_substring_regex(found["name"], r"(?i)\.jpe?g$")
    if (other := index.first_but(found["name"], pictures)) is not None:
        strange = found.num_rows - int(pc.sum(pictures).as_py())
        ignored[name] = ignored.get(name, 0) + strange
        notes.append(f"{name}: ignored {strange:,} members that are no images, first {other}")
    found = found.filter(pictures)
    place = pc.extract_regex(found["name"], r"(?:^|/)(?P<split>train|val|test)/(?P<name>[^/]+)$")
    if (strange := index.first_but(found["name"], pc.is_valid(place))) is not None:
        raise UserError(f"{uri} holds {strange}; expected train/, val/ or test/ and a name")
    found = found.append_column("split", pc.struct_field(place, "split"))
    found = found.set_column(1, "name", pc.struct_field(place, "name"))
    patched = {}
    for split, rows in parts.items():
        by = found.filter(pc.equal(found["split"], split)).combine_chunks()
        by = by.filter(_known(uri, split, rows, by, partial)).combine_chunks()
        patched[split] = _replaced(name, rows, by)
        notes.append(f"{name}: replaced {by.num_rows:,} pictures of {split}")
    return patched


def _known(uri: str, split: str, rows: pa.Table, by: pa.Table, partial: bool) -> pa.Array:
    """Which replacements are of a picture that is there."""
    known = pc.is_in(by["name"], value_set=rows["name"].combine_chunks())
    if (stranger := index.first_but(by["name"], known)) is not None and not partial:
        raise UserError(
            f"{uri} replaces {split}/{stranger}, which the {split} archive does not hold; take "
            "all from the same release or pass --partial"
        )
    if len(pc.unique(by["name"])) != by.num_rows:
        raise UserError(f"{uri} holds two pictures for the same name in {split}; fetch it again")
    return known


def _replaced(name: str, rows: pa.Table, by: pa.Table) -> pa.Table:
    row = pc.index_in(rows["name"], value_set=by["name"].combine_chunks())
    for column in ("offset", "size"):
        values = pc.if_else(pc.is_valid(row), by[column].take(row), rows[column])
        rows = rows.set_column(rows.schema.get_field_index(column), column, values)
    source = pc.if_else(pc.is_valid(row), name, rows["source"])
    return rows.set_column(rows.schema.get_field_index("source"), "source", source)
