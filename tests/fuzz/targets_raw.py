"""Archives, lists, parquet files and images as a raw set has them."""

import contextlib
import csv
import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
from drawn import packed_devkit, synsets
from drawn import tar as packed_tar
from drawn_layouts import hugging_face, kaggle
from PIL import Image
from refused import Refused
from scipy.io import loadmat

from pipelines import reads, sources, storage, transform
from pipelines.sources import devkit, index, tars

_TRUTH = ("ILSVRC2012_validation_ground_truth.txt", b"3\n1\n2\n")


def tar(data: bytes, folder: Path) -> None:
    """Names, places and sizes must be those that tarfile finds."""
    path = folder / "it.tar"
    path.write_bytes(data)
    found = tars.members(str(path), "it.tar").to_pylist()
    with contextlib.suppress(tarfile.TarError):  # it wants owners and times to be numbers too
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            expected = [
                {"name": _replaced(info.name), "offset": info.offset_data, "size": info.size}
                for info in archive
                if info.isreg() and info.size
            ]
        found = [row for row in found if row["size"]]  # a folder may be an empty file "name/"
        # It ends quietly at a header that it cannot read, which may concern owners and times only.
        assert found[: len(expected)] == expected, f"{found[:3]} instead of {expected[:3]}"
    assert all(row["offset"] + row["size"] <= len(data) for row in found)


def tar_summed(data: bytes, folder: Path) -> None:
    """The same with right checksums, so that not only the checksum is tried."""
    tar(_summed(data), folder)


def tar_nested(data: bytes, folder: Path) -> None:
    path = folder / "train.tar"
    path.write_bytes(_summed(data))
    with mock.patch.dict("os.environ", ALEXNET_HOME=str(folder / "home")):
        first, again = index.nested(str(path)), index.nested(str(path))
    assert first.equals(again)
    assert all(row["offset"] + row["size"] <= len(data) for row in first.to_pylist())


def kept_index(data: bytes, folder: Path) -> None:
    """What was kept of an archive's index is found damaged: the archive is read again."""
    path = folder / "val.tar"
    path.write_bytes(packed_tar([("a.JPEG", b"1234"), ("b.JPEG", b"56789")]))
    with mock.patch.dict("os.environ", ALEXNET_HOME=str(folder / "home")):
        right = index.flat(str(path))
        (kept,) = (folder / "home" / "index").iterdir()
        kept.write_bytes(data)
        found = index.flat(str(path))
    if data_is_damaged := not found.equals(right):
        # Parquet without page checksums: other values can only be told by what is in the archive.
        assert found.schema.equals(right.schema), data_is_damaged
        raise Refused("other values than the archive's, of the same columns")


def devkit_packed(data: bytes, folder: Path) -> None:
    """gzip's checksum tells damage: what is accepted must unpack by gzip's own command line."""
    path = folder / devkit.NAME
    path.write_bytes(data)
    kit = devkit.load(str(path))
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as archive:
        files = {
            info.name.rsplit("/", 1)[-1]: archive.extractfile(info).read()
            for info in archive
            if info.isreg()
        }
    _check_devkit(kit, files["meta.mat"], files[_TRUTH[0]])


def devkit_tar(data: bytes, folder: Path) -> None:
    devkit_packed(gzip.compress(_summed(data), 1), folder)


def devkit_meta(data: bytes, folder: Path) -> None:
    devkit_packed(packed_devkit([("meta.mat", data), _TRUTH]), folder)


def devkit_truth(data: bytes, folder: Path) -> None:
    meta = synsets(["n00000030", "n00000010", "n00000020"], 2, "ILSVRC2012_ID")
    devkit_packed(packed_devkit([("meta.mat", meta), (_TRUTH[0], data)]), folder)


def kaggle_solution(data: bytes, folder: Path) -> None:
    """Labels of val must be those that Python's csv module reads."""
    raw = kaggle(folder / "raw", {"LOC_val_solution.csv": data})
    source = sources.scan(str(raw), ("train", "val"))
    told: dict[str, set[str]] = {}
    text = io.StringIO(data.replace(b"\r", b"").decode("utf-8", "replace"), newline="\n")
    for row in csv.reader(text, quoting=csv.QUOTE_NONE):
        if len(row) == 2:
            told.setdefault(row[0], set()).update(re.findall(r"n\d{8}", row[1]))
    rows = source.table.to_pylist()
    for row in rows:
        if row["split"] == "val":
            assert told[row["key"]] == {row["wnid"]}, row
            assert source.wnids[row["label"]] == row["wnid"]
    assert len(rows) == 9


def kaggle_mapping(data: bytes, folder: Path) -> None:
    raw = kaggle(folder / "raw", {"LOC_synset_mapping.txt": data})
    source = sources.scan(str(raw), ("train", "val"))
    assert list(source.wnids) == sorted(set(source.wnids))
    assert {"n00000010", "n00000020", "n00000030"} == set(source.wnids), source.wnids


def kaggle_list(data: bytes, folder: Path) -> None:
    raw = kaggle(folder / "raw", {"ILSVRC/ImageSets/CLS-LOC/val.txt": data})
    source = sources.scan(str(raw), ("train", "val"))
    listed = {
        line.split()[0].rsplit("/", 1)[-1]
        for line in data.decode(errors="replace").split("\n")
        if line.strip()
    }
    assert listed == {r["key"] for r in source.table.to_pylist() if r["split"] == "val"}


def webdataset_tar(data: bytes, folder: Path) -> None:
    """Images and labels must be those that tarfile finds under the same key."""
    raw = folder / "raw"
    raw.mkdir()
    (raw / "x-train.tar").write_bytes(data := _summed(data))
    with mock.patch.dict("os.environ", ALEXNET_HOME=str(folder / "home")):
        source = sources.scan(str(raw), ("train",), partial=True)
    infos: dict[int, tarfile.TarInfo] = {}
    said: dict[tuple[str, str], int] = {}
    with (
        contextlib.suppress(tarfile.TarError),  # it wants owners and times to be numbers too
        tarfile.open(fileobj=io.BytesIO(data), mode="r:", errors="replace") as archive,
    ):
        for info in archive:
            infos[info.offset_data] = info
            place, _, name = info.name.rpartition("/")
            key, _, kind = name.partition(".")
            if info.isreg() and kind.lower() in ("cls", "json"):
                text = archive.extractfile(info).read()
                label = json.loads(text).get("label") if kind.lower() == "json" else int(text)
                said[place, key] = label
    for row in source.table.to_pylist():
        assert source.wnids[row["label"]] == row["wnid"]
        if info := infos.get(row["offset"]):  # tarfile ends quietly at a header it cannot read
            place, _, name = info.name.rpartition("/")
            assert (info.size, name) == (row["size"], row["name"])
            wnid = re.search(r"n\d{8}", info.name)
            label = said.get((place, name.partition(".")[0]), int(row["wnid"].lstrip("n")))
            assert wnid[0] == row["wnid"] if wnid else int(row["wnid"]) == label, row


def parquet(data: bytes, folder: Path) -> None:
    """Paths and labels must be those that Arrow reads as whole rows; images too."""
    raw = hugging_face(folder / "raw")
    (raw / "data" / "train-00001-of-00002.parquet").write_bytes(data)
    source = sources.scan(str(raw), ("train",))
    rows = source.table.to_pylist()
    with reads.Reader(str(raw), rows) as reader:
        images = {rows[position]["name"]: image for position, image in reader}
    expected = pq.read_table(io.BytesIO(data), use_threads=False).to_pylist()
    mine = [row for row in rows if row["source"].endswith("00001-of-00002.parquet")]
    assert [row["label"] for row in mine] == [row["label"] for row in expected]
    for row, other in zip(mine, expected, strict=True):
        wnid = re.search(r"n\d{8}", other["image"]["path"].rsplit("/", 1)[-1])
        assert wnid and wnid[0] == row["wnid"] == source.wnids[row["label"]]
        assert images[row["name"]] == (other["image"]["bytes"] or b"")


def image(data: bytes, _folder: Path) -> None:
    """The pixels must be those that Pillow alone decodes, for the kinds that it converts alike."""
    made = transform.to_stored(data, 256, 227, 90)
    if isinstance(made, transform.Rejected):
        assert made.reason in transform.REASONS, made
        raise Refused(f"{made.reason}: {made.detail}")
    assert set(made.fixes) <= transform.FIXES.keys()
    assert made.pixels.shape == (3, 227, 227) and made.width >= 1 and made.height >= 1
    with Image.open(io.BytesIO(made.jpeg)) as stored:
        assert (stored.size, stored.mode, stored.format) == ((227, 227), "RGB", "JPEG")
        stored.load()
    if not set(made.fixes) & {"gzip", "cmyk", "ycck", "16bit", "jpeg_warning_ignored"}:
        pixels = transform.decode(data)[0][..., :3]
        with contextlib.suppress(OSError, SyntaxError, ValueError), _quiet():
            with Image.open(io.BytesIO(data)) as seen:
                theirs = np.asarray(seen.convert("RGB"), np.int16)
            assert theirs.shape == pixels.shape, f"{theirs.shape}, {pixels.shape}"
            differs = np.abs(theirs - pixels)
            assert differs.mean() < 2, f"pixels differ by {differs.mean():.1f} from Pillow's"


def kept_image(data: bytes, _folder: Path) -> None:
    made = transform.keep_stored(data, 227)
    if isinstance(made, transform.Rejected):
        assert made.reason in transform.REASONS, made
        raise Refused(f"{made.reason}: {made.detail}")
    assert made.jpeg == data and made.pixels.shape == (3, 227, 227)


def folders(data: bytes, folder: Path) -> None:
    """File names: the input's lines are the paths of an image folder."""
    names = []
    for line in data.split(b"\n")[:12]:
        parts = [part for part in line.replace(b"\0", b"").split(b"/") if part not in (b"", b".")]
        if parts and b".." not in parts and all(len(part) < 200 for part in parts):
            names.append(b"/".join(parts[:6]))
    made = []
    for name in names:
        path = folder / "raw" / name.decode("utf-8", "surrogateescape")
        with contextlib.suppress(OSError):  # a file where a folder of that name is
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
            made.append(path)
    source = sources.scan(str(folder / "raw"), ("train", "val"))
    for row in source.table.to_pylist():
        place = folder / "raw" / row["source"]
        assert place in made and place.parent.name == row["wnid"] == source.wnids[row["label"]]
        assert storage.join(row["split"], row["wnid"], row["name"]) == row["source"]


def _check_devkit(kit: devkit.Devkit, meta: bytes, truth: bytes) -> None:
    assert kit.wnids  # or the reader, which may crash, is not run here
    table = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    leaves = [row for row in np.atleast_1d(table) if int(row["num_children"]) == 0]
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    assert kit.wnids == tuple(sorted(wnids.values()))
    assert all(re.fullmatch(r"n\d{8}", wnid, re.ASCII) for wnid in kit.wnids), kit.wnids
    assert kit.val_wnids == tuple(wnids[int(word)] for word in truth.split())
    assert all(count >= 0 for count in kit.train_images.values())


def _summed(data: bytes) -> bytes:
    """Every block that could be a header, with the checksum it should have."""
    made = bytearray(data)
    for start in range(0, len(made) - 511, 512):
        if made[start + 257 : start + 262] == b"ustar":
            made[start + 148 : start + 156] = b" " * 8
            made[start + 148 : start + 156] = b"%06o\0 " % sum(made[start : start + 512])
    return bytes(made)


def _replaced(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


RAW: dict[str, Callable[[bytes, Path], None]] = {
    function.__name__: function
    for function in (
        *(tar, tar_summed, tar_nested, kept_index, devkit_packed, devkit_tar, devkit_meta),
        *(devkit_truth, kaggle_solution, kaggle_mapping, kaggle_list, parquet, image),
        webdataset_tar,
        *(kept_image, folders),
    )
}
