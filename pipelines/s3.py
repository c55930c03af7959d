"""Objects under s3://bucket/key, for storage.py. The only file that knows boto3.

`AWS_ENDPOINT_URL` chooses another store than Amazon's; boto3 reads it itself. Errors are boto3's:
`remedy` puts those that the user can mend into one line.

boto3 repeats a request that fails for up to a second. Beyond that a store that has answered before
is waited for, as long as a restart takes; what arrived damaged is asked for again.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from alexnet.errors import UserError

_Answer = TypeVar("_Answer")
_TRIES = 5  # of one request by boto3, and of one whose answers arrive damaged
_PATIENCE = 30.0  # seconds for which a store that has answered before is waited for
_LONGEST_PAUSE = 3.0
_SILENCE = 30.0  # seconds without a byte after which a request has failed
_AWAY = {429, 500, 502, 503, 504}
# What a store says of a body that is not what was announced, and of one that came to a halt.
_GARBLED = {
    "BadDigest",
    "IncompleteBody",
    "InvalidDigest",
    "RequestTimeout",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
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


@dataclass
class _Store:
    client: Any
    has_answered: bool = False  # one that never did may have been misnamed: told at once

    def ask(self, request: Callable[[Any], _Answer]) -> _Answer:
        """What `request` makes of the client, repeated while that may help."""
        from botocore.exceptions import ClientError

        deadline, tries, pause = time.monotonic() + _PATIENCE, 0, 0.1
        while True:
            try:
                answer = request(self.client)
                self.has_answered = True
                return answer
            except Exception as error:
                tries += 1
                away = _is_away(error)
                self.has_answered |= isinstance(error, ClientError) and not away
                wait = away and self.has_answered and time.monotonic() < deadline
                if not wait and not (_is_garbled(error) and tries < _TRIES):
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _is_away(error: Exception) -> bool:
    """Whether the store may be back soon."""
    from botocore import exceptions as s3

    if isinstance(error, s3.ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in _AWAY
    return isinstance(error, s3.ConnectionError | s3.HTTPClientError)


def _is_garbled(error: Exception) -> bool:
    """Whether request or answer were damaged on their way, or another's write was in its way."""
    from botocore import exceptions as s3
    from botocore.parsers import ResponseParserError

    if isinstance(error, s3.ClientError):
        return _code(error) in _GARBLED | {"ConditionalRequestConflict"}
    damaged = s3.IncompleteReadError | s3.ResponseStreamingError | s3.FlexibleChecksumError
    return isinstance(error, damaged | ResponseParserError)


@functools.cache
def _store_for(*_: str | None) -> _Store:
    import boto3
    from botocore.config import Config

    retries: Any = {"mode": "standard", "total_max_attempts": _TRIES}
    limits: Any = {"connect_timeout": 10, "read_timeout": _SILENCE, "max_pool_connections": 32}
    return _Store(boto3.session.Session().client("s3", config=Config(retries=retries, **limits)))


def _store() -> _Store:
    # One at a time: threads that arrive first together would each spend a second on making one.
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    with _making:
        return _store_for(*map(os.environ.get, names))


def bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{uri}: no bucket; write s3://bucket/prefix")
    return bucket, key


def read(uri: str, offset: int, length: int | None) -> bytes:
    from botocore.exceptions import ClientError

    bucket, key = bucket_and_key(uri)
    request: dict[str, Any] = {"Bucket": bucket, "Key": key}
    if offset or length is not None:
        last = "" if length is None else offset + length - 1
        request["Range"] = f"bytes={offset}-{last}"
    try:
        return _store().ask(lambda client: bytes(client.get_object(**request)["Body"].read()))
    except ClientError as error:
        if _code(error) in {"InvalidRange", "416"}:
            return b""  # the range starts at or after the end, as with a local file
        raise


def head(uri: str) -> Any:
    from botocore.exceptions import ClientError

    bucket, key = bucket_and_key(uri)
    request = {"Bucket": bucket, "Key": key, "ChecksumMode": "ENABLED"}
    try:
        return _store().ask(lambda client: client.head_object(**request))
    except ClientError as error:
        if _code(error) in _MISSING:
            return None
        raise


def list_objects(uri: str) -> list[tuple[str, int]]:
    bucket, key = bucket_and_key(uri)
    prefix = key.rstrip("/") + "/" if key else ""

    def found(client: Any) -> Iterator[tuple[str, int]]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for page in pages:
            for item in page.get("Contents", []):
                if item["Key"] != prefix:  # of the folder itself
                    yield item["Key"].removeprefix(prefix), int(item["Size"])

    return _store().ask(lambda client: list(found(client)))


def put(uri: str, data: bytes) -> None:
    request = _put_request(uri, data)
    _store().ask(lambda client: client.put_object(**request))


def delete(uri: str) -> None:
    bucket, key = bucket_and_key(uri)
    _store().ask(lambda client: client.delete_object(Bucket=bucket, Key=key))


def put_new(uri: str, data: bytes) -> bool:
    """False where there is an object already: perhaps this one, stored by a request whose answer
    was lost."""
    from botocore.exceptions import ClientError

    request = _put_request(uri, data)
    try:
        _store().ask(lambda client: client.put_object(**request, IfNoneMatch="*"))
        return True
    except ClientError as error:
        if _code(error) == "PreconditionFailed":
            return False
        if _code(error) != "NotImplemented":  # a store without conditional writes
            raise
    if head(uri) is not None:
        return False
    put(uri, data)
    return True


def _put_request(uri: str, data: bytes) -> dict[str, Any]:
    bucket, key = bucket_and_key(uri)
    return {"Bucket": bucket, "Key": key, "Body": data, "ChecksumSHA256": base64_sha256(data)}


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
    if _is_garbled(error) and not isinstance(error, s3.ClientError):
        about = " ".join(str(error).split())[:200]
        return f"{uri}: {store} sent a damaged answer ({about}); check the network and try again"
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
