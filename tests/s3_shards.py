"""A shard set in the tests' S3 store, what was fetched of it, and what is cached."""

import contextlib
import hashlib
from pathlib import Path

import pytest
from shard_sets import write_shard_set

from pipelines import storage
from pipelines.shards import Manifest, ShardInfo, load_manifest


def uploaded(folder: Path, uri: str, seed: int = 0) -> tuple[Path, str, Manifest]:
    """A new set of 5, 4 and 6 train images in `folder`, and at `uri` in the place of an older
    one."""
    write_shard_set(folder, train=(5, 4, 6), val=(3,), seed=seed)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write(f"{uri}/{path.relative_to(folder)}", path.read_bytes())
    return folder, uri, load_manifest(uri)


def counted_downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards fetched from the store from now on, in order."""
    fetched: list[str] = []
    read = storage.read

    def counting(uri: str, *args: int) -> bytes:
        if uri.endswith(".tar"):
            fetched.append(uri.rsplit("/", 1)[1])
        return read(uri, *args)

    monkeypatch.setattr(storage, "read", counting)
    return fetched


def cached(home: Path, manifest: Manifest) -> dict[str, int]:
    """Bytes of each cached shard by name. Every file there must be what it is called.

    A loader that is still open lets go of shards from a thread: a file may go while this looks.
    """
    names = {info.sha256: info.name for info in manifest.shards}
    found = {}
    for path in (home / "cache").glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):
            content = path.read_bytes()
            assert hashlib.sha256(content).hexdigest() == path.stem
            found[names[path.stem]] = len(content)
    return found


def info_of(manifest: Manifest, name: str) -> ShardInfo:
    return next(info for info in manifest.shards if info.name == name)
