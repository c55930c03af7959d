"""What cannot work is told before anything starts: one line with the remedy, exit code 2."""

import re

import pytest
from answering import answering
from drawn import imagefolder, jpeg
from shard_sets import write_shard_set

from pipelines import cli, storage
from training import run, tracking

pytestmark = pytest.mark.usefixtures("used_home")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("refused") / "set", train=(16,), val=(4,))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> str:
    folders = [f"{split}/n0000000{c}/{c}" for split in ("train", "val") for c in (1, 2)]
    files = {f"{folder}{n}.JPEG": jpeg() for folder in folders for n in range(9)}
    return str(imagefolder(tmp_path_factory.mktemp("refused-raw"), files))


def refused(capsys: Captured, code: int) -> str:
    """The one line, after its `error: `."""
    said = capsys.readouterr()
    assert code == 2 and said.err.count("\n") == 1, said
    return said.err.removeprefix("error: ").rstrip()


def planned(capsys: Captured, raw: str, out: str) -> str:
    return refused(capsys, cli.main(["plan", "--raw", raw, "--out", out]))


def built(capsys: Captured, raw: str, out: str) -> str:
    return refused(capsys, cli.main(["build", "--raw", raw, "--out", out]))


def dry_run(capsys: Captured, *flags: str) -> str:
    return refused(capsys, run.main(["smoke", "--dry-run", *flags]))


# A store that refuses


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_refused_credentials_are_told_by_plan_build_and_dry_run(
    seaweed, seaweed_bucket, monkeypatch, capsys, raw, data, wrong
):
    monkeypatch.setenv(wrong, "wrong-on-purpose")
    place = f"{seaweed_bucket}/x"
    for line in [
        planned(capsys, place, "/nowhere"),
        planned(capsys, raw, place),
        dry_run(capsys, "--data", place),
        refused(capsys, run.main(["smoke", "--data", data, "--storage", place])),
    ]:
        assert f"{seaweed.endpoint} refused the credentials (" in line and place in line
        assert "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and that they may list" in line
        assert "wrong-on-purpose" not in line and seaweed.secret_key not in line


# A bucket in another region, and an MLflow of another age: servers that answer as those do

_MALFORMED = "the region &apos;us-east-1&apos; is wrong; expecting &apos;eu-central-1&apos;"
_REDIRECT = "The bucket you are attempting to access must be addressed using the specified endpoint"


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [(301, "PermanentRedirect", _REDIRECT), (400, "AuthorizationHeaderMalformed", _MALFORMED)],
)
def test_bucket_of_another_region_is_told_with_its_region(
    monkeypatch, capsys, raw, data, status, code, message
):
    body = '<?xml version="1.0" encoding="UTF-8"?>\n'
    body += f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    headers = {"Content_Type": "application/xml", "x_amz_bucket_region": "eu-central-1"}
    with answering(status, body.encode(), **headers) as uri:
        monkeypatch.setenv("AWS_ENDPOINT_URL", uri)
        for line in [
            planned(capsys, "s3://elsewhere/raw", "/nowhere"),
            dry_run(capsys, "--data", data, "--storage", "s3://elsewhere/runs"),
        ]:
            assert line.endswith("in another region; set AWS_DEFAULT_REGION=eu-central-1"), line


def test_mlflow_server_before_the_oldest_is_refused_with_the_upgrade(monkeypatch, capsys, data):
    with answering(200, b"2.22.1") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        line = dry_run(capsys, "--data", data)
    assert line.startswith(f"MLflow at {uri} is version 2.22.1, this needs 3.0 or newer")
    assert "upgrade the server" in line and "mlflow db upgrade" in line
    for other in (b"3.0.0", b"10.1.0rc1", b"no version", b""):
        with answering(200, other) as uri:
            tracking._refuse_old(uri)


# A full disk


def test_disk_without_room_for_the_shards_is_told_before_any_is_made(raw, small_disk, capsys):
    for tell in (planned, built):
        line = tell(capsys, raw, f"{small_disk}/out")
        assert re.search(r"/out: 0\.\d MB are free and 2 shards take about 0\.8 MB; make", line)
    assert not [name for name, _ in storage.list_files(str(small_disk)) if name.endswith(".tar")]
    (small_disk / "filler").write_bytes(bytes(storage.free_bytes(str(small_disk))))
    assert "No space left on device; make room there" in built(capsys, raw, f"{small_disk}/new")


def test_disk_without_room_for_the_cache_of_shards_is_told(
    s3, data, small_disk, capsys, monkeypatch
):
    for name, _ in storage.list_files(data):
        storage.write(f"{s3}/cached/{name}", storage.read(f"{data}/{name}"))
    monkeypatch.setenv("ALEXNET_HOME", str(small_disk))
    line = dry_run(capsys, "--data", f"{s3}/cached", "--storage", f"{s3}/runs")
    assert line.startswith(f"{small_disk}/cache has 0.00 GB free and the shards kept there take")
    assert "set ALEXNET_HOME to another disk, or pass a lower --cache-gb" in line
