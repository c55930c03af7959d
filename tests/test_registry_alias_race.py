"""Two that move the same alias at once."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from drawn import ROOT
from gated import AFTER, TAGS, champion, enter_bare_copy, locked, state
from mlflow.tracking import MlflowClient
from registered import MLFLOW_WARNINGS
from waiting import wait_until

from training.registry.alias import Refused, move

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]


@pytest.fixture
def client(bare_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    return enter_bare_copy(bare_store, tmp_path, monkeypatch)


ONE_OF_TWO = """
import sys
from training import tracking
from training.registry.alias import Refused, move

client = tracking.connect(tracking.tracking_uri())
print("ready", flush=True)
sys.stdin.readline()
try:
    move(client, "champion", "1", sys.argv[1], {"previous_champion": "1"})
except Refused as refusal:
    print(f"refused: {refusal}")
else:
    print("won")
"""


def test_of_two_processes_exactly_one_wins_and_the_other_is_told(client):
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ONE_OF_TWO, version],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for version in ("2", "3")
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert sorted(line.split(":")[0] for line in told) == ["refused", "won"]
    winner = ("2", "3")[told.index("won")]
    assert champion(client) == winner and not locked(client)
    (lost,) = [line for line in told if line != "won"]
    assert f"champion changed from version 1 to version {winner} meanwhile" in lost


def test_second_waits_for_the_first_and_is_then_refused(client, caplog):
    inside, go_on = threading.Event(), threading.Event()
    set_alias = client.set_registered_model_alias

    def slow(*args):
        inside.set()
        go_on.wait(200)
        set_alias(*args)

    client.set_registered_model_alias = slow
    first = threading.Thread(target=move, args=(client, "champion", "1", "2", TAGS))
    first.start()
    assert inside.wait(120)
    other, outcome = MlflowClient(), []

    def second() -> None:
        try:
            move(other, "champion", "1", "3", {})
        except Refused as refusal:
            outcome.append(str(refusal))

    waiting = threading.Thread(target=second)
    waiting.start()
    wait_until(lambda: "waiting: champion from version 1 to version 2" in caplog.text)
    assert waiting.is_alive()
    go_on.set()
    first.join(120)
    waiting.join(120)
    assert outcome == ["champion changed from version 1 to version 2 meanwhile; promote again"]
    assert state(other) == AFTER
