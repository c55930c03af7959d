"""Stores of other makes: those that refuse checksums, conditional PUTs or newer listings."""

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from store_proxy import Answer, Habit, Proxy, Request, Weather, error_of, proxied

from alexnet.errors import UserError
from pipelines import command, s3, storage

pytest_plugins = ["bad_store"]

CHECKSUMS = "x-amz-checksum-", "x-amz-sdk-checksum-"
CONDITION = "if-none-match"
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


def refusing(*headers: str, by: tuple[int, str], log: list[Request] | None = None) -> Habit:
    def habit(request: Request) -> Request | Answer:
        if log is not None:
            log.append(request)
        return error_of(*by) if has(request, *headers) else request

    return habit


def losing(*headers: str) -> Habit:
    """A gateway that drops headers, so that the server finds another signature."""

    def habit(request: Request) -> Request:
        kept = [entry for entry in request.headers if not entry[0].lower().startswith(headers)]
        return replace(request, headers=kept)

    return habit


def used(bucket: str) -> None:
    """All that the storage promises, on whatever store that is."""
    uri = f"{bucket}/set/file"
    assert not storage.exists(uri)
    storage.write_new(uri, b"first")
    storage.write_new(uri, b"first")  # a retry
    with pytest.raises(UserError, match="already exists with different contents"):
        storage.write_new(uri, b"other")
    assert storage.read(uri) == b"first"
    assert storage.size(uri) == 5
    storage.write(uri, b"second")
    assert storage.read(uri, 2) == b"cond"
    assert storage.list_files(bucket) == [("set/file", 6)]
    storage.delete(uri)
    assert not storage.exists(uri)


def noted(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was noted, once each, without the store and the code."""
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: http://127.0.0.1:") for line in lines)
    return [re.sub(r"^.* refuses (.*?) \(.*", r"\1", line) for line in lines]


@pytest.mark.parametrize(
    ("which", "by"),
    [
        ("checksums", REFUSALS[0]),
        ("conditional PUTs", REFUSALS[0]),
        *(("both", by) for by in REFUSALS),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_a_store_that_refuses_an_option_is_used_without_it_and_that_is_noted_once(
    which: str,
    by: tuple[int, str],
    bucket: str,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(s3, "_TRIES", 2)  # where a refusal looks like damage
    headers = {"checksums": CHECKSUMS, "conditional PUTs": (CONDITION,)}
    chosen = headers.pop(which, (*CHECKSUMS, CONDITION))
    proxy.habit = refusing(*chosen, by=by)
    used(bucket)
    assert noted(capsys) == (["checksums", "conditional PUTs"] if which == "both" else [which])
    log: list[Request] = []
    proxy.habit = refusing(*chosen, by=by, log=log)
    used(bucket)
    assert not [request for request in log if has(request, *chosen)], "it was asked for again"


@pytest.mark.parametrize("header", [*CHECKSUMS, CONDITION])
def test_a_header_that_is_lost_on_its_way_is_not_taken_for_wrong_credentials(
    header: str, bucket: str, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.habit = losing(header)  # the server says SignatureDoesNotMatch by itself
    storage.write_new(f"{bucket}/first", b"data")  # the very first request
    used_by_many(f"{bucket}/many")
    assert storage.read(f"{bucket}/first") == b"data"
    lost = {"if-none-match": ["conditional PUTs"], "x-amz-checksum-": ["checksums"]}
    assert noted(capsys) == lost.get(header, [])


def used_by_many(bucket: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        uris = [f"{bucket}/{number}" for number in range(16)]
        list(pool.map(storage.write_new, uris, [bytes([n]) for n in range(16)]))
        assert list(pool.map(storage.read, uris)) == [bytes([n]) for n in range(16)]


def test_of_threads_that_meet_refusals_together_none_fails(
    bucket: str, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.habit = refusing(*CHECKSUMS, CONDITION, by=(400, "InvalidRequest"))
    used_by_many(bucket)
    assert noted(capsys) == ["checksums", "conditional PUTs"]


def test_a_setting_for_requests_alone_still_lets_answers_be_refused(
    bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    log: list[Request] = []
    proxy.habit = refusing(*CHECKSUMS, by=(400, "InvalidArgument"), log=log)
    used(bucket)
    assert not [request for request in log if request.method == "PUT" and has(request, *CHECKSUMS)]
    assert noted(capsys) == ["checksums"]


@pytest.mark.parametrize("where", ["environment", "config file"])
def test_botocores_own_settings_are_obeyed(
    where: str,
    bucket: str,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ("request_checksum_calculation", "response_checksum_validation")
    if where == "environment":
        for name in settings:
            monkeypatch.setenv(f"AWS_{name.upper()}", "when_required")
    else:
        lines = [f"{name} = when_required" for name in settings]
        (tmp_path / "config").write_text("\n".join(["[default]", *lines]))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    log: list[Request] = []
    proxy.habit = refusing("never", by=(400, ""), log=log)
    used(bucket)
    assert not [request for request in log if has(request, *CHECKSUMS)]
    assert noted(capsys) == []


def test_bytes_that_change_on_their_way_are_noticed_without_checksums_too(
    bucket: str, proxy: Proxy
) -> None:
    proxy.habit = refusing(*CHECKSUMS, by=(400, "InvalidRequest"))
    proxy.weather = Weather(0, 0.4, ["bit flipped in the upload"])
    for number in range(10):
        storage.write_new(f"{bucket}/{number}", bytes(1000))
        storage.write(f"{bucket}/{number}", bytes(number))
    assert proxy.fair().faults["bit flipped in the upload"] > 3
    assert all(storage.read(f"{bucket}/{n}") == bytes(n) for n in range(10))


@pytest.fixture
def careless(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A store that stores whatever arrives, behind a proxy."""
    import os

    with proxied(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.mark.parametrize("etag", ["of the bytes", "of something else"])
def test_what_a_careless_store_damages_is_stored_again_or_told_and_not_left_there(
    etag: str, careless: Proxy, s3: str
) -> None:
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


def test_a_request_that_is_refused_for_itself_is_told_as_it_was_first(
    bucket: str, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = iter(["EntityTooLarge", *["AnotherCode"] * 20])
    proxy.habit = lambda request: error_of(400, next(codes)) if request.method == "PUT" else request
    for write in (storage.write_new, storage.write):
        with pytest.raises(UserError, match="answered EntityTooLarge: a fault of this test"):
            write(f"{bucket}/file", b"data")
        codes = iter(["EntityTooLarge", *["AnotherCode"] * 4])
    assert noted(capsys) == []


@pytest.mark.parametrize(
    "action",
    [
        lambda uri: storage.exists(uri),
        lambda uri: storage.read(uri),
        lambda uri: storage.list_files(uri),
        lambda uri: storage.write_new(uri, b"data"),
        lambda uri: storage.write(uri, b"data"),
        lambda uri: storage.delete(uri),
    ],
    ids=["exists", "read", "list", "write_new", "write", "delete"],
)
def test_wrong_credentials_are_told_after_one_more_request_at_most(
    action: Callable[[str], object],
    bucket: str,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log: list[Request] = []
    proxy.habit = refusing("never", by=(400, ""), log=log)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        with pytest.raises(UserError, match=r"refused the credentials.*check AWS_ACCESS_KEY_ID"):
            action(f"{bucket}/file")
    assert len(log) <= 2
    assert noted(capsys) == []


def without_tokens(proxy: Proxy, request: Request) -> Request | Answer:
    """As a store answers that takes a newer listing for one of the older kind."""
    if not request.is_list:
        return request
    answer = proxy.ask(request)
    body = re.sub(rb"<(NextContinuationToken|KeyCount)>.*?</\1>", b"", answer.body)
    return replace(answer, body=body)


@pytest.mark.parametrize(
    ("unknown", "expected"),
    [
        ("list-type=2", ["ListObjectsV2"]),
        ("encoding-type", ["encoding-type"]),
        ("list-type=2|encoding-type", ["ListObjectsV2", "encoding-type"]),
        ("its tokens", []),
    ],
)
def test_an_older_store_is_listed_whole(
    unknown: str,
    expected: list[str],
    careless: Proxy,
    s3: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = f"{s3}/older-{len(unknown)}"
    names = ["a b", "c%20d", *(f"{number:02d}" for number in range(9)), "ü"]
    for name in names:
        storage.write_new(f"{folder}/{name}", name.encode())
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "4")

    def habit(request: Request) -> Request | Answer:
        if unknown == "its tokens":
            return without_tokens(careless, request)
        refused = request.method == "GET" and re.search(unknown, request.target)
        return error_of(400, "InvalidArgument") if refused else request

    careless.habit = habit
    for _ in range(2):
        assert storage.list_files(folder) == sorted((name, len(name.encode())) for name in names)
    assert noted(capsys) == expected
