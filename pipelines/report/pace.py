"""The report's account of how the set was built: who, when, how fast. From the journals alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from pipelines.journal import Journal
from pipelines.progress import clock
from pipelines.report import charts
from pipelines.report.page import note, table

_STEPS = 60  # of the longest line
_GAP = 0.08  # of the width: how wide a long pause is drawn at most


def pace(journals: Sequence[Journal]) -> str:
    worked = [entry for entry in journals if len(entry.points) > 1]
    if not worked:
        return "<p>No builder left a journal here.</p>"
    stops, places = _axis(worked)
    gaps = [
        (places[i], places[i + 1]) for i in range(1, len(stops) - 1, 2)
    ]  # between one stretch of work and the next
    courses = [
        (_who(entry), [(float(np.interp(at, stops, places)), rate) for at, rate in _course(entry)])
        for entry in worked
    ]
    ticks = [(0.0, _time(stops[0])), (1.0, _time(stops[-1])[11:])]
    caption = "Images per second while building; each builder has a line"
    chart = charts.lines(caption, courses, gaps, ticks)
    heads = ["builder", "ended", "begun, UTC", "for", "shards", "images", "img/s", "MB/s read"]
    told = note("Shaded: nobody built; long pauses are drawn short.") if gaps else ""
    return chart + told + table(heads, [_row(entry) for entry in worked])


def when(journals: Sequence[Journal]) -> str:
    if not journals:
        return "not recorded"
    first = min(entry.started for entry in journals)
    last = max(entry.updated for entry in journals)
    hosts = sorted({entry.host for entry in journals})
    return f"{_time(first)} to {_time(last)} UTC on {', '.join(hosts)}"


def _axis(journals: Sequence[Journal]) -> tuple[list[float], list[float]]:
    """Times at which work began and ended, in turn, and where they are drawn, from 0 to 1."""
    stretches: list[list[float]] = []
    for entry in sorted(journals, key=lambda entry: entry.started):
        end = entry.started + max(entry.points[-1].seconds, 1e-3)
        if stretches and entry.started <= stretches[-1][1]:
            stretches[-1][1] = max(stretches[-1][1], end)
        else:
            stretches.append([entry.started, end])
    stops = [time for stretch in stretches for time in stretch]
    lengths = np.diff(stops)
    longest = _GAP * lengths[::2].sum()
    lengths[1::2] = np.minimum(lengths[1::2], longest)
    places = np.concatenate([[0.0], np.cumsum(lengths)])
    return stops, (places / places[-1]).tolist()


def _course(entry: Journal) -> list[tuple[float, float]]:
    """(epoch seconds, images per second) in steps of equal length.

    A shard counts when it is finished, though its pictures were made since the one before: the
    count rises evenly from one moment at which it rose to the next.
    """
    seconds = np.array([point.seconds for point in entry.points])
    pictures = np.array([point.pictures for point in entry.points])
    rose = np.flatnonzero(np.diff(pictures)) + 1
    kept = np.unique(np.concatenate([[0], rose, [len(seconds) - 1]]))
    steps = min(_STEPS, max(len(rose), 1))
    edges = np.linspace(0, max(seconds[-1], 1e-3), steps + 1)
    rates = np.diff(np.interp(edges, seconds[kept], pictures[kept])) / np.diff(edges)
    middles = entry.started + (edges[:-1] + edges[1:]) / 2
    ends = [entry.started, *middles.tolist(), entry.started + float(edges[-1])]
    return list(zip(ends, [rates[0], *rates.tolist(), rates[-1]], strict=True))


def _row(entry: Journal) -> list[str | int]:
    first, last = entry.points[0], entry.points[-1]
    seconds = max(last.seconds, 1e-3)
    made = last.pictures - first.pictures
    ended = "without a word" if entry.state == "building" else entry.state
    return [
        _who(entry),
        f"{ended}: {entry.message}" if entry.message else ended,
        _time(entry.started),
        clock(last.seconds),
        last.shards - first.shards,
        made,
        round(made / seconds),
        round(last.read_bytes / seconds / 1e6),
    ]


def _who(entry: Journal) -> str:
    return f"{entry.host} {entry.pid}"


def _time(epoch: float) -> str:
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%d %H:%M:%S")
