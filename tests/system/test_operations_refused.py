"""What cannot work is told before anything starts: one line with the remedy, exit code 2."""

import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from drawn import imagefolder, jpeg
from registered import MLFLOW_WARNINGS
from shard_sets import write_shard_set

from pipelines import cli, storage
from training import run, tracking

if TYPE_CHECKING:
    from seaweed import Seaweed

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]


@pytest.fixture(autouse=True)
def own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("refused") / "set", train=(16,), val=(4,))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> str:
    names = [
        f"{split}/n0000000{c}/{c}{n}.JPEG" for split in _SPLITS for c in (1, 2) for n in range(9)
    ]
    folder = tmp_path_factory.mktemp("refused-raw")
    return str(imagefolder(folder, {name: jpeg() for name in names}))


_SPLITS = ("train", "val")
Captured = pytest.CaptureFixture[str]


def refused(capsys: Captured, code: int) -> str:
    """The one line, after its `error: `; before it, MLflow may tell of its new database."""
    said = capsys.readouterr()
    assert code == 2, said
    *others, line = said.err.splitlines()
    assert all(" INFO mlflow." in other for other in others), said.err
    return line.removeprefix("error: ")


def planned(capsys: Captured, raw: str, out: str) -> str:
    return refused(capsys, cli.main(["plan", "--raw", raw, "--out", out]))


def built(capsys: Captured, raw: str, out: str) -> str:
    return refused(capsys, cli.main(["build", "--raw", raw, "--out", out]))


def dry_run(capsys: Captured, *flags: str) -> str:
    return refused(capsys, run.main(["smoke", "--dry-run", *flags]))


def trained(capsys: Captured, *flags: str) -> str:
    return refused(capsys, run.main(["smoke", *flags]))


# A store that refuses


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_refused_credentials_are_told_by_plan_build_and_dry_run(
    seaweed: "Seaweed", monkeypatch, capsys, raw, data, wrong
):
    seaweed.client().create_bucket(Bucket=(bucket := f"refused-{wrong[4:10].lower()}"[:20] + "x"))
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(wrong, "wrong-on-purpose")
    place = f"s3://{bucket}/x"
    for line in [
        planned(capsys, place, "/nowhere"),
        planned(capsys, raw, place),
        dry_run(capsys, "--data", place),
        trained(capsys, "--data", data, "--storage", place),
    ]:
        assert f"{seaweed.endpoint} refused the credentials (" in line and place in line
        assert line.endswith(
            "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and that they may list, read and write "
            "there"
        )
        assert "wrong-on-purpose" not in line and seaweed.secret_key not in line


# A bucket in another region, and an MLflow of another age: servers that answer as those do


class Answers(http.server.ThreadingHTTPServer):
    """Answers every request with `status`, `headers` and `body`, those of HEAD without the body;
    `paths` are what it was asked for."""

    status, body = 200, b""
    headers: dict[str, str] = {}  # noqa: RUF012

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Answers)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(server.status)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(server.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(server.body)

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answers() -> Iterator[Answers]:
    with Answers(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


_XML = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>'
    "</Error>"
)
_MALFORMED = "the region &apos;us-east-1&apos; is wrong; expecting &apos;eu-central-1&apos;"
_REDIRECT = "The bucket you are attempting to access must be addressed using the specified endpoint"


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [(301, "PermanentRedirect", _REDIRECT), (400, "AuthorizationHeaderMalformed", _MALFORMED)],
)
def test_bucket_of_another_region_is_told_with_its_region(
    answers, monkeypatch, capsys, raw, data, status, code, message
):
    answers.status = status
    answers.headers = {"Content-Type": "application/xml", "x-amz-bucket-region": "eu-central-1"}
    answers.body = _XML.format(code=code, message=message).encode()
    monkeypatch.setenv("AWS_ENDPOINT_URL", answers.uri)
    for line in [
        planned(capsys, "s3://elsewhere/raw", "/nowhere"),
        dry_run(capsys, "--data", data, "--storage", "s3://elsewhere/runs"),
    ]:
        assert line.endswith("in another region; set AWS_DEFAULT_REGION=eu-central-1"), line


def test_mlflow_server_before_the_oldest_is_refused_with_the_upgrade(
    answers, monkeypatch, capsys, data
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", answers.uri)
    answers.body = b"2.22.1"
    line = dry_run(capsys, "--data", data)
    assert line.startswith(f"MLflow at {answers.uri} is version 2.22.1, this needs 3.0 or newer")
    assert "upgrade the server" in line and "mlflow db upgrade" in line
    for other in (b"3.0.0", b"3.17.2", b"10.1.0rc1", b"no version", b""):
        answers.body = other
        tracking._refuse_old(answers.uri)


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
