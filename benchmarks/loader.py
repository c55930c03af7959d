"""Claim: training's loader feeds more images than its peers, near what decoding alone allows.

Each contender runs one epoch over the same stored images in a process of its own and delivers
uint8 batches, each image mirrored with probability 1/2: the one augmentation that all of them
have for uint8, and a cheap one, so that reading, decoding and batching are what is compared.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import environments, processes
from benchmarks.images import QUALITY, Raw, stored, write_shards
from benchmarks.table import Bars, Table, spread
from benchmarks.turns import in_turns, ratios

COLUMNS = (
    "loader",
    "img/s",
    "ratio to its limit",
    "ratio to webdataset",
    "img/s per core, CPU time",
    "first batch, s",
)
CROP = 227
LIMIT = "limit: simplejpeg alone, decoding"
COPY = "limit: copying decoded images"
OURS = "training.loader"
DECODED = "training.loader, decoded file (--cache decoded), not mirrored"
PLAIN = "webdataset, decoder: Pillow"
FASTER = "webdataset, decoder: simplejpeg"
_AS_THEY_ARE = (LIMIT, COPY, OURS, DECODED, PLAIN, FASTER)  # need no files of their own
# Epochs in one process: of copying, the timed part would be over in a second.
_EPOCHS, _COPIED_EPOCHS = 4, 8
_COPYING = (COPY, DECODED, f"{environments.version('ffcv')}, decoder: none, not mirrored")
_EQUAL = 0.01  # share by which decoders, and FFCV encoding once more, may move mean pixels

Answer = dict[str, Any]
Ask = Callable[[dict[str, Any]], Answer]
_PEERS = {  # environment → what decodes, each a row
    "streaming": ("Pillow", "simplejpeg"),
    "litdata": ("Pillow", "simplejpeg"),
    "ffcv": ("its own", "none, not mirrored"),
    "dali": ("its own, for CPUs",),
}


def run(
    raw: Raw, rounds: int = 5, samples: int = 6_400, batch: int = 64, threads: int | None = None
) -> Table:
    """Each round runs the epochs of every contender, in alternating order."""
    threads = threads or len(processes.cpus())
    jpegs = stored(raw, CROP)
    asked, absent = contenders()
    epochs = {name: _COPIED_EPOCHS if name in _COPYING else _EPOCHS for name in asked}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        uri = write_shards(
            Path(folder) / "shards", jpegs, crop=CROP, train=samples, classes=1000, per_shard=400
        )
        request = request_for(uri, Path(folder) / "work", batch, threads)
        for name, ask in asked.items():
            if name not in _AS_THEY_ARE:
                ask(request | {"action": "prepare"})
        looks = {name: ask(request | {"action": "check"}) for name, ask in asked.items()}
        refuse_unequal(looks, samples)
        timed = {
            name: functools.partial(_timed, ask, request, epochs[name], samples)
            for name, ask in asked.items()
        }
        measured = in_turns(timed, rounds)
    rates = {name: [a["images"] / a["seconds"] for a in got] for name, got in measured.items()}
    rows = tuple(_row(name, measured[name], rates) for name in asked)
    missing = "".join(f" Not here: {name} ({reason})." for name, reason in absent.items())
    size = sum(map(len, jpegs)) / len(jpegs) / 1000
    setting = (
        f"{samples} stored images of {CROP} px (copies of {len(jpegs)}, mean {size:.0f} kB; "
        f"{raw.origin}), page cache warm; uint8 batches of {batch}, mirrored at random; {threads} "
        f"decoding threads or worker processes on {threads} CPUs; {_EPOCHS} epochs in a fresh "
        f"process, {_COPIED_EPOCHS} where images are only copied, timed "
        "after the first batch; limit: of copying for the decoded file and FFCV's of raw "
        "pixels, of decoding for the others; first batch: since the start of the process; "
        f"{rounds} rounds in alternating order, median [lowest..highest], ratios within a round. "
        f"FFCV's file of JPEGs holds the images encoded once more.{missing}"
    )
    drawn = {name: rates[name] for name in asked if name not in _COPYING}  # far beyond
    return Table(COLUMNS, rows, setting, Bars("stored JPEGs to uint8 batches, img/s", drawn))


def request_for(uri: str, work: Path, batch: int, threads: int) -> dict[str, Any]:
    work.mkdir(parents=True)
    tars = [str(path) for path in sorted(Path(uri).glob("train-*.tar"))]
    return {
        "shards": uri,
        "tars": tars,
        "work": str(work),
        "batch": batch,
        "threads": threads,
        "quality": QUALITY,
    }


def contenders() -> tuple[dict[str, Ask], dict[str, str]]:
    """Those that can run here, and why not for the others."""
    absent: dict[str, str] = {}
    asked: dict[str, Ask] = {
        LIMIT: functools.partial(_ask_ours, "load_limit"),
        COPY: lambda request: _ask_ours("load_limit", request | {"copy": True}),
        OURS: functools.partial(_ask_ours, "load_ours"),
        DECODED: lambda request: _ask_ours("load_ours", request | {"decoded": True}),
    }
    own = functools.partial(_ask_peer, Path(sys.executable), "load_webdataset.py")
    asked |= {PLAIN: functools.partial(own, "Pillow"), FASTER: functools.partial(own, "simplejpeg")}
    for name, decoders in _PEERS.items():
        try:
            python = environments.python(name)
        except environments.Absent as reason:
            absent[name] = str(reason)
            continue
        for decoder in decoders:
            label = f"{environments.version(name)}, decoder: {decoder}"
            asked[label] = functools.partial(_ask_peer, python, f"load_{name}.py", decoder)
    return asked, absent


def refuse_unequal(looks: dict[str, Answer], samples: int) -> None:
    """Every contender must have delivered the same images and labels."""
    wanted = looks[LIMIT]
    for name, look in looks.items():
        equal = look["images"] == samples and look["labels"] == wanted["labels"]
        equal &= look["shapes"] == wanted["shapes"]
        moved = max(abs(look[key] / wanted[key] - 1) for key in ("pixels", "mixed"))
        equal &= moved < _EQUAL
        assert equal, f"{name} does other work: {json.dumps(look)} and not {json.dumps(wanted)}"


def _timed(ask: Ask, request: dict[str, Any], epochs: int, samples: int, _: int) -> Answer:
    answer = ask(request | {"action": "run", "epochs": epochs})
    assert answer["images"] + answer["first_images"] == epochs * samples, "images were lost"
    return answer


def _ask_ours(module: str, request: dict[str, Any]) -> Answer:
    pinned = processes.cpus(request["threads"])
    return dict(processes.ask_ours(module, request, on=pinned).answer())


def _ask_peer(python: Path, script: str, decoder: str, request: dict[str, Any]) -> Answer:
    pinned = processes.cpus(request["threads"])
    work = Path(request["work"]) / decoder.partition(",")[0]
    work.mkdir(parents=True, exist_ok=True)
    asked = request | {"decoder": decoder, "work": str(work)}
    return dict(processes.ask(python, script, asked, on=pinned).answer())


def _row(name: str, answers: list[Answer], rates: dict[str, list[float]]) -> tuple[str, ...]:
    per_core = [a["images"] / a["cpu"] if a["cpu"] else float("nan") for a in answers]
    late = name in (LIMIT, COPY, DECODED)  # which read all before their first batch
    first = "–" if late else spread([a["first"] for a in answers], 2)
    return (
        f"**`{name}`**" if name == OURS else name,
        spread(rates[name]),
        spread(ratios(rates[name], rates[COPY if name in _COPYING else LIMIT]), 2),
        spread(ratios(rates[name], rates[PLAIN]), 2),
        spread(per_core),
        first,
    )
