"""Fixtures of the attacks through a bad store. A pytest plugin."""

import secrets
from collections.abc import Iterator

import boto3
import pytest
from seaweed import Seaweed
from store_proxy import Proxy, proxied


@pytest.fixture(scope="session")
def good_store(seaweed: Seaweed) -> dict[str, str]:
    """What leads a process to a store without faults."""
    return seaweed.environment()


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
