"""What is counted for Prometheus never ends the work, and labels are what Ray takes."""

import threading
from urllib.parse import unquote

import pytest
import ray
import ray.util.metrics

from pipelines import progress
from training import worker

ROW = {"samples": 1, "rejected": [{"reason": "cut"}], "read_bytes": 0, "stored_bytes": 1}
ROW |= {"wait_seconds": 0.0, "work_seconds": 0.1}


def test_counting_starts_no_ray(caplog):
    before = ray.is_initialized()
    progress.export("out", ROW)
    worker.show("run", {"loss": float("nan"), "other": 1})
    worker.count_restart("run")
    assert ray.is_initialized() is before and caplog.text == ""


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("gone"), KeyError("out")])
def test_figures_that_ray_refuses_are_one_warning_and_end_nothing(error, monkeypatch, caplog):
    def refuse(*_):
        raise error

    monkeypatch.setattr(ray.util.metrics.Counter, "inc", refuse)
    monkeypatch.setattr(progress, "_warned", threading.Event())
    for _ in range(3):
        progress.export("out", ROW)
    worker.count_restart("run")
    assert [record.message for record in caplog.records] == [
        f"no figures for Prometheus: {error!r}"
    ]


@pytest.mark.parametrize(
    "name",
    ["plain/a-b_c.d~e f", "Größe", "训练一", "100%", 'a"b\\c', "two\nlines\x00\x7f", "\udcff", ""],
)
def test_labels_are_printable_ascii_without_quotes_from_which_the_name_can_be_had(name):
    value = progress.label(name)
    assert value.isascii() and value.isprintable() and not set(value) & set('"\\')
    assert unquote(value, errors="surrogatepass") == name
    assert (value == name) == (name.startswith("plain") or not name)


def test_long_labels_are_cut_and_still_tell_one_name_from_the_other():
    names = [f"s3://{'ö' * 3000}/{middle}/{'x' * 300}" for middle in "ab"] + ["x" * 201]
    values = [progress.label(name) for name in names]
    assert len(set(values)) == 3 and max(map(len, values)) <= 200
    assert progress.label("x" * 200) == "x" * 200
