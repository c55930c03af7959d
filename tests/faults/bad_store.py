"""Fixtures of the attacks through a bad store. A pytest plugin."""

import secrets
from collections.abc import Iterator

import boto3
import pytest
from store_proxy import Proxy, proxied


@pytest.fixture(scope="session")
def good_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What leads a process to a store without faults: SeaweedFS, or moto where that is not
    installed."""
    from seaweed import Seaweed, started, weed_program  # a plugin: not to be imported before

    if weed_program() is not None:
        with started(tmp_path_factory.mktemp("seaweed")) as server:
            yield server.environment()
        return
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield Seaweed(f"http://{host}:{port}", "test", "test").environment()
    moto.stop()


@pytest.fixture(scope="session")
def proxy(good_store: dict[str, str]) -> Iterator[Proxy]:
    with proxied(good_store["AWS_ENDPOINT_URL"]) as running:
        yield running


@pytest.fixture
def bucket(
    good_store: dict[str, str], proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """s3:// URI of an empty bucket, which this process finds through the proxy."""
    for name, value in (good_store | {"AWS_ENDPOINT_URL": proxy.url}).items():
        monkeypatch.setenv(name, value)
    proxy.fair()
    name = f"bucket-{secrets.token_hex(4)}"
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket=name)
    yield f"s3://{name}"
    proxy.fair()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for item in page.get("Contents", []):
            client.delete_object(Bucket=name, Key=item["Key"])
    client.delete_bucket(Bucket=name)
