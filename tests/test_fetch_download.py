"""pipelines/fetch.py on a connection that breaks off, and on servers that fail or lie."""

import hashlib
import re
from pathlib import Path

import pytest
from archive_server import (
    FILE,
    PICTURES,
    Server,
    part_of,
    pictures_in,
    publish,
    published,
    refusal,
    run,
)

from alexnet.errors import UserError
from pipelines import fetch


def test_a_dropped_connection_is_continued_where_it_broke_off(
    archives: Server, tmp_path: Path
) -> None:
    archives.cut_after = [700, 100]
    run(archives, tmp_path / "raw")
    assert archives.seen == [(None, 200), ("bytes=700-", 206), ("bytes=800-", 206)]
    assert pictures_in(tmp_path / "raw") == PICTURES


def test_a_later_run_continues_what_a_former_one_left(
    archives: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    monkeypatch.setattr(fetch, "_TRIES", 1)
    archives.cut_after = [900]
    assert "broke off" in refusal(archives, raw)
    assert part_of(raw).read_bytes() == archives.data[:900]
    run(archives, raw)
    assert archives.seen == [(None, 200), ("bytes=900-", 206)]
    assert pictures_in(raw) == PICTURES


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(
    archives: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, before = tmp_path / "raw", archives.data
    monkeypatch.setattr(fetch, "_TRIES", 1)
    archives.cut_after = [900]
    refusal(archives, raw)
    publish(archives, published(), monkeypatch)  # its litter differs
    assert archives.data != before
    archives.etag = '"two"'
    run(archives, raw)
    assert archives.seen == [(None, 200), ("bytes=900-", 200)]
    assert pictures_in(raw) == PICTURES


@pytest.mark.parametrize("etag", ['"one"', None])
def test_a_server_that_ignores_ranges_or_names_no_version_sends_all_again(
    archives: Server, tmp_path: Path, etag: str | None
) -> None:
    archives.ranges, archives.etag, archives.cut_after = False, etag, [900]
    run(archives, tmp_path / "raw")
    assert [status for _, status in archives.seen] == [200, 200]
    assert pictures_in(tmp_path / "raw") == PICTURES


def test_a_server_without_ranges_that_always_breaks_off_is_given_up(
    archives: Server, tmp_path: Path
) -> None:
    archives.ranges, archives.cut_after = False, [900] * 50
    assert "broke off, 5 times in a row" in refusal(archives, tmp_path / "raw")
    assert len(archives.seen) == 5


def test_a_range_that_no_longer_exists_starts_anew(archives: Server, tmp_path: Path) -> None:
    archives.cut_after, archives.statuses = [900], [200, 416]
    run(archives, tmp_path / "raw")
    assert archives.seen == [(None, 200), ("bytes=900-", 416), (None, 200)]


def test_an_error_of_the_server_is_tried_again(archives: Server, tmp_path: Path) -> None:
    archives.statuses = [500, 503]
    run(archives, tmp_path / "raw")
    assert [status for _, status in archives.seen] == [500, 503, 200]


def test_a_server_that_only_has_errors_is_one_line(archives: Server, tmp_path: Path) -> None:
    archives.statuses = [500] * 50
    line = refusal(archives, tmp_path / "raw")
    assert line.startswith(f"{archives.url}/{FILE} answered 500 Internal Server Error, 5 times")


def test_a_missing_file_is_one_line_at_once(archives: Server, tmp_path: Path) -> None:
    archives.statuses = [404]
    line = refusal(archives, tmp_path / "raw")
    assert line == f"{archives.url}/{FILE} answered 404 Not Found; check --mirror"
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_cannot_be_reached_is_one_line(archives: Server, tmp_path: Path) -> None:
    with Server() as closed:
        url = closed.url
    with pytest.raises(UserError, match=r"cannot be reached \(Connection refused\), 5 times"):
        fetch.fetch("imagenette", str(tmp_path / "raw"), "160", url)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_size_is_refused_before_it_is_downloaded(
    archives: Server, tmp_path: Path
) -> None:
    size = len(archives.data)
    archives.data += b"x"
    line = refusal(archives, tmp_path / "raw")
    assert f"has {size + 1:,} bytes, the published file {size:,}" in line
    assert list(tmp_path.iterdir()) == []


def test_other_bytes_of_the_right_size_are_removed_and_the_next_run_is_good(
    archives: Server, tmp_path: Path
) -> None:
    good = archives.data
    archives.data = good[:-1] + bytes([good[-1] ^ 1])
    line = refusal(archives, tmp_path / "raw")
    assert hashlib.md5(archives.data).hexdigest() in line
    assert hashlib.md5(good).hexdigest() in line
    assert list(tmp_path.iterdir()) == []
    archives.data = good
    run(archives, tmp_path / "raw")


def test_progress_is_told_in_plain_lines(
    archives: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fetch, "_PROGRESS_SECONDS", 0)
    archives.cut_after = [700]
    run(archives, tmp_path / "raw")
    told = capsys.readouterr().out
    lines = re.findall(r"(?m)^[\d.]+/[\d.]+ MB  [\d.]+ MB/s  ETA (?:\d+ s|\?)$", told)
    assert len(lines) >= 2
    assert "\nthe server broke off; trying again in 0.001 s\n" in told
    assert lines[-1].endswith("ETA 0 s")
    assert "\r" not in told
