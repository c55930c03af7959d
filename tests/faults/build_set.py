"""What is built under attack: a raw set, the same built undisturbed, and what must hold."""

import hashlib
import json
import random
import tarfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from build_lives import Life, Lives
from drawn import A, B, C, jpeg
from made import contents

TRAIN, VAL = 6, 2  # images of each class
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

    def check_published(self, out: Path) -> None:
        """Whatever has its name already is whole, and what it has to be; nothing else is there."""
        for name, data in contents(str(out)).items():
            assert data == self.files.get(name), f"{name} is partial, wrong or a stranger"

    def check_whole(self, out: Path) -> None:
        """The same bytes as undisturbed, and no litter."""
        found = contents(str(out))
        assert found.keys() == self.files.keys()
        self.check_published(out)
        assert unfinished(out) == []
        if (self.raw / "train").is_dir():
            check_fates(self.raw, out)


def check_fates(raw: Path, out: Path) -> None:
    """By Python's own tarfile: each image of a RAW of class folders has one fate, its own class
    and its own source."""
    wnids = sorted({path.parent.name for path in raw.glob("train/*/*")})
    fates: Counter[tuple[str, int, str]] = Counter()
    for shard in out.glob("*.tar"):
        with tarfile.open(shard) as tar:
            members = {member.name: member for member in tar.getmembers()}
            assert len(members) == len(tar.getmembers())
            for name in members:
                if name.endswith(".jpg"):
                    key = name.removesuffix(".jpg")
                    label = int(tar.extractfile(members[f"{key}.cls"]).read())
                    facts = json.load(tar.extractfile(members[f"{key}.json"]))
                    fates[key, label, facts["source_sha256"]] += 1
    for path in out.glob("quarantine/*/*.bin"):
        key, digest = path.stem, hashlib.sha256(path.read_bytes()).hexdigest()
        fates[key, wnids.index(key.partition("_")[0]), digest] += 1
    images = [path for path in raw.glob("*/*/*") if path.is_file()]
    truth = Counter(
        (path.stem, wnids.index(path.parent.name), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in images
    )
    assert fates == truth
    assert set(truth.values()) == {1}


def unfinished(folder: Path) -> list[str]:
    """Files of writers that did not end."""
    return sorted(str(path) for path in folder.rglob(".*.tmp"))


def images() -> dict[str, bytes]:
    """Three classes, 24 images, of which three are no images."""
    drawn = {
        f"{split}/{wnid}/{wnid}_{split}{n}.JPEG": jpeg(100 * k + 10 * count + n)
        for split, count in (("train", TRAIN), ("val", VAL))
        for k, wnid in enumerate((A, B, C))
        for n in range(count)
    }
    return drawn | {name: drawn[name][:300] for name in CUT} | {EMPTY: b""}


def damage(out: Path, draw: random.Random) -> dict[str, bytes]:
    """Flips a bit of one to three files of a finished set, and returns what they are then. Of
    sidecars in their first page: headers and footers of parquet files have no checksum, and no sum
    of these files is kept."""
    names = [name for name in contents(str(out)) if not name.startswith(("_meta/plan", "report/"))]
    found = {}
    for name in draw.sample(names, draw.randint(1, 3)):
        data = bytearray((out / name).read_bytes())
        if data:
            place = 30 if name.startswith("_meta/") else draw.randrange(len(data))
            data[place] ^= 1 << draw.randrange(8)
        found[name] = bytes(data)
        (out / name).write_bytes(data)
    return found


def undisturbed(lives: Lives, raw: Path, out: Path, flags: list[str]) -> Undisturbed:
    argv = ["build", "--raw", str(raw), *flags, "--out"]
    lives.run(*argv, str(out) + "-first")  # a little slower than all later ones
    started = time.monotonic()
    lives.run(*argv, str(out))
    return Undisturbed(raw, flags, out, time.monotonic() - started, contents(str(out)))


def one_line(life: Life, start: str | tuple[str, ...]) -> None:
    """What a command says on stderr that could not go on."""
    lines = life.errors.splitlines()
    assert len(lines) == 1 and lines[0].startswith(start), life.errors
