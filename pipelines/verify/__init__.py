"""Is a shard set what its manifest says? Needs only OUT.

Fast: one listing, the hashes of everything but tars and quarantined files, whose sizes are looked
at; sidecars, index, manifest and SHA256SUMS against each other. `full` reads every byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipelines import shards, storage
from pipelines.verify import audit, contents, fates
from pipelines.verify.contents import (
    MANIFEST,
    SUMS,
    Damaged,
    Problem,
    Sidecar,
    index_name,
    quarantine_name,
    wids_name,
)

_UNLISTED = ("report/", "_meta/")  # made later, or by and for the builder
_SHOWN = 5  # names in a note


@dataclass(frozen=True)
class Findings:
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]  # what a person should know and what is no fault
    checked: str  # in words

    @property
    def bad_files(self) -> tuple[str, ...]:
        """Sorted names relative to OUT."""
        return tuple(sorted({problem.file for problem in self.problems}))


@dataclass(frozen=True)
class _Set:
    """OUT as far as it can be read; filled step by step."""

    out: str
    sizes: dict[str, int]
    sums: dict[str, str]
    manifest: shards.Manifest | None
    indexes: dict[str, pa.Table] = field(default_factory=dict)  # whole ones, by split
    # By split: key → bytes and sha256 of the raw file
    rejected: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    wids: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # entries, by split

    @property
    def shards(self) -> tuple[shards.ShardInfo, ...]:
        return self.manifest.shards if self.manifest else ()

    @property
    def splits(self) -> list[str]:
        return contents.splits(self.manifest) if self.manifest else []


def _quiet(line: str) -> None:
    pass


def verify(
    out: str, *, full: bool = False, raw: str | None = None, say: audit.Say = _quiet
) -> Findings:
    """Everything that is wrong with the finished set in `out`.

    `full` also hashes the shards, decodes their pictures strictly and compares each sample with
    index and plan, telling `say` how far it is; with `raw`, the images there are counted and their
    labels compared.
    Raises UserError when there is no finished set, or a store or RAW cannot be read.
    """
    problems: list[Problem] = []
    found = _open(out, problems)
    hashed = _hash_small_files(found, problems)
    problems += _against_manifest(found)
    for split in found.splits:
        problems += _check_split(found, split)
    problems += _check_sidecars(found)
    problems += _quarantine_sizes(found)
    notes = tuple(_unlisted(found))
    checked = f"{len(found.shards):,} shards, {hashed:,} files hashed, the others by size"
    if full:
        jobs = _jobs(found)
        problems += audit.audit(out, jobs, found.manifest, say)
        decoded = {job.file for job in jobs if job.index is not None}
        taken = sum(shard.samples for shard in found.shards if f"{shard.name}.tar" in decoded)
        checked = f"{hashed + len(jobs):,} files hashed, {taken:,} pictures decoded"
    if full or raw is not None:
        problems += _check_fates(found, raw)
    told = [Problem(problem.file, contents.one_line(problem.text)) for problem in problems]
    return Findings(tuple(dict.fromkeys(told)), notes, checked)


def _open(out: str, problems: list[Problem]) -> _Set:
    sizes = dict(storage.list_files(out))
    if MANIFEST not in sizes:
        shards.load_manifest(out)  # raises, and says how to get a set
    sums: dict[str, str] = {}
    if SUMS in sizes:
        sums, wrong = contents.sums(storage.read(storage.join(out, SUMS)))
        problems += [Problem(SUMS, text) for text in wrong]
    else:
        problems.append(Problem(SUMS, "missing"))
    manifest = None
    try:
        manifest = contents.manifest(out)
        if sums.get(MANIFEST, manifest.digest) != manifest.digest:
            manifest = None  # told with the other hashes; what it says of others proves nothing
    except Damaged as damaged:
        problems.append(Problem(damaged.file, damaged.text))
    return _Set(out, sizes, sums, manifest)


def _hash_small_files(found: _Set, problems: list[Problem]) -> int:
    """How many were hashed; the tables among those that are whole are kept."""
    names = {MANIFEST, *found.sums, *map(index_name, found.splits)}
    names |= set(map(quarantine_name, found.splits))
    names = {name for name in names if not _is_large(name)}
    problems += [Problem(name, "missing") for name in sorted(names - found.sizes.keys())]
    here = sorted(names & found.sizes.keys())
    uris = [storage.join(found.out, name) for name in here]
    for name, data in zip(here, storage.read_each(uris), strict=True):
        expected = found.sums.get(name)
        if expected is not None and hashlib.sha256(data).hexdigest() != expected:
            problems.append(Problem(name, f"its {len(data):,} bytes have another sha256"))
            continue
        if expected is None and found.sums:
            problems.append(Problem(SUMS, f"lacks {name}"))
        try:
            _keep(found, name, data)
        except Damaged as damaged:
            problems.append(Problem(damaged.file, damaged.text))
    return len(here)


def _is_large(name: str) -> bool:
    return name.endswith(".tar") or (name.startswith("quarantine/") and name.endswith(".bin"))


def _keep(found: _Set, name: str, data: bytes) -> None:
    for split in found.splits:
        if name == index_name(split):
            found.indexes[split] = contents.parse_index(found.out, split, data)
        if name == quarantine_name(split):
            entries = contents.parse_quarantine(found.out, split, data)
            found.rejected[split] = {
                entry["key"]: (entry["source_size"], entry["source_sha256"]) for entry in entries
            }
        if name == wids_name(split):
            found.wids[split] = contents.parse_wids(found.out, split, data)


def _against_manifest(found: _Set) -> Iterator[Problem]:
    """Sizes of the shards, and the two lists of their hashes."""
    for name in sorted(found.sums):
        if _is_large(name) and name not in found.sizes:
            yield Problem(name, "missing")
    listed = {f"{shard.name}.tar": shard for shard in found.shards}
    for name, shard in listed.items():
        if name not in found.sizes:
            yield Problem(name, "missing")
        elif found.sizes[name] != shard.num_bytes:
            size = found.sizes[name]
            yield Problem(name, f"its {size:,} bytes should be {shard.num_bytes:,}")
        if found.sums and found.sums.get(name) != shard.sha256:
            yield Problem(SUMS, f"another sha256 of {name} than in {MANIFEST}, or none")
    for name in sorted(found.sums) if found.manifest else ():
        if name.endswith(".tar") and name not in listed:
            yield Problem(SUMS, f"lists {name}, which {MANIFEST} does not")


def _check_split(found: _Set, split: str) -> Iterator[Problem]:
    if split in found.indexes and found.manifest:
        for text in fates.check_index(found.manifest, split, found.indexes[split]):
            yield Problem(index_name(split), text)
        totals = found.manifest.document["totals"][split]
        samples = sum(shard.samples for shard in found.manifest.split_shards(split))
        if not isinstance(totals, dict) or totals.get("samples") != samples:
            yield Problem(MANIFEST, f"its total for {split} is not the sum over its shards")


def _check_sidecars(found: _Set) -> Iterator[Problem]:
    names = {shard.name: f"_meta/{shard.name}.parquet" for shard in found.shards}
    here = [shard for shard in found.shards if names[shard.name] in found.sizes]
    uris = [storage.join(found.out, names[shard.name]) for shard in here]
    yield from (Problem(n, "missing") for n in names.values() if n not in found.sizes)
    try:
        planned = contents.planned_samples(found.out) if found.shards else {}
    except Damaged as damaged:
        yield Problem(damaged.file, damaged.text)
        planned = {}
    read: dict[str, Sidecar] = {}
    indexed = {split: contents.by_shard(index) for split, index in found.indexes.items()}
    for shard, data in zip(here, storage.read_each(uris), strict=True):
        try:
            sidecar = contents.parse_sidecar(found.out, shard.name, data)
        except Damaged as damaged:
            yield Problem(damaged.file, damaged.text)
            continue
        for text in _sidecar_problems(found, shard, sidecar, indexed.get(shard.split)):
            yield Problem(names[shard.name], text)
        fated = sidecar.samples + len(sidecar.rejected)
        if planned.get(shard.name, fated) != fated:
            text = f"{fated:,} pictures stored or rejected, {planned[shard.name]:,} planned"
            yield Problem(f"{shard.name}.tar", text)
        read[shard.name] = replace(sidecar, rows=None)
    if len(read) == len(names):
        yield from _check_derived(found, read)


def _sidecar_problems(
    found: _Set, shard: shards.ShardInfo, sidecar: Sidecar, indexed: dict[str, pa.Table] | None
) -> Iterator[str]:
    said = (sidecar.sha256, sidecar.num_bytes, sidecar.samples)
    if said != (shard.sha256, shard.num_bytes, shard.samples):
        yield f"its sha256, bytes or samples are not those of {MANIFEST}"
    if found.sums.get(f"{shard.name}.idx", sidecar.dali_index_sha256) != sidecar.dali_index_sha256:
        yield f"its sha256 of {shard.name}.idx is not that of {SUMS}"
    if sidecar.rows.num_rows != sidecar.samples:
        yield f"{sidecar.rows.num_rows:,} rows for {sidecar.samples:,} samples"
    if indexed is not None and sidecar.rows != indexed.get(shard.name, shards.INDEX.empty_table()):
        yield f"its rows are not those of {index_name(shard.split)}"


def _check_derived(found: _Set, sidecars: dict[str, Sidecar]) -> Iterator[Problem]:
    """The files of each split that only repeat what the sidecars say."""
    for split in found.splits:
        of_split = {name: s for name, s in sidecars.items() if name.startswith(f"{split}-")}
        keys = sorted(key for sidecar in of_split.values() for key in sidecar.rejected)
        if split in found.rejected and sorted(found.rejected[split]) != keys:
            text = (
                f"lists {len(found.rejected[split]):,} pictures, the sidecars {len(keys):,} others"
            )
            yield Problem(quarantine_name(split), text)
        entries = [
            {"url": f"{name}.tar", "md5sum": s.md5, "nsamples": s.samples, "filesize": s.num_bytes}
            for name, s in of_split.items()
        ]
        if found.wids.get(split, entries) != entries:
            yield Problem(wids_name(split), "its shards are not those of the sidecars")


def _quarantine_sizes(found: _Set) -> Iterator[Problem]:
    for name, (size, digest) in _quarantined(found).items():
        if found.sums and found.sums.get(name) != digest:
            yield Problem(SUMS, f"another sha256 of {name} than in its list, or none")
        elif found.sizes.get(name, size) != size:
            yield Problem(name, f"its {found.sizes[name]:,} bytes should be {size:,}")


def _unlisted(found: _Set) -> Iterator[str]:
    known = {SUMS, MANIFEST, *found.sums, *(f"{shard.name}.tar" for shard in found.shards)}
    known |= {name(split) for split in found.splits for name in (index_name, quarantine_name)}
    strange = [n for n in sorted(found.sizes.keys() - known) if not n.startswith(_UNLISTED)]
    if strange and found.sums:
        shown = ", ".join(strange[:_SHOWN]) + (", …" if len(strange) > _SHOWN else "")
        yield f"{len(strange):,} files that {SUMS} does not list: {shown}"


def _jobs(found: _Set) -> list[audit.Job]:
    """Tars and quarantined files; what is known to be missing or of another size is left out."""
    listed = {f"{shard.name}.tar": shard for shard in found.shards}
    jobs = []
    for name, shard in listed.items():
        if found.sizes.get(name) == shard.num_bytes:
            index, places = found.indexes.get(shard.split), found.sums.get(f"{shard.name}.idx")
            jobs.append(audit.Job(name, shard.num_bytes, shard.sha256, index, places))
    sizes = {name: size for name, (size, _) in _quarantined(found).items()}
    for name, digest in sorted(found.sums.items()):
        size = found.sizes.get(name)
        if size is None or name in listed or not _is_large(name):
            continue
        if sizes.get(name, size) == size:
            jobs.append(audit.Job(name, size, digest))
    return jobs


def _quarantined(found: _Set) -> dict[str, tuple[int, str]]:
    """File → bytes and sha256."""
    return {
        f"quarantine/{split}/{key}.bin": known
        for split, rejected in found.rejected.items()
        for key, known in rejected.items()
    }


def _check_fates(found: _Set, raw: str | None) -> Iterator[Problem]:
    indexes = {name: table for name, table in found.indexes.items() if name in found.rejected}
    try:
        yield from fates.against_plan(contents.planned(found.out), indexes, found.rejected)
        if raw is not None:
            told = found.manifest.document.get("entries", {}) if found.manifest else {}
            left_out = told.get("left_out", {})
            yield from fates.against_raw(raw, found.out, indexes, found.rejected, left_out)
    except Damaged as damaged:
        yield Problem(damaged.file, damaged.text)
