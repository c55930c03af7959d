"""Is a shard set what its manifest says? Needs only OUT.

Fast: one listing, the hashes of everything but tars and quarantined files, whose sizes are looked
at; sidecars, index, manifest and SHA256SUMS against each other, by columns, since ImageNet has 1.28
million rows. `full` reads every byte the way a stranger would: the tars are taken apart with
Python's tar header and the images decoded by libjpeg-turbo with its warnings as errors; neither
wrote them. `raw` looks into RAW again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import plan, plan_files, shards, sidecars, storage
from pipelines.progress import Pace, clock
from pipelines.shards import Damaged, Manifest, ShardInfo, index_name, quarantine_name
from pipelines.sources import UNLABELLED
from pipelines.strict_read import Job, ReadAll, in_threads

Say = Callable[[str], None]

_MANIFEST, _SUMS = "manifest.json", "SHA256SUMS"
_UNLISTED = ("README.md", "report/", "_meta/")  # made later, or by and for the builder
_SAY_EVERY = 5.0  # seconds
_SHOWN = 5  # names in a note


@dataclass(frozen=True)
class Problem:
    file: str  # relative to OUT
    text: str  # one line


@dataclass(frozen=True)
class Findings:
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]  # what a person should know and what is no fault
    checked: str  # in words

    @property
    def bad_files(self) -> tuple[str, ...]:
        """Sorted names relative to OUT."""
        return tuple(sorted({problem.file for problem in self.problems}))


@dataclass
class _Set:
    """OUT as far as it can be read, and what is wrong with it."""

    out: str
    sizes: dict[str, int]
    sums: dict[str, str] = field(default_factory=dict)
    manifest: Manifest | None = None
    indexes: dict[str, pa.Table] = field(default_factory=dict)  # whole ones, by split
    # By split: key → bytes and sha256 of the raw file
    rejected: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        return self.manifest.shards if self.manifest else ()

    @property
    def splits(self) -> list[str]:
        return self.manifest.splits if self.manifest else []

    @property
    def quarantined(self) -> dict[str, tuple[int, str]]:
        """File → bytes and sha256."""
        return {
            shards.rejected_name(split, key): known
            for split, rejected in self.rejected.items()
            for key, known in rejected.items()
        }

    def wrong(self, file: str, text: str) -> None:
        self.problems.append(Problem(file, shards.one_line(text)))

    @contextlib.contextmanager
    def damage_reported(self) -> Iterator[None]:
        try:
            yield
        except Damaged as damaged:
            self.wrong(damaged.file, damaged.text)


def verify(
    out: str,
    *,
    full: bool = False,
    raw: str | None = None,
    say: Say = lambda line: None,
    read: ReadAll = in_threads,
) -> Findings:
    """Everything that is wrong with the finished set in `out`.

    `full` also hashes the shards, decodes their images strictly and compares each sample with index
    and plan, telling `say` how far it is; `read` says where. With `raw`, the images there are
    counted and their labels compared.
    Raises UserError when there is no finished set, or a store or RAW cannot be read.
    """
    found = _opened(out)
    hashed = _hash_small_files(found)
    _check_sizes(found)
    for split in found.indexes:
        _check_index(found, split)
    _check_sidecars(found)
    checked = f"{len(found.shards):,} shards, {hashed:,} files hashed, the others by size"
    if full:
        files, images = _read_large_files(found, say, read)
        checked = f"{hashed + files:,} files hashed, {images:,} images decoded"
    with found.damage_reported():
        if full or raw is not None:
            _check_accounts(found, plan_files.load_rows(out, ("split", "key", "wnid")), "planned")
        if raw is not None:
            _check_raw(found, raw)
    return Findings(tuple(dict.fromkeys(found.problems)), _notes(found), checked)


def _opened(out: str) -> _Set:
    found = _Set(out, dict(storage.list_files(out)))
    with found.damage_reported():
        found.manifest = shards.load_manifest(out)
    if _SUMS not in found.sizes:
        found.wrong(_SUMS, "missing")
        return found
    text = storage.read(storage.join(out, _SUMS)).decode("utf-8", "replace")
    for number, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64})  ([\x21-\x7e]+)", line)
        if match is None:
            found.wrong(_SUMS, f"line {number} is no sha256 and file name")
        elif match[2] in found.sums:
            found.wrong(_SUMS, f"line {number} names {match[2]} again")
        else:
            found.sums[match[2]] = match[1]
    digest = found.manifest.digest if found.manifest else None
    if found.sums.get(_MANIFEST, digest) != digest:
        found.manifest = None  # its hash is a problem; what it says of other files proves nothing
    return found


def _hash_small_files(found: _Set) -> int:
    """How many were hashed; the tables among those that are whole are kept."""
    indexes = {
        name: split
        for split in found.splits
        for name in {index_name(split), *filter(_part_of(split), found.sums)}
    }
    parts: dict[str, dict[str, pa.Table]] = {split: {} for split in found.splits}
    counts: dict[str, int] = {}
    lists = {quarantine_name(split): split for split in found.splits}
    names = {n for n in (_MANIFEST, *found.sums, *indexes, *lists) if not _is_large(n)}
    for name in sorted(names - found.sizes.keys()):
        found.wrong(name, "missing")
    here = sorted(names & found.sizes.keys())
    uris = [storage.join(found.out, name) for name in here]
    for name, data in zip(here, storage.read_each(uris), strict=True):
        expected = found.sums.get(name)
        if expected is not None and hashlib.sha256(data).hexdigest() != expected:
            found.wrong(name, f"its {len(data):,} bytes have another sha256")
            continue
        if expected is None and found.sums:
            found.wrong(_SUMS, f"lacks {name}")
        with found.damage_reported():
            if split := indexes.get(name):
                parts[split][name], count = shards.parse_index(found.out, name, data)
                counts[split] = max(counts.get(split, 1), count)
            if split := lists.get(name):
                entries = shards.parse_quarantine(found.out, split, data)
                found.rejected[split] = {
                    entry["key"]: (entry["source_size"], entry["source_sha256"])
                    for entry in entries
                }
    for split, read in parts.items():
        wanted = [index_name(split, number) for number in range(counts.get(split, 1))]
        if read.keys() == {*wanted}:
            found.indexes[split] = pa.concat_tables([read[name] for name in wanted])
        elif strangers := read.keys() - {*wanted}:
            found.wrong(min(strangers), "no part of the index, by its first file")
    return len(here)


def _part_of(split: str) -> Callable[[str], bool]:
    """Whether a file is of the index of this split, as far as its name tells."""
    return lambda name: re.fullmatch(rf"index/{split}-[0-9]+\.parquet", name) is not None


def _is_large(name: str) -> bool:
    return name.endswith(".tar") or (name.startswith("quarantine/") and name.endswith(".bin"))


def _check_sizes(found: _Set) -> None:
    """Of tars and quarantined files, whose hashes are in two lists."""
    tars = {f"{shard.name}.tar": (shard.num_bytes, shard.sha256) for shard in found.shards}
    for name, (size, digest) in (tars | found.quarantined).items():
        if name in found.sizes and found.sizes[name] != size:
            found.wrong(name, f"its {found.sizes[name]:,} bytes should be {size:,}")
        if found.sums and found.sums.get(name) != digest:
            found.wrong(_SUMS, f"another sha256 of {name} than in the set's own lists, or none")
    for name in sorted({*tars, *filter(_is_large, found.sums)}):
        if name not in found.sizes:
            found.wrong(name, "missing")
        if found.manifest and name.endswith(".tar") and name not in tars:
            found.wrong(_SUMS, f"lists {name}, which {_MANIFEST} does not")


def _check_index(found: _Set, split: str) -> None:
    """Against the manifest, and against itself."""
    manifest = found.manifest
    assert manifest is not None, "it tells which indexes there are"
    totals = manifest.document["totals"][split]
    if not isinstance(totals, dict) or totals.get("samples") != manifest.num_samples(split):
        found.wrong(_MANIFEST, f"its total for {split} is not the sum over its shards")
    index, wrong = found.indexes[split], functools.partial(found.wrong, index_name(split))
    counts = {row["values"]: row["counts"] for row in pc.value_counts(index["shard"]).to_pylist()}
    for shard in manifest.split_shards(split):
        if (rows := counts.pop(shard.name, 0)) != shard.samples:
            wrong(
                f"other number of rows for {shard.name}, {rows}, than its {shard.samples} samples"
            )
    if counts:
        wrong(f"rows of shards that the manifest lacks: {', '.join(sorted(counts))}")
    places = index.select(["shard", "offset"])
    if places != places.sort_by([("shard", "ascending"), ("offset", "ascending")]):
        wrong("rows are not in the order of shard and position")
    if pc.count_distinct(index["key"]).as_py() != index.num_rows:
        wrong("a key appears twice")
    ranks = dict(zip(manifest.wnids, itertools.count()))
    if split == "test":
        ranks[""] = UNLABELLED
    pairs = index.group_by(["wnid", "label"], use_threads=False).aggregate([])
    for row in pairs.sort_by([("wnid", "ascending"), ("label", "ascending")]).to_pylist():
        if (known := ranks.get(row["wnid"], "nothing of it")) != row["label"]:
            wrong(f"{row['wnid']!r} has label {row['label']}, the manifest says {known}")


def _check_sidecars(found: _Set) -> None:
    """One for each shard, in agreement with manifest, index, plan and quarantine list."""
    names = {shard: f"_meta/{shard.name}.parquet" for shard in found.shards}
    for name in sorted(names.values() - found.sizes.keys()):
        found.wrong(name, "missing")
    planned: dict[str, int] = {}
    if found.shards:
        with found.damage_reported():
            planned = {s.name: s.samples for s in plan_files.load(found.out).shards}
    here = [shard for shard, name in names.items() if name in found.sizes]
    uris = [storage.join(found.out, names[shard]) for shard in here]
    indexed = {split: _by_shard(index) for split, index in found.indexes.items()}
    rejected: dict[str, set[str]] = {split: set() for split in found.splits}
    read = 0
    for shard, data in zip(here, storage.read_each(uris), strict=True):
        try:
            rows, status = sidecars.unpack(data)
        except ValueError as error:
            found.wrong(names[shard], f"damaged ({error})")
            continue
        read += 1
        said = (status["sha256"], status["bytes"], status["samples"])
        if said != (shard.sha256, shard.num_bytes, shard.samples):
            found.wrong(names[shard], f"its sha256, bytes or samples are not those of {_MANIFEST}")
        of_split = indexed.get(shard.split)
        if of_split is not None and rows != of_split.get(shard.name, rows.slice(0, 0)):
            found.wrong(names[shard], f"its rows are not those of {index_name(shard.split)}")
        accounted = status["samples"] + len(status["rejected"])
        if (wanted := planned.get(shard.name, accounted)) != accounted:
            text = f"{accounted:,} images stored or rejected, {wanted:,} planned"
            found.wrong(f"{shard.name}.tar", text)
        rejected.setdefault(shard.split, set()).update(e["key"] for e in status["rejected"])
    for split in found.rejected if read == len(names) else ():
        if found.rejected[split].keys() != rejected[split]:
            text = f"lists {len(found.rejected[split]):,} images, the sidecars other ones"
            found.wrong(quarantine_name(split), text)


def _by_shard(table: pa.Table) -> dict[str, pa.Table]:
    """Rows of each shard in their order: one look at the table, not one for each shard."""
    shard = table["shard"].combine_chunks().dictionary_encode()
    numbers = shard.indices.to_numpy()
    order = np.argsort(numbers, kind="stable")
    table = table if (np.diff(numbers) >= 0).all() else table.take(order)
    cuts = np.searchsorted(numbers[order], np.arange(len(shard.dictionary) + 1)).tolist()
    return {
        name: table.slice(cuts[n], cuts[n + 1] - cuts[n])
        for n, name in enumerate(shard.dictionary.to_pylist())
    }


def _notes(found: _Set) -> tuple[str, ...]:
    known = {_SUMS, _MANIFEST, *found.sums, *(f"{shard.name}.tar" for shard in found.shards)}
    known |= {name(split) for split in found.splits for name in (index_name, quarantine_name)}
    strange = [n for n in sorted(found.sizes.keys() - known) if not n.startswith(_UNLISTED)]
    shown = ", ".join(strange[:_SHOWN]) + ", …" * (len(strange) > _SHOWN)
    note = f"{len(strange):,} files that {_SUMS} does not list: {shown}"
    return (note,) if strange and found.sums else ()


def _check_accounts(found: _Set, truth: pa.Table, where: str) -> None:
    """In = out + quarantined, and each image in its class. truth: with columns split, key, wnid."""
    for split in [split for split in found.indexes if split in found.rejected]:
        index, rows = found.indexes[split], truth.filter(pc.equal(truth["split"], split))
        stored, wanted = (table["key"].combine_chunks() for table in (index, rows))
        refused = pa.array(list(found.rejected[split]), pa.string())
        lost = _without(wanted, pa.concat_arrays([stored, refused]))
        for keys, file, text in (
            (lost, index_name, f"{where}, but neither stored nor in quarantine"),
            (_without(stored, wanted), index_name, f"stored, but not {where}"),
            (_without(refused, wanted), quarantine_name, f"in quarantine, but not {where}"),
            (_without(refused, _without(refused, stored)), quarantine_name, "stored as well"),
        ):
            if len(keys):
                what = f"{len(keys):,} image{'s' * (len(keys) > 1)} (first {pc.min(keys).as_py()})"
                found.wrong(file(split), f"{what} {text}")
        there = rows["wnid"].combine_chunks().take(pc.index_in(stored, value_set=wanted))
        other = index.append_column("there", there)
        other = other.filter(pc.not_equal(other["wnid"], there))  # null, so no, if it is not there
        wrong = _by_shard(other) if where == "planned" else {"": other}
        for shard, part in wrong.items():
            if part.num_rows:
                key, here, said = (
                    part[name][0].as_py() or "unlabelled" for name in ("key", "wnid", "there")
                )
                found.wrong(
                    f"{shard}.tar" if shard else index_name(split),
                    f"{len(part):,} sample{'s' * (len(part) > 1)} with another class, first {key}: "
                    f"{here} here, {said} {where}",
                )


def _without(keys: pa.Array, others: pa.Array) -> pa.Array:
    return keys.filter(pc.invert(pc.is_in(keys, value_set=others)))


def _check_raw(found: _Set, raw: str) -> None:
    """What is in RAW now, found as for a build, and counted by other code."""
    from pipelines import recount, sources

    recipe = plan_files.load(found.out).recipe
    splits = [split for split in found.splits if split in recipe.raw_splits]
    source = sources.scan(storage.absolute(raw), splits, partial=True)
    entries = found.manifest.document.get("entries", {}) if found.manifest else {}
    for split, text in recount.unaccounted(source, splits, entries.get("left_out", {})):
        found.wrong(index_name(split), f"{text} in {raw}")
    _check_accounts(found, plan.chosen(source, recipe).table, f"in {raw}")


def _jobs(found: _Set) -> list[Job]:
    """What is known to be missing or of another size is left out."""
    jobs = {}
    indexed = {split: _by_shard(index) for split, index in found.indexes.items()}
    for shard in found.shards:
        rows = indexed.get(shard.split, {}).get(shard.name)
        if rows is None and shard.split in indexed:
            rows = shards.INDEX.empty_table()
        name = f"{shard.name}.tar"
        jobs[name] = Job(name, shard.num_bytes, shard.sha256, rows)
    for name in sorted(filter(_is_large, found.sums.keys() - jobs.keys())):
        size, _ = found.quarantined.get(name, (found.sizes.get(name, 0), ""))
        jobs[name] = Job(name, size, found.sums[name])
    return [job for job in jobs.values() if found.sizes.get(job.file) == job.size]


def _read_large_files(found: _Set, say: Say, read: ReadAll) -> tuple[int, int]:
    """How many files were read, and how many images decoded."""
    jobs = _jobs(found)
    crop = found.manifest.crop if found.manifest else 0
    pace, total, ended, num_bytes = Pace(0), sum(job.size for job in jobs), 0, 0
    said, problems = time.monotonic(), dict[str, list[str]]()
    with contextlib.closing(read(found.out, jobs, crop)) as answers:
        for job, problems[job.file] in answers:
            ended, num_bytes = ended + 1, num_bytes + job.size
            if time.monotonic() - said >= _SAY_EVERY and ended < len(jobs):
                said = time.monotonic()
                pace.note(num_bytes)
                say(
                    f"verified {ended:,} of {len(jobs):,} files, "
                    f"{num_bytes / 1e6:,.0f} of {total / 1e6:,.0f} MB, "
                    f"{pace.rates()[0] / 1e6:,.1f} MB/s, ETA {clock(pace.eta(total))}"
                )
    for job in jobs:
        for text in problems[job.file]:
            found.wrong(job.file, text)
    return len(jobs), sum(job.rows.num_rows for job in jobs if job.rows is not None)
