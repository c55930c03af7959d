"""What is built under attack: raw sets, the same built undisturbed, and what must hold."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from drawn import A, B, C, archives, imagefolder, jpeg
from made import contents
from mortal import Life, lived

CUT = (f"train/{A}/{A}_train3.JPEG", f"val/{B}/{B}_val1.JPEG")
EMPTY = f"train/{C}/{C}_train0.JPEG"


@dataclass(frozen=True)
class Undisturbed:
    """A raw set, the flags it is built with, and how that goes when nobody disturbs it."""

    raw: Path
    flags: list[str]
    out: Path
    seconds: float  # of the build's life
    files: dict[str, bytes] = field(repr=False)  # of `out`, as `contents` has them

    def argv(self, out: Path, raw: Path | None = None) -> list[str]:
        return ["build", "--raw", str(raw or self.raw), "--out", str(out), *self.flags]

    def start(self, out: Path, *more: str, raw: Path | None = None, **how: Any) -> Life:
        return Life("pipelines", argv=[*self.argv(out, raw), *more], **how)

    def finish(self, out: Path, *more: str) -> None:
        """The same command once more, undisturbed: the same bytes, and no litter."""
        life = self.start(out, *more)
        assert life.end() == 0, life.errors
        self.check_whole(out)

    def check_published(self, out: Path) -> None:
        """Whatever has its name already is whole, and what it has to be; nothing else is there."""
        for name, data in contents(str(out)).items():
            assert data == self.files.get(name), f"{name} is partial, wrong or a stranger"

    def check_whole(self, out: Path) -> None:
        assert contents(str(out)).keys() == self.files.keys()
        self.check_published(out)
        assert unfinished(out) == []


def unfinished(folder: Path) -> list[str]:
    """Files of writers that did not end."""
    return sorted(str(path) for path in folder.rglob(".*.tmp"))


def check_refused(life: Life) -> None:
    """In one line, and no more than that."""
    life.check_refused()
    assert len(life.errors.splitlines()) == 1, life.errors


def undisturbed(raw: Path, out: Path, flags: list[str]) -> Undisturbed:
    argv = ["build", "--raw", str(raw), *flags, "--out"]
    for place in (f"{out}-first", str(out)):  # the first is a little slower than all later ones
        started = time.monotonic()
        life = lived("pipelines", argv=[*argv, place])
        assert life.status == 0, life.errors
    seconds = time.monotonic() - started
    return Undisturbed(raw, flags, out, seconds, contents(str(out)))


def images() -> dict[str, bytes]:
    """Three classes, 24 images, of which three are no images."""
    drawn = {
        f"{split}/{wnid}/{wnid}_{split}{n}.JPEG": jpeg(100 * k + 10 * count + n)
        for split, count in (("train", 6), ("val", 2))
        for k, wnid in enumerate((A, B, C))
        for n in range(count)
    }
    return drawn | {name: drawn[name][:300] for name in CUT} | {EMPTY: b""}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Class folders: seven shards, three images in quarantine."""
    root = tmp_path_factory.mktemp("folders")
    flags = ["--samples-per-shard", "4", "--max-rejected", "3"]
    return undisturbed(imagefolder(root / "raw", images()), root / "out", flags)


@pytest.fixture(scope="session")
def mended(folders: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The same folders, the two cut images whole."""
    root = tmp_path_factory.mktemp("mended")
    raw = imagefolder(root / "raw", images() | dict.fromkeys(CUT, jpeg(999)))
    return undisturbed(raw, root / "out", folders.flags)


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """ILSVRC archives, of which the index is kept in $ALEXNET_HOME."""
    root = tmp_path_factory.mktemp("tars")
    raw = archives(root / "raw")
    return undisturbed(raw, root / "out", ["--samples-per-shard", "2"])
