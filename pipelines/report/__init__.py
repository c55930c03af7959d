"""OUT/report/index.html: what was built, to look at. One page that loads nothing from elsewhere.

Its size and the time it takes do not grow with the number of pictures beyond reading the index:
everything is counted by columns, and pictures are shown up to a limit that is told.
"""

from __future__ import annotations

from pipelines import entries, journal, shards, storage
from pipelines.journal import Journal
from pipelines.report import counts, pace, pictures, quarantine
from pipelines.report.page import (
    NOTHING,
    Section,
    escape,
    facts,
    figures,
    folded,
    in_bytes,
    note,
    page,
    share,
    table,
)
from pipelines.sources import SPLITS, UNLABELLED

_JOURNALS = 50
_VERIFY = """<pre>sha256sum --check SHA256SUMS</pre>
<p>in the set's folder tells whether every file is as it was written. That these are the files of
the data set named above is told by</p><pre>sha256sum manifest.json</pre>"""


def report(out: str) -> str:
    """Write the page and return its place. Raises UserError where there is no finished set."""
    manifest = shards.load_manifest(out)
    splits = [split for split in SPLITS if split in manifest.document["totals"]]
    indexes = {split: shards.load_index(out, split) for split in splits}
    names = dict(enumerate(map(_name, manifest.wnids, manifest.class_names)))
    names[UNLABELLED] = "unlabelled"
    files = [journal.FOLDER + name for name, _ in storage.list_files(f"{out}/{journal.FOLDER}")]
    journals = journal.load(out, journal.newest(files, _JOURNALS))
    sheets = pictures.contact_sheets(out, manifest, indexes, names)
    sections = [
        Section("totals", "Totals", _totals(manifest, splits)),
        Section("pictures", "Pictures", sheets),
        Section("classes", "Classes", counts.classes(manifest, indexes, names)),
        Section("sizes", "Raw sizes", counts.sizes(manifest, indexes)),
        Section("entries", "Entries of RAW", _entries(manifest)),
        Section("fixes", "Fixes", pictures.fixes(out, indexes)),
        Section("quarantine", "Quarantine", quarantine.quarantine(out, manifest, splits)),
        Section("duplicates", "Duplicates and leaks", counts.repeats(indexes)),
        Section("throughput", "Throughput", pace.pace(journals)),
        Section("made", "Made with", _made_with(manifest)),
        Section("shards", "Shards", _shards(manifest)),
        Section("verify", "Verify without this program", _VERIFY),
    ]
    title = f"Shard set {manifest.plan_id[:12]}"
    location = storage.join(out, "report", "index.html")
    storage.sweep(storage.join(out, "report"))
    storage.write(location, page(title, _lead(title, manifest, journals), sections).encode())
    return location


def _name(wnid: str, name: str) -> str:
    return name if name == wnid else f"{name} ({wnid})"


def _lead(title: str, manifest: shards.Manifest, journals: list[Journal]) -> str:
    document = manifest.document
    totals = list(document["totals"].values())
    samples, rejected, pictures, size = (
        sum(total[name] for total in totals)
        for name in ("samples", "rejected", "pictures", "bytes")
    )
    cards = [
        (f"{samples:,}", "pictures stored"),
        (f"{manifest.num_classes:,}", "classes"),
        (f"{rejected:,}", f"rejected ({share(rejected, pictures)})"),
        (f"{len(manifest.shards):,}", "shards"),
        (in_bytes(size), f"of JPEGs {manifest.crop} × {manifest.crop}"),
    ]
    kind = document["source"]["layout"] + (", partial" if manifest.partial else "")
    rows = [
        ("source", f"{kind}: {document['source']['pictures']:,} pictures"),
        ("pictures", f"shorter side scaled to {manifest.resize}, centre {manifest.crop} × "
         f"{manifest.crop}, JPEG quality {manifest.quality}"),
        ("order", f"{document['ordering']}, seed {manifest.seed}"),
        ("built", pace.when(journals)),
        ("plan", manifest.plan_id),
        ("sha256 of the data set", manifest.digest),
    ]  # fmt: skip
    return f"<header><h1>{escape(title)}</h1>{figures(cards)}{facts(rows)}</header>"


def _totals(manifest: shards.Manifest, splits: list[str]) -> str:
    document = manifest.document
    announced = document["announced"] or {}
    heads = ["split", "announced", "found", "stored", "rejected", "bytes of shards", "labels from"]
    rows = []
    for split in splits:
        total = document["totals"][split]
        counts = [total[name] for name in ("pictures", "samples", "rejected", "bytes")]
        labels_from = document["labels_from"].get(split, NOTHING)
        rows.append([split, announced.get(split, NOTHING), *counts, labels_from])
    return table(heads, rows)


def _entries(manifest: shards.Manifest) -> str:
    """What became of every file and folder that lay in RAW."""
    found = manifest.document.get("entries")
    if found is None:
        return note("Not recorded: this set was planned before entries were counted.")
    rows = [["images", found["images"], "Files that are images by themselves."]]
    rows.append(["used", found["used"], "Archives, lists and devkits that the layout reads."])
    rows += [
        [f"ignored: {r}", n, entries.RULES.get(r, NOTHING)] for r, n in found["ignored"].items()
    ]
    rows.append(["left out", len(found["left_out"]), "By --partial, named below."])
    parts = [table(["entries", "number", "what it means"], rows)]
    for what, named in (
        ("left out", found["left_out"]),
        ("ignored members of archives", found["ignored_members"]),
        ("classes of which no image could be read", manifest.document.get("lost_classes", {})),
    ):
        if named:
            listing = table(["name", "why, or how many"], [list(item) for item in named.items()])
            parts.append(folded(f"{len(named):,} {what}", listing))
    return "".join(parts)


def _made_with(manifest: shards.Manifest) -> str:
    document = manifest.document
    pixels = document["pixels"]
    mean = ", ".join(f"{value:.2f}" for value in manifest.pixels.mean)
    rows = [(name, str(value)) for name, value in sorted(document["versions"].items())]
    rows.append((f"mean RGB of {pixels['split']}", f"{mean} over {pixels['count']:,} pixels"))
    containers = [[name, size] for name, size in document["source"]["containers"]]
    parts = [facts(rows)]
    if containers:
        listing = table(["container", "bytes"], containers)
        parts.append(folded(f"{len(containers):,} containers of raw pictures", listing))
    return "".join(parts)


def _shards(manifest: shards.Manifest) -> str:
    rows = [
        [shard.name, shard.samples, shard.num_bytes, shard.sha256[:16]] for shard in manifest.shards
    ]
    listing = table(["shard", "samples", "bytes", "sha256 begins"], rows)
    return folded(f"{len(rows):,} shards", listing)
