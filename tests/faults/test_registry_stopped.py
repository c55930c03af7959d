"""Commands of the registry that are stopped, or whose server is killed: one line, and whole."""

import signal
import time
from pathlib import Path

import pytest
from gated import enter_whole_copy
from mlflow.tracking import MlflowClient
from mlflow_server import Server
from registered import GOOD, MLFLOW_WARNINGS, Built
from scripts import Script, only_in_long_runs

from training.registry.versions import aliases

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]

PROMOTE = ["-m", "training.registry", "promote", GOOD, "--force", "--reason", "noon"]


@pytest.fixture
def client(
    registered_models: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MlflowClient:
    return enter_whole_copy(registered_models, tmp_path / "home", monkeypatch)


def test_stopped_promotion_ends_with_130_one_line_and_nothing_half_moved(attack, client, tmp_path):
    number = attack.draw.choice([signal.SIGTERM, signal.SIGINT])
    script = Script(PROMOTE, tmp_path / "home", tmp_path / "log")
    try:
        time.sleep(0.15)  # the interpreter itself
        time.sleep(attack.draw.uniform(0, 12))
        script.send(number)
        code = script.wait()
    finally:
        script.end()
    assert code in (0, 130) and "Traceback" not in script.said, script.said
    champion = aliases(client).get("champion")
    assert champion in (None, GOOD)
    if code == 130:
        assert "interrupted" in script.said.splitlines()[-1]
    attack.survived(number.name, "promote")


def test_promotion_whose_server_is_killed_is_finished_by_the_same_command(
    attack, request, client, tmp_path, monkeypatch
):
    only_in_long_runs(request)
    place = tmp_path / "home", tmp_path / "log"
    server = Server(tmp_path / "home")
    (tmp_path / "home" / "mlflow.db").rename(tmp_path / "home" / "server.db")
    try:
        server.start()
        script = Script(PROMOTE, *place, MLFLOW_TRACKING_URI=server.uri)
        time.sleep(attack.draw.uniform(3, 14))
        server.kill()
        code = script.wait()
        if code != 0:
            assert code == 2 and "Traceback" not in script.said, script.said
            assert script.said.splitlines()[-1].startswith("error: ")
        server.start()
        script = Script(PROMOTE, *place, MLFLOW_TRACKING_URI=server.uri)
        assert script.wait() == 0, script.said
        there = MlflowClient(tracking_uri=server.uri, registry_uri=server.uri)
        assert aliases(there)["champion"] == GOOD
    finally:
        script.end()
        server.kill()
    attack.survived("SIGKILL", "MLflow server, promote")
