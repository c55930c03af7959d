"""The synsets of a devkit's meta.mat, read in a process of its own.

SciPy's reader is native code that a damaged file makes crash (segmentation faults were found by
fuzzing, SciPy 1.17), so that the process that asks must not be the one that reads. As a script it
takes the file from stdin and writes JSON; it imports nothing of this project.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_SECONDS = 120.0
_ADDRESSES = 16 << 30  # bytes; libraries map some gigabytes, a damaged size may ask for any number
_FIELDS = ("WNID", "words", "num_train_images", "num_children")


def synsets(meta: bytes, id_field: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The names of all fields; and of each leaf (no children) ID, WNID, words, num_train_images.

    No leaf where `id_field` is not among the fields. Raises ValueError for a damaged file.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", __file__, id_field],
            input=meta,
            capture_output=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"not read within {_SECONDS:g} s") from error
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ValueError(lines[-1][:200] if lines else f"the reader ended with {done.returncode}")
    fields, rows = json.loads(done.stdout)
    return fields, rows


def _read(meta: bytes, id_field: str) -> tuple[list[str], list[dict[str, Any]]]:
    import io

    import numpy as np
    from scipy.io import loadmat

    table = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
    fields = list(table.dtype.names or ())
    if not {id_field, *_FIELDS} <= set(fields):
        return fields, []
    rows = [
        {
            "ID": int(row[id_field]),
            "WNID": str(row["WNID"]),
            "words": str(row["words"]),
            "num_train_images": int(row["num_train_images"]),
        }
        for row in np.atleast_1d(table)
        if int(row["num_children"]) == 0
    ]
    return fields, rows


def _main() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > _ADDRESSES:  # it may be lowered, never raised
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps(_read(sys.stdin.buffer.read(), sys.argv[1])))


if __name__ == "__main__":
    _main()
