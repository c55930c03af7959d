"""RAW counted once more, by other code than that which reads it for a build: os.walk, tarfile,
parquet's footers and rules of its own. What the build overlooked would be overlooked again there.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.sources import Source

_SPLITS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation"},
    "test": {"test", "testing"},
}
_FOREIGN_FOLDERS = {
    *("__macosx", "lost+found", "@eadir", "#recycle", "$recycle.bin"),
    "system volume information",
}
_FOREIGN = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"}
_TEXTS = (
    ".txt .text .md .rst .rtf .pdf .doc .docx .xls .xlsx .odt .csv .tsv .json .jsonl .xml .yml "
    ".yaml .toml .ini .cfg .log .htm .html .css .js .url .lnk .py .ipynb .sh .bat .mat .npy .npz "
    ".pkl .pickle .pt .pth .h5 .md5 .sha1 .sha256"
)
_TITLES = {"readme", "license", "licence", "copying", "notice", "changelog"}
_TITLES |= {"md5sum", "md5sums"} | {f"sha{bits}sums" for bits in (1, 224, 256, 384, 512)}


def unaccounted(
    source: Source, splits: Collection[str], left_out: Collection[str]
) -> Iterator[tuple[str, str]]:
    """(split, what is wrong) where RAW has other images of the splits than `source` found.

    left_out: names of entries that a partial set tells. Archives in a store are not counted: that
    would read them through.
    """
    for split in splits:
        found = source.count(split)
        if source.layout in ("imagefolder", "kaggle"):
            rows = source.table.filter(pc.equal(source.table["split"], split))
            known = {*rows["source"].to_pylist(), *left_out}
            missing = sorted({*_files(source, split)} - known)
            if missing:
                yield split, f"{len(missing):,} entries without an account (first {missing[0]})"
        elif not storage.is_s3(source.raw) and (counted := _counted(source, split)) != found:
            yield split, f"{counted:,} images counted, {found:,} found"


def _files(source: Source, split: str) -> Iterator[str]:
    """What may be an image, or ought to hold some, below the folders of the split."""
    below = "ILSVRC/Data/CLS-LOC" if source.layout == "kaggle" else ""
    if storage.is_s3(source.raw):
        names = [n for n, _ in storage.list_files(source.raw) if n.startswith(below)]
        unsplit = _are_unsplit(Path(name).relative_to(below).parts[0] for name in names)
        for name in names:
            parts = Path(name).relative_to(below).parts
            foreign = any(_is_foreign_folder(part) for part in parts[:-1])
            if (unsplit or parts[0].lower() in _SPLITS[split]) and not foreign:
                yield from [name] * (not _is_foreign(parts[-1]))
        return
    root = Path(source.raw)
    top = root / below
    tops = sorted(entry.name for entry in top.iterdir())
    if _are_unsplit(tops):
        yield from (str(path.relative_to(root)) for path in _walk(top))
    for folder in tops:
        if folder.lower() in _SPLITS[split]:
            yield from (str(path.relative_to(root)) for path in _walk(top / folder))


def _are_unsplit(tops: Iterable[str]) -> bool:
    return not {top.lower() for top in tops} & set().union(*_SPLITS.values())


def _walk(top: Path) -> Iterator[Path]:
    failed: list[Path] = []
    for place, folders, files in os.walk(
        top, onerror=lambda error: failed.append(Path(str(error.filename))), followlinks=True
    ):
        here = Path(place)
        for name in list(folders):
            loops = (here / name).resolve() in [p.resolve() for p in (here / name).parents]
            if loops:
                yield here / name
            if loops or _is_foreign_folder(name):
                folders.remove(name)
        if not folders and not files and here.parent == top:
            yield here
        yield from (here / name for name in files if not _is_foreign(name))
    yield from failed


def _is_foreign_folder(name: str) -> bool:
    return name.startswith(".") or name.lower() in _FOREIGN_FOLDERS


def _is_foreign(name: str) -> bool:
    """A file that is no image by its name."""
    low = name.lower()
    if low.startswith(".") or low.endswith("~") or low in _FOREIGN or low in _TITLES:
        return True
    return low.endswith(tuple(_TEXTS.split()))


def _counted(source: Source, split: str) -> int:
    """The images of a split in archives, parquet files or shards on a disk."""
    names = [name for name, _ in source.containers]
    if source.layout == "huggingface":
        own = [name for name in names if name.rpartition("/")[2].startswith(split)]
        return sum(pq.read_metadata(Path(source.raw, name)).num_rows for name in own)
    if source.layout in ("shards", "webdataset"):
        own = [n for n in names if {*re.split(r"[-_.\d]+", n.lower())} & _SPLITS[split]]
        images = (".jpg", ".jpeg", ".png", ".webp")
        return sum(_members(Path(source.raw, name), images) for name in own)
    own = [name for name in names if re.search(rf"_{split}[_.]", name)]
    return sum(_members(Path(source.raw, name)) for name in own)


def _members(path: Path, endings: tuple[str, ...] = ("",)) -> int:
    """The files of a tar, or of the tars in it, but those that desktop systems leave."""
    count = 0
    with tarfile.open(path, "r:") as outer:
        for member in outer:
            if not member.isfile() or _is_litter(member.name):
                continue
            if not member.name.lower().endswith(endings):
                continue
            file = outer.extractfile(member) if member.name.endswith(".tar") else None
            if file is None:
                count += 1
                continue
            with tarfile.open(fileobj=file, mode="r:") as inner:
                count += sum(each.isfile() and not _is_litter(each.name) for each in inner)
    return count


def _is_litter(name: str) -> bool:
    parts = name.lower().split("/")
    return (
        parts[-1].startswith("._") or parts[-1] in _FOREIGN | {".ds_store"} or "__macosx" in parts
    )
