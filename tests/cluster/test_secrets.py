"""Keys reach the workers, and nothing that anybody may look at."""

import io
import subprocess
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import requests
from machines import Machines
from road import Job, ok

pytestmark = pytest.mark.timeout(600)


def secrets_of(cluster: Machines) -> dict[str, bytes]:
    folder = cluster.folder / "secrets"
    found = {
        "Ray's token": (folder / "ray_token").read_text(),
        "PostgreSQL's password": (folder / "pgpass").read_text().strip().split(":")[4],
        "MLflow's password": (folder / "mlflow_password").read_text(),
    }
    for identity in ("alexnet", "mlflow"):
        for line in (folder / f"{identity}.env").read_text().splitlines():
            if line.startswith("AWS_SECRET_ACCESS_KEY="):
                found[f"the S3 key of {identity}"] = line.split("=", 1)[1]
    assert len(found) == 5 and all(len(value) >= 40 for value in found.values())
    return {name: value.encode() for name, value in found.items()}


def everything_to_look_at(cluster: Machines) -> Iterator[tuple[str, bytes]]:
    """Where it lies, and what it is."""
    yield "ray job list", ok(cluster.run("ray", "job", "list")).encode()
    for path in cluster.folder.glob("**/logs/**/*"):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield str(path), path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
    with cluster.database() as database, database.cursor() as rows:
        rows.execute("select table_name from information_schema.tables where table_schema='public'")
        for (table,) in rows.fetchall():
            dump = io.BytesIO()
            rows.copy_expert(f'copy "{table}" to stdout', dump)
            yield f"table {table}", dump.getvalue()
    database.close()
    for bucket in ("alexnet", "mlflow"):
        lines = (cluster.folder / "secrets" / f"{bucket}.env").read_text().split()
        own = dict(line.split("=", 1) for line in lines)
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=own["AWS_ENDPOINT_URL"],
            aws_access_key_id=own["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=own["AWS_SECRET_ACCESS_KEY"],
        )
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for item in page.get("Contents", []):
                if not item["Key"].endswith((".tar", ".safetensors", ".pt2", ".onnx")):
                    answer = client.get_object(Bucket=bucket, Key=item["Key"])
                    yield f"s3://{bucket}/{item['Key']}", answer["Body"].read()


def test_no_secret_is_in_logs_jobs_command_lines_mlflow_or_the_store(
    cluster: Machines, trained: Job
) -> None:
    wanted, places, shown = secrets_of(cluster), [], []
    for place, content in everything_to_look_at(cluster):
        places.append(place)
        shown += [f"{what} in {place}" for what, value in wanted.items() if value in content]
    assert shown == []
    for kind in ("ray job list", "/logs/head.log", "/job-driver-train", "table params", "MLmodel"):
        assert any(kind in place for place in places), f"{kind} was not looked at"


def test_mlflow_lets_nobody_in_without_the_password(cluster: Machines) -> None:
    name, password = (cluster.env[f"MLFLOW_TRACKING_{what}"] for what in ("USERNAME", "PASSWORD"))
    uri = f"{cluster.env['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/get?experiment_id=0"
    answers = [
        requests.get(uri, auth=login, timeout=60).status_code
        for login in (None, (name, "wrong"), ("admin", password), (name, password))
    ]
    assert answers == [401, 401, 401, 200]


def test_files_with_secrets_are_for_their_owner_alone(cluster: Machines) -> None:
    wanted = secrets_of(cluster).values()
    for path in cluster.folder.glob("secrets/*"):
        assert path.stat().st_mode & 0o77 == 0, path
    assert (cluster.folder / "env").stat().st_mode & 0o77 == 0
    holding = subprocess.run(
        ["grep", "-rlF", "-f", "-", str(cluster.folder), "--exclude-dir=secrets"],
        input=b"\n".join(wanted),
        capture_output=True,
    )
    assert holding.stdout.decode().split() == [str(cluster.folder / "env")]
