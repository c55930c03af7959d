"""pipelines/s3.py: how long a store is waited for, with a clock that nobody waits for."""

from types import SimpleNamespace

import pytest
from botocore import exceptions as boto
from botocore.exceptions import ClientError

from pipelines import s3

GONE = boto.EndpointConnectionError(endpoint_url="http://store")
CUT = boto.IncompleteReadError(actual_bytes=1, expected_bytes=2)


def answer(status: int, code: str) -> ClientError:
    metadata = {"HTTPStatusCode": status}
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": metadata}, "GetObject")


BUSY, FORBIDDEN = answer(503, "SlowDown"), answer(403, "AccessDenied")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited, in seconds."""
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        assert len(waited) < 1000, "it is waited for ever"
        waited.append(seconds)

    clock = SimpleNamespace(monotonic=lambda: sum(waited), sleep=sleep)
    monkeypatch.setattr(s3, "time", clock)
    return waited


class Store(s3._Store):
    """Whose requests end in these errors one after the other, the last one for ever, and then, for
    None, in an answer."""

    def __init__(self) -> None:
        super().__init__(None, {frozenset(): None})
        self.asked = 0

    def answers(self, *ends: Exception | None) -> int:
        """How often it was asked. Raises the last error."""
        before = self.asked

        def request(_: object) -> str:
            self.asked += 1
            error = ends[min(self.asked - before, len(ends)) - 1]
            if error is not None:
                raise error
            return "answer"

        try:
            assert self.ask(request) == "answer"
        finally:
            self.last = self.asked - before
        return self.last


@pytest.mark.parametrize("error", [GONE, BUSY])
def test_a_store_that_has_answered_is_waited_for_as_long_as_a_restart_takes(error, pauses):
    store = Store()
    for _ in range(2):  # one that never answered is not waited for
        with pytest.raises(type(error)):
            store.answers(error)
        assert (store.last, pauses) == (1, [])
    assert store.answers(None) == 1
    assert store.answers(*[error] * 9, None) == 10
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3, 3, 3, 3])
    pauses.clear()
    with pytest.raises(type(error)):
        store.answers(error)
    assert s3._PATIENCE - 3 <= sum(pauses) < s3._PATIENCE


def test_a_refusal_is_told_at_once_and_shows_that_there_is_a_store(pauses):
    store = Store()
    with pytest.raises(ClientError):
        store.answers(FORBIDDEN)
    assert (store.last, pauses) == (1, [])
    assert store.answers(GONE, None) == 2
    assert pauses == [0.1]


def test_what_arrives_damaged_is_asked_for_again_a_few_times(pauses):
    store = Store()
    assert store.answers(CUT, CUT, None) == 3
    with pytest.raises(boto.IncompleteReadError):
        store.answers(CUT)
    assert store.last == s3._TRIES
