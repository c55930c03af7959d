"""Objects under s3://bucket/key, for storage.py. The only file that knows boto3.

`AWS_ENDPOINT_URL` chooses another store than Amazon's; boto3 reads it itself. Errors are boto3's:
`remedy` puts those that the user can mend into one line.

boto3 repeats a request that fails for up to a second. Beyond that a store that has answered before
is waited for, as long as a restart takes; what arrived damaged is asked for again.

Not every store takes checksums, conditional PUTs or newer listings. A request that is refused is
tried without them; where that helps, it stays so and is noted.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from botocore import exceptions as boto
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from alexnet.errors import UserError
from pipelines.command import note

_Answer = TypeVar("_Answer")
_TRIES = 5  # of one request by boto3, and of one whose answers arrive damaged
_PATIENCE = 30.0  # seconds for which a store that has answered before is waited for
_LISTINGS = 16  # at the same time
_SILENCE = 30.0  # seconds without a byte after which a request has failed
_AWAY = {429, 500, 502, 503, 504}
# What a store says of a body that is not what was announced, and of one that came to a halt.
_GARBLED = {"BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InvalidDigest"}
_GARBLED |= {"RequestTimeout", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
# What a store may refuse, and what is done instead.
_CHECKSUMS, _CONDITIONS = "checksums", "conditional PUTs"
_LISTS, _ENCODING = "ListObjectsV2", "encoding-type"
_OF_CLIENTS = frozenset({_CHECKSUMS, _ENCODING})  # the others are of each request
_ALL: frozenset[str] = frozenset()  # nothing is left out
_INSTEAD = {
    _CHECKSUMS: "what is stored there is compared by its MD5, or read back",
    _CONDITIONS: "let one command at a time write to one place there",
    _LISTS: "it is asked for the older listings",
    _ENCODING: "it is asked for names as they are",
}
# Statuses for a header or parameter that a store does not know, and codes of another cause.
_UNKNOWN = {400, 405, 411, 501}
_CLEAR = {"BadDigest", "ExpiredToken", "IncompleteBody", "InvalidToken", "RequestTimeout"}
# A header that the store, or a gateway before it, leaves out of the signature. A HEAD has no code.
_UNSIGNED = {"403", "SignatureDoesNotMatch"}
_OF_REQUESTS, _OF_ANSWERS = "request_checksum_calculation", "response_checksum_validation"
# Clients are made one at a time: threads that arrive first together would each spend a second on
# one, and a session is not made for threads.
_making = threading.Lock()
_MISSING = {"404", "NoSuchKey", "NotFound"}
_ELSEWHERE = {"301", "400", "PermanentRedirect", "AuthorizationHeaderMalformed"}
# What the store says of who asks, and what that person can do.
_REFUSED = dict.fromkeys(
    ("401", "403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and that they may list, read and write there",
)
_REFUSED |= dict.fromkeys(
    ("ExpiredToken", "InvalidToken"), "renew the credentials, AWS_SESSION_TOKEN among them"
)
_REFUSED["RequestTimeTooSkewed"] = "set the clock of this machine"


def patiently(
    action: Callable[[], _Answer],
    goes_on: Callable[[Exception, int, float], bool],
    longest_pause: float = 3.0,
) -> _Answer:
    """What `action` returns, called until it succeeds. Where it fails, `goes_on` is asked with the
    error, the tries so far and the seconds until the next would begin; if it says no, the error is
    raised."""
    began, pause = time.monotonic(), 0.1
    for tries in itertools.count(1):
        try:
            return action()
        except Exception as error:  # raised again, but for what a repetition may mend
            if not goes_on(error, tries, time.monotonic() - began + pause):
                raise
        time.sleep(pause)
        pause = min(2 * pause, longest_pause)
    raise AssertionError("unreachable")


@dataclass
class _Store:
    """State: what is known of the store so far."""

    session: Any
    clients: dict[frozenset[str], Any] = field(default_factory=dict)  # by what they leave out
    has_answered: bool = False  # one that never did may have been misnamed: reported at once
    has_granted: bool = False  # anything: the credentials are good
    refused: set[str] = field(default_factory=set)  # of _INSTEAD
    # Kinds of requests that were granted, each with what it had: no later refusal is about that.
    settled: set[tuple[str, frozenset[str]]] = field(default_factory=set)

    def client(self, without: frozenset[str] = _ALL) -> Any:
        with _making:
            if without not in self.clients:
                self.clients[without] = _client(self.session, without)
            return self.clients[without]

    def ask(self, request: Callable[[Any], _Answer], without: frozenset[str] = _ALL) -> _Answer:
        """What `request` makes of the client, repeated while that may help."""

        def goes_on(error: Exception, tries: int, seconds: float) -> bool:
            away = _is_away(error)
            self.has_answered |= isinstance(error, ClientError) and not away
            wait = away and self.has_answered and seconds < _PATIENCE
            return wait or (_is_garbled(error) and tries < _TRIES)

        answer = patiently(lambda: request(self.client(without)), goes_on)
        self.has_answered = self.has_granted = True
        return answer

    def ask_any(
        self,
        kind: str,
        options: tuple[str, ...],
        request: Callable[[frozenset[str], Any], _Answer],
        is_known: Callable[[], bool] = lambda: True,
    ) -> _Answer:
        """The answer to `request`, called with those of `options` that it has and the client: all,
        or else the most that the store takes; requests of this kind are made in no other way from
        then on. Raises what it said of the first where it takes none.
        is_known: whether the store grants such credentials anything, asked where that is the doubt.
        """
        refusal = None
        subsets = (itertools.combinations(options, count) for count in range(len(options) + 1))
        for without in map(frozenset, itertools.chain(*subsets)):
            parts = frozenset(options) - without
            if parts & self.refused:
                continue
            try:
                answer = self.ask(partial(request, parts), without & _OF_CLIENTS)
            except ClientError as error:
                if (kind, parts) in self.settled or not _may_be_unknown(error):
                    raise
                refusal = refusal or error
                if _code(error) in _UNSIGNED and not (self.has_granted or is_known()):
                    break
            else:
                self.settled.add((kind, parts))
                for part in sorted(without - self.refused):
                    store = self.client().meta.endpoint_url
                    line = f"{store} refuses {part} ({_code(refusal)}); {_INSTEAD[part]}"
                    note(line, f"{part} {store}")
                self.refused |= without
                return answer
        assert refusal is not None, "the last way has nothing that could be refused before"
        raise refusal


def _is_away(error: Exception) -> bool:
    """Whether the store may be back soon."""
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in _AWAY
    return isinstance(error, boto.ConnectionError | boto.HTTPClientError)


def _is_garbled(error: Exception) -> bool:
    """Whether request or answer were damaged on their way, or another's write was in its way."""
    if isinstance(error, ClientError):
        return _code(error) in _GARBLED
    damaged = boto.IncompleteReadError | boto.ResponseStreamingError | boto.FlexibleChecksumError
    return isinstance(error, damaged | ResponseParserError)


def _may_be_unknown(error: Any) -> bool:
    """Whether it may be something optional in a request that the store refuses."""
    answer = error.response.get("ResponseMetadata", {})
    if _code(error) in _CLEAR or "x-amz-bucket-region" in answer.get("HTTPHeaders", {}):
        return False
    return answer.get("HTTPStatusCode") in _UNKNOWN or _code(error) in _UNSIGNED


@functools.cache
def _store_for(*_: str | None) -> _Store:
    import boto3

    return _Store(boto3.session.Session())


def _client(session: Any, without: frozenset[str]) -> Any:
    """With checksums where neither `without` nor the user's settings leave them out."""
    from botocore.config import Config
    from botocore.handlers import set_list_objects_encoding_type_url as encode

    retries: Any = {"mode": "standard", "total_max_attempts": _TRIES}
    limits: Any = {"connect_timeout": 10, "read_timeout": _SILENCE, "max_pool_connections": 32}
    if _CHECKSUMS in without:
        limits |= dict.fromkeys((_OF_REQUESTS, _OF_ANSWERS), "when_required")
    client = session.client("s3", config=Config(retries=retries, **limits))
    for name in ("ListObjects", "ListObjectsV2") if _ENCODING in without else ():
        client.meta.events.unregister(f"before-parameter-build.s3.{name}", encode)
    return client


def _sums(client: Any, of: str) -> tuple[str, ...]:
    """_CHECKSUMS where the client has them in its requests, or asks for them in answers.
    of: the name of botocore's setting."""
    return () if getattr(client.meta.config, of) == "when_required" else (_CHECKSUMS,)


def _store() -> _Store:
    names = (
        *("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
        *("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"),
    )
    with _making:
        return _store_for(*map(os.environ.get, names))


def bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{uri}: no bucket; write s3://bucket/prefix")
    return bucket, key


def _place(uri: str) -> dict[str, str]:
    return dict(zip(("Bucket", "Key"), bucket_and_key(uri), strict=True))


def read(uri: str, offset: int, length: int | None) -> bytes:
    request: dict[str, Any] = _place(uri)
    if offset or length is not None:
        last = "" if length is None else offset + length - 1
        request["Range"] = f"bytes={offset}-{last}"
    try:
        return _read(lambda client: bytes(client.get_object(**request)["Body"].read()))
    except ClientError as error:
        if _code(error) in {"InvalidRange", "416"}:
            return b""  # the range starts at or after the end, as with a local file
        raise


def head(uri: str) -> Any:
    def request(client: Any) -> Any:
        mode = {"ChecksumMode": "ENABLED"} if _sums(client, _OF_ANSWERS) else {}
        return client.head_object(**_place(uri), **mode)

    try:
        return _read(request)
    except ClientError as error:
        if _code(error) in _MISSING:
            return None
        raise


def _read(request: Callable[[Any], _Answer]) -> _Answer:
    store = _store()
    sums = _sums(store.client(), _OF_ANSWERS)
    return store.ask_any("read", sums, lambda parts, client: request(client))


def list_objects(uri: str) -> list[tuple[str, int]]:
    bucket, key = bucket_and_key(uri)
    prefix = key.rstrip("/") + "/" if key else ""

    def listed(parts: frozenset[str], client: Any) -> list[tuple[str, int]]:
        if _LISTS not in parts:
            return _all(client, "list_objects", bucket, prefix)
        page = client.list_objects_v2(Bucket=bucket, Prefix=prefix)
        if not page.get("IsTruncated"):
            return _entries(page)
        if "NextContinuationToken" not in page:  # a store that took it for the older one
            return listed(parts - {_LISTS}, client)
        # A page after the other takes minutes for millions of objects: folders at the same time.
        found, folders = _upper(client, bucket, prefix)
        with ThreadPoolExecutor(_LISTINGS) as pool:
            below = pool.map(
                lambda folder: _all(client, "list_objects_v2", bucket, folder), folders
            )
            return [*found, *itertools.chain.from_iterable(below)]

    found = _store().ask_any("list", (_LISTS, _ENCODING), listed, is_known=lambda: False)
    # without the folder itself
    return [(key.removeprefix(prefix), size) for key, size in found if key != prefix]


def _entries(page: Any) -> list[tuple[str, int]]:
    return [(item["Key"], int(item["Size"])) for item in page.get("Contents", [])]


def _all(client: Any, kind: str, bucket: str, prefix: str) -> list[tuple[str, int]]:
    pages = client.get_paginator(kind).paginate(Bucket=bucket, Prefix=prefix)
    return [entry for page in pages for entry in _entries(page)]


def _upper(client: Any, bucket: str, prefix: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Objects of the upper levels, and the prefixes, _LISTINGS or more where there are so many,
    that all others begin with."""
    here = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
    found, folders = list[tuple[str, int]](), list[str]()
    for page in client.get_paginator("list_objects_v2").paginate(**here):
        found += _entries(page)
        folders += [item["Prefix"] for item in page.get("CommonPrefixes", [])]
        if len(folders) < len(found):  # mostly files, which would be listed twice
            return [], [prefix]
    if len(folders) >= _LISTINGS:
        return found, folders
    deeper = [_upper(client, bucket, folder) for folder in folders]
    return (
        [*found, *(entry for entries, _ in deeper for entry in entries)],
        [below for _, prefixes in deeper for below in prefixes],
    )


def delete(uri: str) -> None:
    _store().ask(lambda client: client.delete_object(**_place(uri)))


def put(uri: str, data: bytes, *, new: bool = False) -> bool:
    """new: False where there is an object already: perhaps this one, stored by a request whose
    answer was lost."""
    store = _store()

    def stored(parts: frozenset[str], client: Any) -> bool:
        if _CONDITIONS in parts:
            return _put(uri, data, client, IfNoneMatch="*")
        return not (new and head(uri)) and _put(uri, data, client)

    kind, conditions = ("write new", (_CONDITIONS,)) if new else ("write", ())
    options = (*_sums(store.client(), _OF_REQUESTS), *conditions)
    return store.ask_any(kind, options, stored, partial(_is_known, uri))


def _put(uri: str, data: bytes, client: Any, **condition: str) -> bool:
    """False where `condition` does not hold."""
    place, by_store = _place(uri), bool(_sums(client, _OF_REQUESTS))
    md5 = hashlib.md5(b"" if by_store else data, usedforsecurity=False)
    sums = {"ContentMD5": base64.b64encode(md5.digest()).decode()}
    if by_store:
        sums = {"ChecksumSHA256": base64_sha256(data)}
    try:
        stored = client.put_object(**place, Body=data, **sums, **condition)
    except ClientError as error:
        if condition and _code(error) in {"PreconditionFailed", "412"}:
            return False
        raise
    if by_store or stored.get("ETag", "").strip('"') == md5.hexdigest():
        return True
    if client.get_object(**place)["Body"].read() != data:  # an encrypted one has another ETag
        if condition:
            client.delete_object(**place)  # it is ours, and in the way of the next try
        raise boto.FlexibleChecksumError(error_msg=f"{uri} was stored with other bytes")
    return True


def _is_known(uri: str) -> bool:
    """Whether the store grants the simplest request."""
    store = _store()
    try:
        store.ask(lambda client: client.head_object(**_place(uri)), _OF_CLIENTS)
    except ClientError as error:
        return _code(error) in _MISSING
    return True


def remedy(uri: str, error: Exception) -> str | None:
    """A line about what the user can mend; None for anything else."""
    store = os.environ.get("AWS_ENDPOINT_URL", "Amazon S3")
    said = " ".join(str(error).split())
    match error:
        case ClientError():
            line = _answer_told(error, store).strip()
        case boto.NoCredentialsError() | boto.PartialCredentialsError():
            line = "no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        case boto.ProfileNotFound() | boto.CredentialRetrievalError():
            line = f"no S3 credentials ({said}); check AWS_PROFILE"
        case boto.ParamValidationError() | boto.NoRegionError():
            line = said
        case boto.HTTPClientError() | boto.ConnectionError():  # refused, timed out, TLS
            line = f"{store} cannot be reached; check AWS_ENDPOINT_URL and the network"
        case _ if _is_garbled(error):
            line = f"{store} sent a damaged answer ({said[:200]}); check the network and try again"
        case ValueError() if "endpoint" in said.lower():
            line = f"AWS_ENDPOINT_URL={store} is not a URL"
        case _:
            return None
    return f"{uri}: {line}"


def _answer_told(error: ClientError, store: str) -> str:
    code, answer = _code(error), error.response["Error"]
    if code == "NoSuchBucket":
        return f"no such bucket at {store}; create it first"
    if code in _MISSING:
        return "not there"
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = headers.get("x-amz-bucket-region") or answer.get("Region")
    if code in _ELSEWHERE and region:
        return f"{store} has the bucket in another region; set AWS_DEFAULT_REGION={region}"
    message = " ".join(str(answer.get("Message", "")).split())
    if code in _REFUSED:
        return f"{store} refused the credentials ({code}: {message}); {_REFUSED[code]}"
    return f"{store} answered {code}: {message}"


def base64_sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
