"""What a devkit says: classes, their names and announced sizes, and the labels of val (and test).

ILSVRC2012_devkit_t12.tar.gz and ILSVRC2010_devkit-1.0.tar.gz have one form: data/meta.mat with the
struct array `synsets` (its leaves, num_children 0, have the IDs 1 to 1,000) and a ground truth
with one ID per line, in the order of the images' numbers. Source: their readme.txt.
"""

from __future__ import annotations

import inspect
import io
import json
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import storage

NAME = "ILSVRC2012_devkit_t12.tar.gz"
NAME_2010 = "ILSVRC2010_devkit-1.0.tar.gz"
TEST_TRUTH_2010 = "ILSVRC2010_test_ground_truth.txt"  # beside the devkit, not in it
_META = "meta.mat"
_MAX_UNPACKED = 128 << 20  # bytes; the real devkits have a few MB
_MATLAB_SECONDS = 120.0
_ID = re.compile(r"[0-9]{1,9}")
_WNID = re.compile(r"n[0-9]{8}")


@dataclass(frozen=True)
class Devkit:
    year: int
    wnids: tuple[str, ...]  # of the leaves, sorted: the position is the label
    words: dict[str, str]
    train_images: dict[str, int]  # announced, per WNID
    val_wnids: tuple[str, ...]  # entry k belongs to image number k + 1
    test_wnids: tuple[str, ...] = ()  # of 2010 alone: nobody has published those of 2012


def find(raw: str, files: dict[str, int]) -> Devkit | None:
    """The devkit that lies in RAW. Raises UserError as `load` does, and when there are two."""
    found = [name for name in (NAME, NAME_2010) if name in files]
    if len(found) > 1:
        raise UserError(f"{raw} holds {' and '.join(found)}: two class lists; keep one of them")
    return load(storage.join(raw, found[0])) if found else None


def load(uri: str) -> Devkit:
    """Members are read in memory, by base name: no path of the archive touches the disk.

    The labels of the 2010 test images are taken from their file in the same folder, if there.
    Raises UserError when the devkit is damaged, lacks a file, is that of another year than its
    name says, or its files contradict each other.
    """
    folder, _, name = uri.rpartition("/")
    year = 2010 if name == NAME_2010 else 2012
    truth = f"ILSVRC{year}_validation_ground_truth.txt"
    files = _read_members(uri, (_META, truth))
    synsets = _synsets(uri, files[_META], f"ILSVRC{year}_ID")
    wnid_of_id = {row[f"ILSVRC{year}_ID"]: row["WNID"] for row in synsets}
    if sorted(wnid_of_id) != list(range(1, len(synsets) + 1)):
        raise UserError(f"{uri}: leaf ILSVRC{year}_IDs are not 1 to {len(synsets)}, each once")
    if len(set(wnid_of_id.values())) != len(synsets):
        raise UserError(f"{uri}: a WNID appears twice in {_META}")
    test = storage.join(folder, TEST_TRUTH_2010)
    return Devkit(
        year=year,
        wnids=tuple(sorted(wnid_of_id.values())),
        words={row["WNID"]: row["words"] for row in synsets},
        train_images={row["WNID"]: row["num_train_images"] for row in synsets},
        val_wnids=_truth(f"{truth} in {uri}", files[truth], wnid_of_id, year),
        test_wnids=_truth(test, storage.read(test), wnid_of_id, year)
        if year == 2010 and storage.exists(test)
        else (),
    )


def _read_members(uri: str, wanted: tuple[str, ...]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_unpacked(uri)), mode="r:") as tar:
            for info in tar:
                name = info.name.rsplit("/", 1)[-1]
                if info.isreg() and name in wanted:
                    file = tar.extractfile(info)
                    assert file is not None  # a regular member always has data
                    files[name] = file.read()
    except (tarfile.TarError, ValueError, OverflowError, zlib.error) as error:
        raise UserError(f"{uri} is damaged ({error}); fetch it again") from error
    for name in wanted:
        if name not in files:
            raise UserError(f"{uri} holds no {name}; fetch it again")
    return files


def _unpacked(uri: str) -> bytes:
    """To the end and its checksum, which tarfile never gets to; at most _MAX_UNPACKED bytes."""
    data, packed = b"", storage.read(uri)
    while not data or packed.strip(b"\0"):  # gzip allows several parts, and zeros at the end
        part = zlib.decompressobj(wbits=31)
        data += part.decompress(packed, _MAX_UNPACKED + 1 - len(data))
        if len(data) > _MAX_UNPACKED:
            raise ValueError(f"it unpacks to more than {_MAX_UNPACKED >> 20} MiB")
        if not part.eof:
            raise ValueError("it ends early")
        packed = part.unused_data
    return data


def _synsets(uri: str, meta: bytes, id_field: str) -> list[dict[str, Any]]:
    """The leaves: rows without children, whose IDs are 1 to their number."""
    try:
        fields, rows = _read_matlab(meta, id_field)
    except ValueError as error:
        raise UserError(f"{uri}: {_META} is damaged ({error}); fetch it again") from error
    other = [name for name in fields if re.fullmatch(r"ILSVRC\d+_ID", name)]
    if other and id_field not in other:
        raise UserError(
            f"{uri}: {_META} has {other[0]}, not {id_field}: it is the devkit of another year; "
            "take the one that was published with the images"
        )
    for row in rows:
        if not _WNID.fullmatch(row["WNID"]) or row["num_train_images"] < 0:
            raise UserError(
                f"{uri}: {_META} has class {row['WNID'][:20]!r} with {row['num_train_images']} "
                "train images; fetch it again"
            )
    if not rows:
        raise UserError(f"{uri}: {_META} lists no class by {id_field}; fetch it again")
    return rows


def _read_matlab(meta: bytes, id_field: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The names of all fields; and of each leaf (no children) ID, WNID, words, num_train_images:
    none where `id_field` is not among the fields. Raises ValueError for a damaged file.

    SciPy's reader is native code that a damaged file makes crash (segmentation faults were found
    by fuzzing, SciPy 1.17): the process that asks must not be the one that reads.
    """
    code = f"{inspect.getsource(_synsets_as_json)}\n{_synsets_as_json.__name__}()"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", code, id_field],
            input=meta,
            capture_output=True,
            timeout=_MATLAB_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"not read within {_MATLAB_SECONDS:g} s") from error
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ValueError(lines[-1][:200] if lines else f"the reader ended with {done.returncode}")
    fields, rows = json.loads(done.stdout)
    return fields, rows


def _synsets_as_json() -> None:
    """A program of its own, from its source alone: meta.mat on stdin, JSON on stdout."""
    import io
    import json
    import resource
    import sys

    import numpy as np
    from scipy.io import loadmat

    limit = 16 << 30  # bytes; libraries map some gigabytes, a damaged size may ask for any number
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > limit:  # it may be lowered, never raised
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    id_field = sys.argv[1]
    meta = io.BytesIO(sys.stdin.buffer.read())
    table = loadmat(meta, squeeze_me=True, variable_names=["synsets"])["synsets"]
    fields = list(table.dtype.names or ())
    wanted = {id_field: int, "WNID": str, "words": str, "num_train_images": int}
    rows = []
    if {*wanted, "num_children"} <= {*fields}:
        leaves = [row for row in np.atleast_1d(table) if int(row["num_children"]) == 0]
        rows = [{name: kind(row[name]) for name, kind in wanted.items()} for row in leaves]
    print(json.dumps([fields, rows]))


def _truth(where: str, text: bytes, wnid_of_id: dict[int, str], year: int) -> tuple[str, ...]:
    wnids = []
    for number, line in enumerate(text.decode("ascii", "replace").strip().splitlines(), start=1):
        wnid = wnid_of_id.get(int(line)) if _ID.fullmatch(line.strip()) else None
        if wnid is None:
            raise UserError(
                f"line {number} of {where} is {line.strip()[:20]!r}, not an ILSVRC{year}_ID "
                f"from 1 to {len(wnid_of_id)}"
            )
        wnids.append(wnid)
    return tuple(wnids)


# Images that carry a number instead of their class: ILSVRC2012_val_00000001.JPEG


def numbers(where: str, names: pa.Array, prefix: str) -> pa.Array:
    """int64, of base names PREFIX_00000001.JPEG. Raises UserError for any other name."""
    found = pc.extract_regex(names, rf"^{prefix}_(?P<number>\d{{8}})\.[^.]+$")
    if found.null_count:
        strange = names.filter(pc.is_null(found))[0].as_py()
        raise UserError(f"{where} holds {strange}; expected only {prefix}_*.JPEG")
    return pc.struct_field(found, "number").cast(pa.int64())


def wnids_by_number(where: str, names: pa.Array, prefix: str, truth: Sequence[str]) -> pa.Array:
    """WNIDs (string) of such images; `truth` holds that of number 1 first.

    Raises UserError for other names, and for a number that the truth lacks.
    """
    number = numbers(where, names, prefix)
    outside = pc.or_(pc.less(number, 1), pc.greater(number, len(truth)))
    if pc.any(outside).as_py():
        raise UserError(
            f"{where} holds {names.filter(outside)[0].as_py()} and {len(names):,} images in all, "
            f"but the ground truth has {len(truth):,} lines; take both from the same release"
        )
    return pa.array(truth, pa.string()).take(pc.subtract(number, 1))
