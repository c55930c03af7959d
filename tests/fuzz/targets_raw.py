"""Archives, lists, parquet files and images as a raw set has them.

A target takes an input and an empty folder of its own, and returns where the result is right, by an
oracle that shares no code with the parser. It raises UserError or Refused for what is refused;
every other exception is a find.
"""

import contextlib
import csv
import gzip
import io
import json
import re
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
from drawn import packed_devkit, synsets
from drawn_layouts import hugging_face, kaggle
from PIL import Image
from scipy.io import loadmat

from pipelines import reads, sources, transform
from pipelines.sources import devkit, index, tars


class Refused(Exception):
    """By other means than a UserError; the text is the parser's own reason."""


_TRUTH = ("ILSVRC2012_validation_ground_truth.txt", b"3\n1\n2\n")


def tar(data: bytes, folder: Path) -> None:
    """Names, places and sizes must be those that tarfile finds."""
    path = folder / "it.tar"
    path.write_bytes(data)
    found = tars.members(str(path), "it.tar").to_pylist()
    with contextlib.suppress(tarfile.TarError):  # it wants owners and times to be numbers too
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            infos = [info for info in archive if info.isreg() and info.size]
        expected = [
            {
                "name": info.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
                "offset": info.offset_data,
                "size": info.size,
            }
            for info in infos
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


def devkit_packed(data: bytes, folder: Path) -> None:
    """gzip's checksum tells damage: what is accepted must unpack by gzip's own command line."""
    path = folder / devkit.NAME
    path.write_bytes(data)
    kit = devkit.load(str(path))
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as archive:
        infos = [info for info in archive if info.isreg()]
        files = {Path(info.name).name: archive.extractfile(info).read() for info in infos}
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
    made = _accepted(transform.to_stored(data, 256, 227, 90))
    assert set(made.fixes) <= transform.FIXES.keys()
    assert made.pixels.shape == (3, 227, 227) and made.width >= 1 and made.height >= 1
    with Image.open(io.BytesIO(made.jpeg)) as stored:
        assert (stored.size, stored.mode, stored.format) == ((227, 227), "RGB", "JPEG")
        stored.load()
    if not set(made.fixes) & {"gzip", "cmyk", "ycck", "16bit", "jpeg_warning_ignored"}:
        pixels = transform.decode(data)[0][..., :3]
        with (
            contextlib.suppress(OSError, SyntaxError, ValueError),
            warnings.catch_warnings(action="ignore"),
        ):
            with Image.open(io.BytesIO(data)) as seen:
                theirs = np.asarray(seen.convert("RGB"), np.int16)
            assert theirs.shape == pixels.shape, f"{theirs.shape}, {pixels.shape}"
            differs = np.abs(theirs - pixels)
            assert differs.mean() < 2, f"pixels differ by {differs.mean():.1f} from Pillow's"


def kept_image(data: bytes, _folder: Path) -> None:
    made = _accepted(transform.keep_stored(data, 227))
    assert made.jpeg == data and made.pixels.shape == (3, 227, 227)


def _accepted(made: transform.Stored | transform.Rejected) -> transform.Stored:
    if isinstance(made, transform.Rejected):
        assert made.reason in transform.REASONS, made
        raise Refused(f"{made.reason}: {made.detail}")
    return made


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


RAW: dict[str, Callable[[bytes, Path], None]] = {
    function.__name__: function
    for function in (
        *(tar, tar_summed, tar_nested, webdataset_tar, parquet, image, kept_image),
        *(devkit_packed, devkit_tar, devkit_meta, devkit_truth, kaggle_solution),
    )
}
