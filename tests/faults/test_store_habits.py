"""Stores of other makes: those that refuse checksums, conditional PUTs or newer listings."""

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from promises import check_that_new_names_keep_their_bytes
from store_proxy import Answer, Habit, Proxy, Request, error_of, proxied

from alexnet.errors import UserError
from pipelines import command, s3, storage

pytestmark = pytest.mark.first

CHECKSUMS = "x-amz-checksum-", "x-amz-sdk-checksum-"
CONDITION = "if-none-match"
BOTH = (*CHECKSUMS, CONDITION)
REFUSALS = [
    (400, "InvalidArgument"),
    (400, "InvalidRequest"),
    (400, "BadRequest"),
    (400, "XAmzContentChecksumMismatch"),
    (403, "SignatureDoesNotMatch"),
    (405, "MethodNotAllowed"),
    (501, "NotImplemented"),
]


@pytest.fixture(autouse=True)
def first_meeting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process, which knows no store and has noted nothing."""
    monkeypatch.setattr(command, "_noted", set())
    s3._store_for.cache_clear()
    yield
    s3._store_for.cache_clear()


def has(request: Request, *headers: str) -> bool:
    return any(name.lower().startswith(headers) for name, _ in request.headers)


def logged(log: list[Request]) -> Habit:
    """Of the same make, but what it is asked is kept."""
    return lambda request: log.append(request) or request


def refusing(*headers: str, by: tuple[int, str] = (400, "InvalidRequest")) -> Habit:
    return lambda request: error_of(*by) if has(request, *headers) else request


def losing(header: str) -> Habit:
    """A gateway that drops a header, so that the server finds another signature."""

    def habit(request: Request) -> Request:
        kept = [entry for entry in request.headers if not entry[0].lower().startswith(header)]
        return replace(request, headers=kept)

    return habit


def used(bucket: str) -> None:
    """All that the storage promises, on whatever store that is."""
    uri = f"{bucket}/set/file"
    assert not storage.exists(uri)
    check_that_new_names_keep_their_bytes(f"{bucket}/set")
    assert storage.size(uri) == 5 and storage.read(uri, 2) == b"her"
    assert storage.list_files(bucket) == [("set/file", 5)]
    storage.delete(uri)
    assert not storage.exists(uri)


def used_by_many(bucket: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        uris = [f"{bucket}/{number}" for number in range(16)]
        list(pool.map(storage.write_new, uris, [bytes([n]) for n in range(16)]))
        assert list(pool.map(storage.read, uris)) == [bytes([n]) for n in range(16)]


def noted(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was noted, once each, without the store and the code."""
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: http://127.0.0.1:") for line in lines)
    return [re.sub(r"^.* refuses (.*?) \(.*", r"\1", line) for line in lines]


@pytest.mark.parametrize(
    ("headers", "by", "expected"),
    [
        (CHECKSUMS, REFUSALS[0], ["checksums"]),
        ((CONDITION,), REFUSALS[0], ["conditional PUTs"]),
        *((BOTH, by, ["checksums", "conditional PUTs"]) for by in REFUSALS),
    ],
)
def test_a_store_that_refuses_an_option_is_used_without_it_and_that_is_noted_once(
    headers, by, expected, bucket, proxy, monkeypatch, capsys
):
    monkeypatch.setattr(s3, "_TRIES", 2)  # where a refusal looks like damage
    proxy.habit = refusing(*headers, by=by)
    used_by_many(f"{bucket}/many")  # threads that meet the refusals together
    used(f"{bucket}/one")
    assert noted(capsys) == expected
    log: list[Request] = []
    proxy.habit = logged(log)
    used(f"{bucket}/one")
    assert not [request for request in log if has(request, *headers)], "it was asked for again"


@pytest.mark.parametrize("header", BOTH)
def test_a_header_that_is_lost_on_its_way_is_not_taken_for_wrong_credentials(
    header, bucket, proxy, capsys
):
    proxy.habit = losing(header)  # the server says SignatureDoesNotMatch by itself
    storage.write_new(f"{bucket}/first", b"data")  # the very first request
    used_by_many(f"{bucket}/many")
    assert storage.read(f"{bucket}/first") == b"data"
    lost = {CONDITION: ["conditional PUTs"], "x-amz-checksum-": ["checksums"]}
    assert noted(capsys) == lost.get(header, [])


@pytest.mark.parametrize("where", ["environment", "config file", "requests alone"])
def test_botocores_own_settings_are_obeyed(where, bucket, proxy, tmp_path, monkeypatch, capsys):
    settings = ("request_checksum_calculation", "response_checksum_validation")
    if where == "config file":
        lines = [f"{name} = when_required" for name in settings]
        (tmp_path / "config").write_text("\n".join(["[default]", *lines]))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in {"environment": settings, "requests alone": settings[:1]}.get(where, ()):
        monkeypatch.setenv(f"AWS_{name.upper()}", "when_required")
    log: list[Request] = []
    proxy.habit = logged(log)
    used(bucket)
    asked = {request.method for request in log if has(request, *CHECKSUMS)}
    assert "PUT" not in asked and (where == "requests alone") == ("GET" in asked)
    s3._store_for.cache_clear()  # now as a first meeting
    proxy.habit = refusing(*CHECKSUMS)
    used(bucket)
    assert noted(capsys) == (["checksums"] if where == "requests alone" else [])


@pytest.fixture
def careless(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A store that stores whatever arrives, behind a proxy."""
    with proxied(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.mark.parametrize("etag", ["of the bytes", "of something else"])
def test_what_a_careless_store_damages_is_stored_again_or_told_and_not_left_there(
    etag, careless, s3
):
    def habit(request: Request) -> Request | Answer:
        if has(request, *CHECKSUMS):
            return error_of(400, "InvalidRequest")
        if request.method != "PUT" or not flips:
            return request
        if flips.pop():
            request = replace(request, body=b"x" + request.body[1:])
        answer = careless.ask(request)
        return answer if etag == "of the bytes" else encrypted(answer)

    careless.habit = habit
    for write in (storage.write_new, storage.write):
        flips = [False, True]
        write(f"{s3}/{etag}", write.__name__.encode())
        assert storage.read(f"{s3}/{etag}") == write.__name__.encode()
        storage.delete(f"{s3}/{etag}")
        assert not flips
    flips = [True] * 9
    with pytest.raises(UserError, match=r"stored with other bytes.*check the network"):
        storage.write_new(f"{s3}/{etag}", b"data")
    assert not storage.exists(f"{s3}/{etag}")


def encrypted(answer: Answer) -> Answer:
    other = ("ETag", f'"{hashlib.md5(b"").hexdigest()}"')
    kept = [entry for entry in answer.headers if entry[0].lower() != "etag"]
    return replace(answer, headers=[*kept, other])


@pytest.mark.parametrize("write", [storage.write_new, storage.write])
def test_a_request_that_is_refused_for_itself_is_told_as_it_was_first(write, bucket, proxy, capsys):
    codes = iter(["EntityTooLarge", *["AnotherCode"] * 20])
    proxy.habit = lambda request: error_of(400, next(codes)) if request.method == "PUT" else request
    with pytest.raises(UserError, match="answered EntityTooLarge: a fault of this test"):
        write(f"{bucket}/file", b"data")
    assert noted(capsys) == []


@pytest.mark.parametrize(
    "action",
    [storage.exists, storage.read, storage.list_files, storage.write_new, storage.write],
)
def test_wrong_credentials_are_told_after_one_more_request_at_most(
    action, bucket, proxy, monkeypatch, capsys
):
    log: list[Request] = []
    proxy.habit = logged(log)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(UserError, match=r"refused the credentials.*check AWS_ACCESS_KEY_ID"):
        action(f"{bucket}/file", *[b"data"] * action.__name__.startswith("write"))
    assert len(log) <= 2
    assert noted(capsys) == []


@pytest.mark.parametrize(
    ("unknown", "expected"),
    [
        ("list-type=2", ["ListObjectsV2"]),
        ("encoding-type", ["encoding-type"]),
        ("list-type=2|encoding-type", ["ListObjectsV2", "encoding-type"]),
        ("its tokens", []),
    ],
)
def test_an_older_store_is_listed_whole(unknown, expected, careless, s3, monkeypatch, capsys):
    folder = f"{s3}/older-{len(unknown)}"
    names = ["a b", "c%20d", *(f"{number:02d}" for number in range(9)), "ü"]
    for name in names:
        storage.write_new(f"{folder}/{name}", name.encode())
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "4")

    def habit(request: Request) -> Request | Answer:
        if unknown == "its tokens" and request.is_list:  # a newer listing for one of the older kind
            answer = careless.ask(request)
            body = re.sub(rb"<(NextContinuationToken|KeyCount)>.*?</\1>", b"", answer.body)
            return replace(answer, body=body)
        refused = request.method == "GET" and re.search(unknown, request.target)
        return error_of(400, "InvalidArgument") if refused else request

    careless.habit = habit
    for _ in range(2):
        assert storage.list_files(folder) == sorted((name, len(name.encode())) for name in names)
    assert noted(capsys) == expected
