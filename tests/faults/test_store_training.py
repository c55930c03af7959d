"""Trainings on shards and checkpoints of a bad store: the undisturbed one's weights in the end."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from attacks import Attack
from bad_weather import survived, weather_of
from s3_shards import cached
from shard_sets import decoded, write_shard_set
from small_training import CPU, small_config
from store_proxy import ANYWHERE, FAULTS, FLIPS, OF_READS, Proxy, Weather

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import load_manifest
from training import checkpoint, loop
from training.loader import Loader
from training.uploads import Uploader

pytest_plugins = ["bad_store"]
pytestmark = pytest.mark.usefixtures("home")

CONFIG = small_config(checkpoint_steps=2, keep_last=2)
READS = (*ANYWHERE, *OF_READS, "bit flipped in the answer")
_MOST_LIVES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_shard_set(tmp_path_factory.mktemp("set") / "set", train=(5, 4, 6, 5, 4)))


@pytest.fixture
def data(bucket: str, folder: Path) -> str:
    """The set of `folder` on the store."""
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write(f"{bucket}/set/{path.relative_to(folder)}", path.read_bytes())
    return f"{bucket}/set"


def test_shards_arrive_whole_from_a_bad_store(
    attack: Attack,
    proxy: Proxy,
    data: str,
    folder: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.shard_cache._CHUNK", 20_000)
    manifest = load_manifest(data)
    pixels, labels = decoded(folder, "train")
    ids = np.array(attack.draw.sample(range(len(labels)), len(labels)))
    proxy.foul(weather_of(attack, READS, rate=0.2))
    for _ in range(_MOST_LIVES):
        try:
            with Loader(data, manifest, "train", threads=2, cache_gb=1) as loader:
                batch = loader.read(ids)
            break
        except UserError as error:  # damaged on the way twice in a row
            assert "(fetched twice)" in str(error) and "\n" not in str(error)
            proxy.weather = Weather(proxy.weather.seed + 1, 0.05, READS)
    seen = proxy.fair()
    found = batch.images.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(found - pixels[ids].astype(int)).max() <= 1
    assert batch.labels.tolist() == labels[ids].tolist()
    assert set(cached(home, manifest)) == {s.name for s in manifest.split_shards("train")}
    assert not list((home / "cache").glob("*.partial"))
    survived(attack, "shard cache", seen)


class Stopped(Exception):
    """A worker that was lost after a step."""


@dataclass
class Training:
    """A run whose shards and checkpoints are on the store, in as many lives as it takes."""

    data: str
    run: str
    losses: dict[int, list[float]] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)

    def live(self, stop: int | None = None) -> None:
        """Goes on from the newest whole checkpoint, to the end or through step `stop`."""

        def log(metrics: dict[str, float], step: int) -> None:
            if "loss" in metrics:
                self.losses.setdefault(step, []).append(metrics["loss"])
                if step == stop:
                    raise Stopped

        with (
            checkpoint.newest_good(self.run) as resume,
            Uploader(self.run, keep_last=2, keep_best=1, patience=60) as uploads,
        ):
            self.starts.append(0 if resume is None else checkpoint.load_state(resume)["step"])

            def report(_: dict[str, float], write: Callable[[], Path] | None) -> None:
                assert write is not None
                uploads.send(write)

            place = loop.Place(CPU, threads=2)
            loop.fit(
                CONFIG,
                self.data,
                load_manifest(self.data),
                place,
                log=log,
                report=report,
                resume=resume,
            )

    def result(self) -> dict[str, bytes]:
        """The files of the last checkpoint."""
        with checkpoint.newest_good(self.run) as last:
            assert last is not None
            return {path.name: path.read_bytes() for path in last.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """The same training on this disk."""
    training = Training(str(folder), str(tmp_path_factory.mktemp("undisturbed") / "run"))
    training.live()
    return training


def test_a_training_with_checkpoints_on_a_bad_store_learns_the_same(
    attack: Attack, proxy: Proxy, bucket: str, data: str, undisturbed: Training
) -> None:
    steps = max(undisturbed.losses)
    began = time.monotonic()
    Training(data, f"{bucket}/usual").live()
    usual = time.monotonic() - began
    training = Training(data, f"{bucket}/run")
    proxy.foul(weather := weather_of(attack, (*FAULTS, *FLIPS)))
    began = time.monotonic()
    for life in range(_MOST_LIVES):
        proxy.weather = weather if life < _MOST_LIVES - 1 else Weather()
        stop = attack.draw.randint(1, steps) if life < 2 else None
        try:
            training.live(stop)
            break
        except Stopped:
            continue
        except UserError as error:
            assert "\n" not in str(error)
    seconds = time.monotonic() - began
    seen = proxy.fair()
    assert training.result() == undisturbed.result()
    for step, losses in undisturbed.losses.items():
        assert {*training.losses[step]} == {*losses}, step
    # A stale listing may hide checkpoints; otherwise at most those that were not yet uploaded.
    again = sum(map(len, training.losses.values())) - steps
    assert again <= (len(training.starts) - 1) * (steps if "stale list" in seen.faults else 4)
    survived(attack, "training", seen, max(0.0, seconds - usual))


def test_a_checkpoint_that_was_deleted_since_it_was_listed_is_passed_over(
    proxy: Proxy, bucket: str, tmp_path: Path
) -> None:
    run = f"{bucket}/run"
    with Uploader(run, keep_last=2, keep_best=0, patience=60) as uploads:
        for step in (1, 2):
            state = {"step": step, "metrics": {}, "evaluated_step": 0}
            checkpoint.save(tmp_path / "here", {"model": {}, "optimizer": {}}, state)
            uploads.send(lambda: tmp_path / "here")
            uploads.wait()
    proxy.foul(Weather())
    with checkpoint.newest_good(run) as newest:
        assert newest is not None and checkpoint.load_state(newest)["step"] == 2
    gone = [name for name, _ in storage.list_files(run) if name.startswith("checkpoint-00000002")]
    for name in gone:
        storage.delete(f"{run}/{name}")
    assert len(storage.list_files(run)) == len(gone)  # the other one's
    proxy.weather = Weather(0, 1.0, ["stale list"])
    with checkpoint.newest_good(run) as newest:
        assert newest is not None and checkpoint.load_state(newest)["step"] == 1
    assert proxy.fair().faults["stale list"] == 1
