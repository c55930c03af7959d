"""Objects under s3://bucket/key, for storage.py. The only file that knows boto3.

`AWS_ENDPOINT_URL` chooses another store than Amazon's; boto3 reads it itself. Errors are boto3's:
`remedy` puts those that the user can mend into one line.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from alexnet.errors import UserError

_TRIES = 5
_making = threading.Lock()
_MISSING = {"404", "NoSuchKey", "NotFound"}
_ELSEWHERE = {"301", "400", "PermanentRedirect", "AuthorizationHeaderMalformed"}
# What the store says of who asks, and what that person can do.
_RIGHTS = (
    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and that they may list, read and write there"
)
_REFUSED = dict.fromkeys(
    ("401", "403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    _RIGHTS,
) | {
    "ExpiredToken": "renew the credentials, AWS_SESSION_TOKEN among them",
    "InvalidToken": "renew the credentials, AWS_SESSION_TOKEN among them",
    "RequestTimeTooSkewed": "set the clock of this machine",
}


@functools.cache
def _client_for(*_: str | None) -> Any:
    import boto3
    from botocore.config import Config

    retries: Any = {"mode": "standard", "total_max_attempts": 5}
    config = Config(retries=retries, connect_timeout=10, max_pool_connections=32)
    return boto3.session.Session().client("s3", config=config)


def _client() -> Any:
    # One at a time: threads that arrive first together would each spend a second on making one.
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    with _making:
        return _client_for(*map(os.environ.get, names))


def bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{uri}: no bucket; write s3://bucket/prefix")
    return bucket, key


def read(uri: str, offset: int, length: int | None) -> bytes:
    from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError

    bucket, key = bucket_and_key(uri)
    request: dict[str, Any] = {"Bucket": bucket, "Key": key}
    if offset or length is not None:
        last = "" if length is None else offset + length - 1
        request["Range"] = f"bytes={offset}-{last}"
    for attempt in range(_TRIES):  # boto3 retries the request, not a body that breaks off
        try:
            return bytes(_client().get_object(**request)["Body"].read())
        except (HTTPClientError, IncompleteReadError):
            if attempt == _TRIES - 1:
                raise
        except ClientError as error:
            if _code(error) in {"InvalidRange", "416"}:
                return b""  # the range starts at or after the end, as with a local file
            raise
    raise AssertionError("unreachable")


def head(uri: str) -> Any:
    from botocore.exceptions import ClientError

    bucket, key = bucket_and_key(uri)
    try:
        return _client().head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    except ClientError as error:
        if _code(error) in _MISSING:
            return None
        raise


def list_objects(uri: str) -> Iterator[tuple[str, int]]:
    bucket, key = bucket_and_key(uri)
    prefix = key.rstrip("/") + "/" if key else ""
    pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    for page in pages:
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                yield item["Key"].removeprefix(prefix), int(item["Size"])


def put(uri: str, data: bytes) -> None:
    bucket, key = bucket_and_key(uri)
    _client().put_object(Bucket=bucket, Key=key, Body=data, ChecksumSHA256=base64_sha256(data))


def delete(uri: str) -> None:
    bucket, key = bucket_and_key(uri)
    _client().delete_object(Bucket=bucket, Key=key)


def put_new(uri: str, data: bytes) -> bool:
    from botocore.exceptions import ClientError

    bucket, key = bucket_and_key(uri)
    request = {"Bucket": bucket, "Key": key, "Body": data, "ChecksumSHA256": base64_sha256(data)}
    for attempt in range(_TRIES):
        try:
            _client().put_object(**request, IfNoneMatch="*")
            return True
        except ClientError as error:
            if _code(error) == "PreconditionFailed":
                return False
            if _code(error) == "NotImplemented":  # a store without conditional writes
                if head(uri) is not None:
                    return False
                _client().put_object(**request)
                return True
            if _code(error) != "ConditionalRequestConflict" or attempt == _TRIES - 1:
                raise
            time.sleep(0.2 * 2**attempt)  # another writer's PUT of this key is under way
    raise AssertionError("unreachable")


def remedy(uri: str, error: Exception) -> str | None:
    from botocore import exceptions as s3

    store = os.environ.get("AWS_ENDPOINT_URL", "Amazon S3")
    if isinstance(error, s3.NoCredentialsError | s3.PartialCredentialsError):
        return f"{uri}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, s3.ProfileNotFound | s3.CredentialRetrievalError):
        return f"{uri}: no S3 credentials ({' '.join(str(error).split())}); check AWS_PROFILE"
    if isinstance(error, s3.ParamValidationError | s3.NoRegionError):
        return f"{uri}: {' '.join(str(error).split())}"
    if isinstance(error, s3.HTTPClientError | s3.ConnectionError):  # refused, timed out, TLS
        return f"{uri}: {store} cannot be reached; check AWS_ENDPOINT_URL and the network"
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        return f"{uri}: AWS_ENDPOINT_URL={store} is not a URL"
    if not isinstance(error, s3.ClientError):
        return None
    code = _code(error)
    if code == "NoSuchBucket":
        return f"{uri}: no such bucket at {store}; create it first"
    if code in _MISSING:
        return f"{uri}: not there"
    message = " ".join(str(error.response["Error"].get("Message", "")).split())
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = headers.get("x-amz-bucket-region") or error.response["Error"].get("Region")
    if code in _ELSEWHERE and region:
        return f"{uri}: {store} has the bucket in another region; set AWS_DEFAULT_REGION={region}"
    if code in _REFUSED:
        return f"{uri}: {store} refused the credentials ({code}: {message}); {_REFUSED[code]}"
    return f"{uri}: {store} answered {code}: {message}".strip()


def base64_sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
