"""Shards as RAW, in the form of WebDataset: people's own labelled tars, or a finished set of this
program as the source of another.

People's tars tell their split by their names, such as imagenet1k-train-0000.tar, and hold KEY.jpg
(or jpeg, png, webp) with KEY.cls, or with `label` in KEY.json, or both, as timm/imagenet-1k-wds on
the Hugging Face Hub. Where a key, or `filename` in the JSON, has a WNID, the labels must be the
ranks of the sorted WNIDs. Elsewhere a class is known by its label alone, which is written with
leading zeros, so that the rank of the sorted classes is the label in the tars. Their names are the
lines of classnames.txt, or `class_names` in _info.json; `splits` there, as timm writes it, tells
which tars there must be, and the images in each. No image is read.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import entries, shards, storage
from pipelines.sources import index, tars
from pipelines.sources.table import (
    NO_LABELS,
    SPLITS,
    UNLABELLED,
    Layout,
    Source,
    StoredAs,
    fewer,
    labelled,
    order_that_mixes,
    part,
    ranked,
    read_text,
    with_own_keys,
)

_SPLIT_IN_NAME = {"train": "train(ing)?", "val": "val(id(ation)?)?", "test": "test(ing)?"}
_PLACES = {
    split: rf"(?i)^([^/]*[-_.])?{said}([-_.\d][^/]*)?\.tar$"
    for split, said in _SPLIT_IN_NAME.items()
}
_INFO, _NAMES = "_info.json", "classnames.txt"
_IMAGES, _LABELS = {"jpg", "jpeg", "png", "webp"}, {"cls", "json"}
_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<kind>[^/]*)")  # up to the first dot
_WNID_FIELDS = ("filename", "wnid", "synset")  # of KEY.json
_WNID = re.compile(r"(?:^|[/_])(n\d{8})(?=[/_.]|$)")
_SAMPLES = pa.schema(
    [
        ("name", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int64()),  # UNLABELLED where there is none
        ("wnid", pa.string()),  # "" where nothing tells one
        ("image", pa.bool_()),  # else a member that is neither an image nor its label
    ]
)
_PLACE = ["wnid", "source", "offset", "size"]

_OWN_SHARD = re.compile(r"(train|val|test)-\d{6}\.tar")
_OWN_COLUMNS = ["key", "label", "wnid", "shard", "offset", "size"]


# People's own tars


def _recognises(found: entries.Listing) -> bool:
    files = {*found.tops()} & found.files.keys()  # not every name of 1.28 million
    return any(map(_split_of, files))


def _split_of(name: str) -> str | None:
    """The split that the name of a tar tells; None for another file, or a published archive."""
    if name.startswith("ILSVRC20"):
        return None
    return next((split for split in SPLITS if re.search(_PLACES[split], name)), None)


def _scan(raw: str, listing: entries.Listing, splits: Sequence[str], partial: bool) -> Source:
    files = listing.files
    split_of = {name: split for name in files if (split := _split_of(name))}
    if absent := [split for split in splits if split not in split_of.values()]:
        raise UserError(
            f"{raw}: --splits {','.join(splits)} needs tars with {absent[0]} in their names, not "
            f"there; add them{fewer(splits, absent)}"
        )
    lengths, names = _info(raw, files)
    if (missing := sorted(lengths.keys() - files.keys())) and not partial:
        raise UserError(
            f"{raw}: {missing[0]} of {_INFO} is not there ({len(missing):,} of {len(lengths):,} "
            "tars are missing); add them or pass --partial"
        )
    # Those of train and val always: one ranking, whatever the splits.
    split_of = {
        name: split for name, split in split_of.items() if split in {"train", "val", *splits}
    }
    notes: list[str] = []
    ignored: dict[str, int] = {}
    found = _read_all(raw, {name: files[name] for name in split_of}, notes, ignored)
    split = pa.array([split_of[name] for name in found["source"].to_pylist()], pa.string())
    found = found.append_column("split", split)
    _check_labelled(raw, found)
    labels, wnids, class_names, told = _classes(raw, found, names, partial)
    if not partial:
        _check_lengths(raw, found, {name: lengths[name] for name in split_of if name in lengths})
    rank = pc.index_in(found["label"], value_set=pa.array(labels, pa.int64()))
    wnid = pa.array([*wnids, ""], pa.string()).take(pc.fill_null(rank, len(wnids)))
    found = found.set_column(found.column_names.index("wnid"), "wnid", wnid)
    by_split = {split: found.filter(pc.equal(found["split"], split)) for split in splits}
    parts = [
        part(split, index.base_names(rows["name"]), *rows.select(_PLACE).columns)
        for split, rows in by_split.items()
    ]
    announced = {
        split: sum(number for name, number in lengths.items() if _split_of(name) == split)
        for split in splits
    }
    return Source(
        raw=raw,
        layout="webdataset",
        table=with_own_keys(labelled(parts, wnids)),
        wnids=wnids,
        class_names=class_names,
        labels_from={split: _origin(rows) for split, rows in by_split.items()},
        containers=tuple((name, files[name]) for name in split_of if split_of[name] in splits),
        announced={split: number for split, number in announced.items() if number} or None,
        notes=(*notes, *told),
        shuffle=order_that_mixes(found),
        ignored_members=ignored,
    )


def _info(raw: str, files: Mapping[str, int]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Images in each tar, {} where nothing tells; and the names of the classes, () likewise.

    Raises UserError for an _info.json that cannot be read, and for one whose labels are not those
    that are read here.
    """
    lengths: dict[str, int] = {}
    names: tuple[str, ...] = ()
    if _INFO in files:
        uri = storage.join(raw, _INFO)
        try:
            document = json.loads(read_text(uri))
            names = tuple(map(str, document.get("class_names") or ()))
            for split in document.get("splits", {}).values():
                if split.get("alt_label"):
                    raise UserError(
                        f"{uri}: the labels are {split['alt_label']!r} of each JSON, which is not "
                        "read; write them to KEY.cls"
                    )
                lengths |= zip(split["filenames"], map(int, split["shard_lengths"]), strict=True)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{uri} is not what timm writes ({type(error).__name__}: {error}); fetch it again "
                "or remove it"
            ) from error
    if _NAMES in files:
        lines = read_text(storage.join(raw, _NAMES)).splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
    return lengths, names


def _read_all(
    raw: str, used: Mapping[str, int], notes: list[str], ignored: dict[str, int]
) -> pa.Table:
    """The images of the tars (name to bytes), of _SAMPLES and `source`; adds to `notes` and
    `ignored` what else the tars hold."""

    def read(passed: tars.Passed, name: str) -> pa.Table:
        uri = storage.join(raw, name)
        found = index.once(uri, "samples", _SAMPLES, lambda uri: _samples(uri, passed))
        return found.append_column("source", pa.repeat(pa.scalar(name), found.num_rows))

    found = pa.concat_tables(index.read_each(raw, sum(used.values()), read, used)).combine_chunks()
    other = found.filter(pc.invert(found["image"]))
    ignored |= {
        row["values"]: row["counts"] for row in pc.value_counts(other["source"]).to_pylist()
    }
    if other.num_rows:
        notes.append(
            f"ignored {other.num_rows:,} members of {len(ignored):,} tars that are neither images "
            f"nor labels, first {other['name'][0].as_py()} in {other['source'][0].as_py()}"
        )
    return found.filter(found["image"])


def _samples(uri: str, passed: tars.Passed) -> pa.Table:
    """The members of a tar as _SAMPLES, in its order, but the labels: those are with their images.

    Raises UserError as `tars.members` does, for a tar without an image, for a sample of two images
    or of none, and as `_label` does.
    """
    found = tars.members(uri, uri, passed=passed, read=r"(?i)(^|/)[^./]+\.(cls|json)$")
    names, foreign = found["name"].to_pylist(), index.litter(found["name"]).to_pylist()
    samples: dict[str, dict[str, int]] = {}  # number of the member by kind, by key
    other = []
    for number, name in enumerate(names):
        if not name.isprintable():
            raise UserError(f"{uri} holds {name!r}, which cannot name a sample; pack it again")
        match = None if foreign[number] else _MEMBER.fullmatch(name)
        if match is None:
            other.append(number)
            continue
        kinds = samples.setdefault(match["key"], {})
        if kinds.setdefault(match["kind"].lower(), number) != number:
            raise UserError(f"{uri} holds {name} twice, in other letters; keep one of them")
    labels: dict[int, tuple[int, str]] = {}  # by number of the image
    for key, kinds in samples.items():
        images = sorted(kinds.keys() & _IMAGES)
        if len(images) > 1:
            two = " and ".join(names[kinds[kind]] for kind in images[:2])
            raise UserError(f"{uri} holds two images in one sample, {two}; keep one of them")
        if not images and kinds.keys() & _LABELS:
            raise UserError(f"{uri} holds a label of {key}, but no image of it; pack it again")
        other += [kinds[kind] for kind in kinds.keys() - _IMAGES - _LABELS]
        for kind in images:
            data = {k: found["data"][kinds[k]].as_py() for k in kinds.keys() & _LABELS}
            labels[kinds[kind]] = _label(f"{uri}: {key}", key, data)
    if not labels:
        raise UserError(f"{uri} holds no image KEY.jpg, .jpeg, .png or .webp; take other tars")
    kept = sorted([*labels, *other])
    members = found.select(["name", "offset", "size"]).take(pa.array(kept))
    label, wnid = zip(*(labels.get(number, (UNLABELLED, "")) for number in kept), strict=True)
    is_image = [number in labels for number in kept]
    told = [pa.array(label, pa.int64()), pa.array(wnid, pa.string()), pa.array(is_image)]
    return pa.table([*members.columns, *told], schema=_SAMPLES)


def _label(where: str, key: str, data: Mapping[str, bytes | None]) -> tuple[int, str]:
    """What KEY.cls and KEY.json (null where too large) tell of an image: its label, UNLABELLED if
    there is none; its WNID, or "". `where`: the sample, for errors.

    Raises UserError for a label that is not an integer, and where two labels or two WNIDs differ.
    """
    labels = []
    texts = [key]
    if "cls" in data:
        labels.append(_integer(f"{where}.cls", (data["cls"] or b"").decode("utf-8", "replace")))
    if "json" in data:
        try:
            document = json.loads(data["json"] or b"")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}.json is not valid JSON of at most 1 MiB ({error}); pack it again"
            ) from error
        document = document if isinstance(document, dict) else {}
        texts += [str(document.get(name, "")) for name in _WNID_FIELDS]
        label = document.get("label")
        # Beside KEY.cls it may be the name of the class.
        if label is not None and (type(label) is int or not labels):
            labels.append(_integer(f"label in {where}.json", str(label)))
    wnids = {wnid for text in texts for wnid in _WNID.findall(text)}
    if len({*labels}) > 1 or len(wnids) > 1:
        two = sorted(wnids) if len(wnids) > 1 else labels
        raise UserError(f"{where} is of two classes, {two[0]} and {two[1]}; pack it again")
    return (labels or [UNLABELLED])[0], "".join(wnids)


def _integer(where: str, text: str) -> int:
    if not re.fullmatch(r"-1|\d{1,9}", text.strip(), re.ASCII):
        raise UserError(
            f"{where} is {text.strip()[:40]!r}, not the number of a class; pack it again"
        )
    return int(text)


def _check_lengths(raw: str, found: pa.Table, lengths: Mapping[str, int]) -> None:
    counts = {row["values"]: row["counts"] for row in pc.value_counts(found["source"]).to_pylist()}
    for name, length in lengths.items():
        if counts.get(name, 0) != length:
            raise UserError(
                f"{storage.join(raw, name)} holds {counts.get(name, 0):,} images, {_INFO} says "
                f"{length:,}; fetch it again or pass --partial"
            )


def _check_labelled(raw: str, found: pa.Table) -> None:
    """Raises UserError for an image of train or val without a label."""
    without = pc.and_(pc.less(found["label"], 0), pc.not_equal(found["split"], "test"))
    if pc.any(without).as_py():
        first = found.filter(without).slice(0, 1).to_pylist()[0]
        raise UserError(
            f"{raw}/{first['source']}: {first['name']} has no label ({pc.sum(without).as_py():,} "
            "such images); expected KEY.cls, or label in KEY.json, with the number of its class"
        )


def _classes(
    raw: str, found: pa.Table, names: Sequence[str], partial: bool
) -> tuple[list[int], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Labels, the WNID and the name of each, and notes.

    Raises UserError as `ranked` does where there are WNIDs. Elsewhere for a label without a name,
    and, unless `partial`, for a class without an image.
    """
    rows = found.append_column("row", pa.array(np.arange(len(found)), pa.int64()))
    rows = rows.filter(pc.greater_equal(rows["label"], 0))
    first = rows.group_by(["label", "wnid"], use_threads=False).aggregate([("row", "min")])
    at = found.take(first["row_min"])
    place = pc.binary_join_element_wise(at["source"], at["name"], " ")
    first = first.append_column("place", place).sort_by("label")
    known = first.filter(pc.not_equal(first["wnid"], ""))
    if known.num_rows:
        ranking = ranked(raw, known, names, partial)
        strange = first.filter(pc.invert(pc.is_in(first["label"], pa.array(ranking[0]))))
        if strange.num_rows:
            raise UserError(
                f"{raw}: {strange['place'][0].as_py()} has label {strange['label'][0].as_py()}, "
                "and no image with this label tells its WNID; add one"
            )
        return ranking
    there = first["label"].to_pylist()
    count = len(names) or max(there, default=-1) + 1
    if there and there[-1] >= count:
        raise UserError(
            f"{raw}: {first['place'][-1].as_py()} has label {there[-1]}, but there are names of "
            f"{count:,} classes; take both from one data set"
        )
    if (missing := sorted({*range(count)} - {*there})) and not partial:
        raise UserError(
            f"{raw}: {len(missing):,} of the classes 0 to {count - 1} have no image, first "
            f"{missing[0]}; add what is missing or pass --partial"
        )
    wnids = tuple(f"{label:0{len(str(count - 1))}d}" for label in range(count))
    return list(range(count)), wnids, tuple(names) or wnids, ()


def _origin(rows: pa.Table) -> str:
    if not pc.any(pc.not_equal(rows["wnid"], "")).as_py():
        return NO_LABELS
    by_wnid = pc.any(pc.match_substring_regex(rows["wnid"], r"^n\d{8}$")).as_py()
    return f"KEY.cls or label in KEY.json{', equal to the rank of the WNID' if by_wnid else ''}"


# A finished set of this program


def _recognises_own(found: entries.Listing) -> bool:
    """Also a set that is not finished, which `_scan_own` refuses with a better reason."""
    known = {"manifest.json", "_meta/plan.json"} & found.files.keys()
    return bool(known) and any(_OWN_SHARD.fullmatch(name) for name in found.files)


def _scan_own(raw: str, listing: entries.Listing, splits: Sequence[str], partial: bool) -> Source:
    files = listing.files
    manifest = shards.load_manifest(raw)
    if absent := [split for split in splits if not manifest.split_shards(split)]:
        raise UserError(
            f"{raw}: --splits {','.join(splits)} needs {absent[0]} shards, not there; build them "
            f"there{fewer(splits, absent)}"
        )
    containers = tuple(
        (f"{shard.name}.tar", shard.num_bytes)
        for split in splits
        for shard in manifest.split_shards(split)
    )
    for name, num_bytes in containers:
        if files.get(name) != num_bytes:
            found = f"{files[name]:,} bytes" if name in files else "not there"
            raise UserError(
                f"{raw}/{name} is {found}, its manifest says {num_bytes:,} bytes; run "
                f"`python -m pipelines verify {shlex.quote(raw)} --repair`"
            )
    document = manifest.document
    rejected = sum(document.get("rejected", {}).values())
    told = f"{rejected:,} images were rejected when these shards were made and are not in them"
    table = labelled([_own_part(raw, manifest, split) for split in splits], manifest.wnids)
    return Source(
        raw=raw,
        layout="shards",
        table=table,
        wnids=manifest.wnids,
        class_names=manifest.class_names,
        labels_from={split: _own_origin(manifest, split) for split in splits},
        containers=containers,
        announced={split: manifest.num_samples(split) for split in splits},
        notes=(told,) if rejected else (),
        shuffle=order_that_mixes(table),
        stored=StoredAs(manifest.resize, manifest.crop, manifest.quality, manifest.digest),
    )


def _own_part(raw: str, manifest: shards.Manifest, split: str) -> pa.Table:
    """Raises UserError when the index contradicts the manifest."""
    rows = shards.load_index(raw, split, _OWN_COLUMNS)
    wnid = rows["wnid"].combine_chunks()
    expected = pc.fill_null(pc.index_in(wnid, value_set=pa.array(manifest.wnids)), -1)
    counts = {row["values"]: row["counts"] for row in pc.value_counts(rows["shard"]).to_pylist()}
    wrong = pc.not_equal(rows["label"].combine_chunks(), expected.cast(pa.int64()))
    if pc.any(wrong).as_py() or counts != {
        shard.name: shard.samples for shard in manifest.split_shards(split) if shard.samples
    }:
        raise UserError(
            f"{raw}/{shards.index_name(split)} contradicts manifest.json; run `python -m pipelines "
            f"verify {shlex.quote(raw)}`"
        )
    names = pc.binary_join_element_wise(rows["key"], "jpg", ".")
    source = pc.binary_join_element_wise(rows["shard"], "tar", ".")
    return part(split, names, wnid, source, rows["offset"], rows["size"])


def _own_origin(manifest: shards.Manifest, split: str) -> str:
    """Keeps what the first build wrote, so that a label can be traced to its first source."""
    before = manifest.document.get("labels_from", {}).get(split, "not recorded")
    return f"shard set {manifest.digest[:12]}, there: {before}"


OWN_LAYOUT = Layout(
    name="shards made by this program",
    expected="a finished shard set",
    lists=r"^(manifest\.json|SHA256SUMS|_info\.json|shardindex-\w+\.json|\w+-\d+\.idx"
    r"|(index|quarantine|report|_meta)/.*)$",
    recognises=_recognises_own,
    places=lambda found: {split: rf"^{split}-\d{{6}}\.tar$" for split in SPLITS},
    scan=_scan_own,
)
LAYOUT = Layout(
    name="WebDataset tars",
    expected="WebDataset tars such as NAME-train-0000.tar with KEY.jpg and KEY.cls",
    lists=r"^(_info\.json|classnames\.txt)$",
    recognises=_recognises,
    places=lambda found: _PLACES,
    scan=_scan,
)
