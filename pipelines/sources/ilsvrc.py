"""The published ILSVRC archives, of 2012 and of 2010 (the headline set of the AlexNet paper).

Both years: a train tar of one tar a class, flat val and test tars, a devkit with class list and
ground truth. 2012: test without labels. 2010: test with labels, and patch_images.tar, whose
images replace blank ones of the same name; its publishers ask that all of them are applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import entries, storage
from pipelines.sources import devkit, index, official
from pipelines.sources.table import SPLITS, Layout, Source, fewer, labelled, part

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
_OLD_TEST_TAR = "ILSVRC2012_img_test.tar"


@dataclass(frozen=True)
class _Edition:
    year: int
    archives: dict[str, tuple[str, ...]]  # of each split, the preferred name first
    devkit: str
    besides: dict[str, tuple[str, ...]]  # what else the labels of a split need
    patches: str = ""


_EDITIONS = (
    _Edition(
        2012,
        {
            "train": (TRAIN_TAR,),
            "val": (VAL_TAR,),
            "test": ("ILSVRC2012_img_test_v10102019.tar", _OLD_TEST_TAR),
        },
        devkit.NAME,
        {"val": (devkit.NAME,), "test": (devkit.NAME,)},
    ),
    _Edition(
        2010,
        {
            "train": ("ILSVRC2010_images_train.tar",),
            "val": ("ILSVRC2010_images_val.tar",),
            "test": ("ILSVRC2010_images_test.tar",),
        },
        devkit.NAME_2010,
        {"val": (devkit.NAME_2010,), "test": (devkit.NAME_2010, devkit.TEST_TRUTH_2010)},
        "patch_images.tar",
    ),
)


def _recognises(found: entries.Listing) -> bool:
    return any(_has(edition, found.files) for edition in _EDITIONS)


def _places(found: entries.Listing) -> dict[str, str]:
    """Regex of the archives of each split."""
    return {s: rf"^ILSVRC20(12_img|10_images)_{s}(_v10102019)?\.tar$" for s in SPLITS}


def _scan(raw: str, listing: entries.Listing, splits: Sequence[str], partial: bool) -> Source:
    files = listing.files
    edition = _edition(raw, files)
    used = _needed(raw, files, edition, splits, partial)
    kit = devkit.load(storage.join(raw, edition.devkit)) if edition.devkit in files else None
    published = not partial and (kit is None or official.announces_published(kit))
    containers = [*used.values(), *[name for name in (edition.patches,) if name in files]]
    if published:
        official.check_sizes(raw, files, containers)
    notes: list[str] = []
    ignored: dict[str, int] = {}
    parts = {
        split: _read(raw, edition, kit, split, name, notes, ignored) for split, name in used.items()
    }
    if edition.patches in containers:
        parts = _patched(raw, edition.patches, parts, partial, notes, ignored)
    wnids = kit.wnids if kit else tuple(sorted(pc.unique(parts["train"]["wnid"]).to_pylist()))
    table = labelled([*parts.values()], wnids)
    _check_classes(raw, used, table)
    if kit and not partial:
        check_promise(raw, kit, table, splits)
    if published:
        official.check_counts(raw, edition.year, table, used)
    return Source(
        raw=raw,
        layout=f"ilsvrc{edition.year}",
        table=table,
        wnids=wnids,
        class_names=tuple(kit.words[wnid] for wnid in wnids) if kit else wnids,
        labels_from={split: _labels_from(edition, split) for split in splits},
        containers=tuple((name, files[name]) for name in containers),
        announced=announced(kit, splits),
        notes=tuple(notes),
        official=official.is_official(files, containers, kit),
        ignored_members=ignored,
    )


def announced(kit: devkit.Devkit | None, splits: Sequence[str]) -> dict[str, int] | None:
    """Images per split; a split that nobody announced (2012's test without labels, when the
    devkit is not the published one) is left out. None without a devkit."""
    if kit is None:
        return None
    counts = {"train": sum(kit.train_images.values()), "val": len(kit.val_wnids)}
    if kit.test_wnids:
        counts["test"] = len(kit.test_wnids)
    elif official.announces_published(kit):
        counts["test"] = official.IMAGES[kit.year]["test"]
    return {split: counts[split] for split in splits if split in counts}


def check_promise(raw: str, kit: devkit.Devkit, table: pa.Table, splits: Sequence[str]) -> None:
    """`table`: rows of `part` or `labelled`. Raises UserError when there are fewer or more
    images than the devkit announces, of a class in train or of a whole split elsewhere."""
    expected = announced(kit, splits) or {}
    if "train" in splits:
        wnids = table.filter(pc.equal(table["split"], "train"))["wnid"]
        found = {row["values"]: row["counts"] for row in pc.value_counts(wnids).to_pylist()}
        wrong = [w for w in kit.wnids if found.get(w, 0) != kit.train_images[w]]
        if wrong:
            raise UserError(
                f"{raw}: {wrong[0]} has {found.get(wrong[0], 0):,} train images, the devkit "
                f"announces {kit.train_images[wrong[0]]:,} ({len(wrong)} of {len(kit.wnids)} "
                f"classes differ; {len(wnids):,} of {expected['train']:,} in all); add "
                "the missing ones or pass --partial"
            )
    for split in ("val", "test"):
        count = int(pc.sum(pc.equal(table["split"], split)).as_py() or 0)
        if split in expected and count != expected[split]:
            truth = split == "val" or bool(kit.test_wnids)
            by = "the devkit's ground truth has" if truth else "the published set has"
            raise UserError(
                f"{raw}: {split} has {count:,} images, {by} {expected[split]:,}"
                f"{' lines' * truth}; add the missing ones or pass --partial"
            )


# What is there


def _has(edition: _Edition, files: dict[str, int]) -> bool:
    return any(name in files for names in edition.archives.values() for name in names)


def _edition(raw: str, files: dict[str, int]) -> _Edition:
    found = [edition for edition in _EDITIONS if _has(edition, files)]
    if len(found) > 1:
        raise UserError(
            f"{raw} is ambiguous: it holds archives of ILSVRC2012 and of ILSVRC2010; give each "
            "year its own folder"
        )
    edition = found[0]
    kits = [name for name in (devkit.NAME, devkit.NAME_2010) if name in files]
    if kits and edition.devkit not in kits:
        raise UserError(
            f"{raw} holds archives of ILSVRC{edition.year}, but {kits[0]} is the devkit of another "
            f"year with other classes; put {edition.devkit} in its place"
        )
    return edition


def _needed(
    raw: str, files: dict[str, int], edition: _Edition, splits: Sequence[str], partial: bool
) -> dict[str, str]:
    """The archive of each split. Raises UserError when anything that is needed is not there."""
    used, missing, lacking = {}, [], []
    for split in splits:
        there = [name for name in edition.archives[split] if name in files]
        used[split] = (there or edition.archives[split])[0]
        needs = (used[split], *edition.besides.get(split, ()))
        absent = [name for name in needs if name not in files]
        missing += absent
        lacking += [split] * bool(absent)
    if missing:
        raise UserError(
            f"{raw}: --splits {','.join(splits)} needs {' and '.join(dict.fromkeys(missing))}, "
            f"not there; add what is missing{fewer(splits, lacking)}"
        )
    if edition.patches and edition.patches not in files and not partial:
        raise UserError(
            f"{raw}: {edition.patches} is not there, and without it some images of "
            f"ILSVRC{edition.year} are blank; add it or pass --partial"
        )
    return used


# Splits


def _read(
    raw: str,
    edition: _Edition,
    kit: devkit.Devkit | None,
    split: str,
    name: str,
    notes: list[str],
    ignored: dict[str, int],
) -> pa.Table:
    """The rows of a split as `part` gives them; adds to `notes` and `ignored`."""
    uri = storage.join(raw, name)
    if name == _OLD_TEST_TAR:
        notes.append(f"{name} is the archive before its patch of 10 October 2019")
    found = index.without_litter(
        name, index.nested(uri) if split == "train" else index.flat(uri), notes, ignored
    )
    if not found.num_rows:
        raise UserError(f"{uri} holds no image; fetch it again")
    names = index.base_names(found["name"].combine_chunks())
    if split == "train":
        wnids = _wnids_of_train(uri, found["outer"].combine_chunks(), names)
    else:
        assert kit is not None  # among the needed files
        prefix = f"ILSVRC{edition.year}_{split}"
        if devkit.TEST_TRUTH_2010 in edition.besides[split] or split == "val":
            truth = kit.val_wnids if split == "val" else kit.test_wnids
            wnids = devkit.wnids_by_number(uri, names, prefix, truth)
        else:
            devkit.numbers(uri, names, prefix)
            wnids = ""
    return part(split, names, wnids, name, found["offset"], found["size"])


def _wnids_of_train(uri: str, outer: pa.Array, names: pa.Array) -> pa.Array:
    """The name of the inner tar, which each image's name must repeat."""
    if (
        strange := index.first_but(outer, pc.match_substring_regex(outer, r"^n\d{8}\.tar$"))
    ) is not None:
        raise UserError(f"{uri} holds {strange}; expected only nXXXXXXXX.tar, one a class")
    wnids = pc.utf8_slice_codeunits(outer, 0, len("n00000000"))
    prefixes = pc.extract_regex(names, r"^(?P<wnid>n\d{8})_\d+\.[^.]+$")
    agree = pc.fill_null(pc.equal(pc.struct_field(prefixes, "wnid"), wnids), False)
    if (strange := index.first_but(names, agree)) is not None:
        wnid = index.first_but(wnids, agree)
        raise UserError(f"{uri}: {wnid}.tar holds {strange}; expected only {wnid}_*.JPEG")
    return wnids


def _check_classes(raw: str, used: dict[str, str], table: pa.Table) -> None:
    unknown = table.filter(pc.and_(pc.equal(table["label"], -1), pc.not_equal(table["wnid"], "")))
    if unknown.num_rows:
        raise UserError(
            f"{raw}: {used['train']} holds {unknown['wnid'][0].as_py()}.tar, no class of the devkit"
        )


def _labels_from(edition: _Edition, split: str) -> str:
    if split == "train":
        return "name of the inner tar, equal to the prefix of the file name"
    if split == "test" and edition.year == 2012:
        return "nothing: these images were published without labels"
    return (
        "number in the file name, line of the ground truth, "
        f"ILSVRC{edition.year}_ID, WNID of meta.mat"
    )


# patch_images.tar of 2010: images that replace those of the same name


def _patched(
    raw: str,
    name: str,
    parts: dict[str, pa.Table],
    partial: bool,
    notes: list[str],
    ignored: dict[str, int],
) -> dict[str, pa.Table]:
    """The rows of each split (as `part` gives them) with the places of their replacements: the
    members {train,val,test}/NAME of the archive `name`. Adds to `notes` and `ignored`.

    Raises UserError for another member, for two replacements of one image and, unless `partial`,
    for a replacement of an image that is not there.
    """
    uri = storage.join(raw, name)
    found = index.without_litter(name, index.flat(uri), notes, ignored)
    images = pc.match_substring_regex(found["name"], r"(?i)\.jpe?g$")
    if (other := index.first_but(found["name"], images)) is not None:
        strange = found.num_rows - int(pc.sum(images).as_py())
        ignored[name] = ignored.get(name, 0) + strange
        notes.append(f"{name}: ignored {strange:,} members that are no images, first {other}")
    found = found.filter(images)
    place = pc.extract_regex(found["name"], r"(?:^|/)(?P<split>train|val|test)/(?P<name>[^/]+)$")
    if (strange := index.first_but(found["name"], pc.is_valid(place))) is not None:
        raise UserError(f"{uri} holds {strange}; expected train/, val/ or test/ and a name")
    found = found.append_column("split", pc.struct_field(place, "split"))
    found = found.set_column(1, "name", pc.struct_field(place, "name"))
    patched = {}
    for split, rows in parts.items():
        by = found.filter(pc.equal(found["split"], split)).combine_chunks()
        known = pc.is_in(by["name"], value_set=rows["name"].combine_chunks())
        if (stranger := index.first_but(by["name"], known)) is not None and not partial:
            raise UserError(
                f"{uri} replaces {split}/{stranger}, which the {split} archive does not hold; take "
                "all from the same release or pass --partial"
            )
        if len(pc.unique(by["name"])) != by.num_rows:
            raise UserError(f"{uri} holds two images of one name in {split}; fetch it again")
        by = by.filter(known).combine_chunks()
        by = by.append_column("source", pa.repeat(pa.scalar(name), by.num_rows))
        row = pc.index_in(rows["name"], value_set=by["name"].combine_chunks())
        for column in ("source", "offset", "size"):
            values = pc.coalesce(by[column].take(row), rows[column])
            rows = rows.set_column(rows.schema.get_field_index(column), column, values)
        patched[split] = rows
        notes.append(f"{name}: replaced {by.num_rows:,} images of {split}")
    return patched


LAYOUT = Layout(
    name="ILSVRC archives",
    expected=f"{TRAIN_TAR}, {VAL_TAR} and {devkit.NAME} (or those of ILSVRC2010)",
    lists=r"^(ILSVRC2012_devkit_t12\.tar\.gz|ILSVRC2010_devkit-1\.0\.tar\.gz"
    r"|ILSVRC2010_test_ground_truth\.txt|patch_images\.tar)$",
    recognises=_recognises,
    places=_places,
    scan=_scan,
)
