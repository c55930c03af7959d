"""RAW, in any layout known here, as one table: where each picture lies and what its label is."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from alexnet.errors import UserError
from pipelines import storage
from pipelines.sources import folders, huggingface, ilsvrc, kaggle, own_shards, table
from pipelines.sources.table import SPLITS, TABLE, UNLABELLED, Shuffle, Source, StoredAs

__all__ = ["SPLITS", "TABLE", "UNLABELLED", "Shuffle", "Source", "StoredAs", "scan"]

_REQUESTS = 16  # at a time
_LAYOUTS = {
    "ILSVRC archives": ilsvrc,
    "class folders": folders,
    "the Kaggle layout": kaggle,
    "Hugging Face parquet files": huggingface,
    "shards made by this program": own_shards,
}
_EXPECTED = (
    "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz (or those "
    "of ILSVRC2010), folders train/WNID/ and val/WNID/, Kaggle's ILSVRC/Data/CLS-LOC/, "
    "train-*.parquet, or a finished shard set"
)


def scan(raw: str, splits: Sequence[str], partial: bool = False) -> Source:
    """Recognise the layout of `raw`, find every picture of `splits` and label it.

    Raises UserError when the layout is unknown, ambiguous or incomplete, when an archive is
    damaged, when two sources of a label contradict each other, and, unless `partial`, when there
    are fewer or more pictures than the devkit, the lists or the published archives announce.
    """
    files = dict(storage.list_files(raw))
    if not files:
        raise UserError(
            f"{raw}: there is no folder with files of that name; --raw wants the folder or s3:// "
            "prefix that holds the raw data"
        )
    for name in files:
        if not name.isascii() and not _is_text(name):
            raise UserError(f"{raw}: the name of {name} is no UTF-8; rename it")
    found = {name: module for name, module in _LAYOUTS.items() if module.recognises(files)}
    if len(found) > 1:
        raise UserError(
            f"{raw} is ambiguous: it holds {' and also '.join(found)}; give each its own folder"
        )
    if not found:
        tops = ", ".join(sorted({name.split("/", 1)[0] for name in files})[:5])
        raise UserError(f"{raw}: no known layout; expected {_EXPECTED}; found {tops}")
    (module,) = found.values()
    archives = _versions(raw, [name for name in files if name.endswith(".tar")])
    source: Source = module.scan(raw, files, splits, partial)
    table.check(raw, source.table)
    return replace(source, archives=archives)


def _versions(raw: str, names: list[str]) -> dict[str, str]:
    """Taken before the look into them, so that no change goes unseen."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        found = pool.map(storage.version, [storage.join(raw, name) for name in names])
        return dict(zip(names, found, strict=True))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
