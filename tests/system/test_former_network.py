"""Weights of the network that `paper` was before: refused in one line that names the difference."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gated import FORCED, champion, enter_candidate_copy, files_of
from mlflow.tracking import MlflowClient
from registered import AGAIN, GOOD, Built, resealed
from small_training import fit, small_config

from alexnet.errors import UserError
from pipelines.shards import load_manifest
from training import checkpoint, tracking
from training.network import load_model
from training.recipes import known_differences
from training.registry import __main__ as registry
from training.registry import champions, gate
from training.registry.gate import Asked
from training.registry.package import register
from training.registry.versions import DESCRIPTION, NAME, SUMS

DIFFERENCE = "dropout before fc6 and fc7, not on their outputs; LRN across both halves of the maps"
PAPER = small_config(name="of-2012", recipe="paper", model_variant="paper")


@pytest.fixture
def client(registered_models: Built, home: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    return enter_candidate_copy(registered_models, home, monkeypatch)


@pytest.fixture(scope="module")
def trained(registered_models: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run of the present network."""
    return fit(PAPER, registered_models.data, tmp_path_factory.mktemp("paper")).last


def changed(file: Path, change: Callable[[dict], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def told(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        call()
    line = str(refused.value)
    assert DIFFERENCE in line and "\n" not in line
    return line


def test_checkpoint_is_loaded_and_continued_only_with_the_present_network(trained, tmp_path):
    trained = shutil.copytree(trained, tmp_path / "copy")
    digest = checkpoint.load_state(trained)["manifest"]
    checkpoint.refuse_other(checkpoint.load_state(trained), "it", PAPER, digest)
    with torch.no_grad():
        load_model(str(trained)).network(torch.zeros(1, 3, 227, 227))
    changed(trained / "state.json", lambda state: state.pop("dropout"))
    state = hashlib.sha256((trained / "state.json").read_bytes()).hexdigest()
    changed(trained / "hashes.json", lambda hashes: hashes.update({"state.json": state}))
    assert "another release" in told(lambda: load_model(str(trained)))
    former = checkpoint.load_state(trained)
    line = told(lambda: checkpoint.refuse_other(former, "it", PAPER, digest))
    assert "choose another --name" in line


def test_run_is_continued_only_with_the_present_network(client, registered_models):
    manifest = load_manifest(registered_models.data)
    run_id = tracking.open_run(client, PAPER, manifest, registered_models.data).info.run_id
    assert tracking.find_run(client, PAPER, manifest).info.run_id == run_id
    client.delete_tag(run_id, "dropout")
    assert "choose another --name" in told(lambda: tracking.find_run(client, PAPER, manifest))


def test_version_says_which_dropout_its_weights_are_for_and_the_card_what_differs(
    client, registered_models, trained
):
    data = registered_models.data
    manifest = load_manifest(data)
    run_id = tracking.open_run(client, PAPER, manifest, data).info.run_id
    number = register(client, run_id, trained, manifest, PAPER)
    version = client.get_model_version(NAME, number)
    assert (version.tags["variant"], version.tags["dropout"]) == ("paper", "outputs")
    card = Path(client.download_artifacts(run_id, "card/card.md")).read_text()
    assert f"its source\n\n{known_differences('paper')}\n\n## Figures" in card
    given = load_model(number)
    assert torch.equal(
        given.network(x := torch.randn(1, 3, 227, 227)), load_model(str(trained)).network(x)
    )
    assert "dropout" not in client.get_model_version(NAME, GOOD).tags


def former_version(client: MlflowClient, folder: Path) -> str:
    """GOOD's files in `folder`, as an earlier release would have written of `paper`."""
    fields = {"variant": "paper", "gate_val_top1": "1.0"}
    changed(folder / DESCRIPTION, lambda description: description["model"].update(variant="paper"))
    resealed(folder)
    sums = {"artifacts_sha256": hashlib.sha256((folder / SUMS).read_bytes()).hexdigest()}
    good = client.get_model_version(NAME, GOOD)
    tags = good.tags | sums | fields
    return str(client.create_model_version(NAME, str(folder), good.run_id, tags=tags).version)


def test_former_version_is_neither_loaded_nor_judged_nor_compared(client, tmp_path, capsys):
    folder = shutil.copytree(files_of(client, GOOD), tmp_path / "model")
    assert "dropout" not in json.loads((folder / DESCRIPTION).read_text())["model"]
    number = former_version(client, folder)
    assert "release that wrote it" in told(lambda: load_model(number))
    for argv in (["promote", number], ["promote", GOOD]):
        assert registry.main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"version {number} is of the former network `paper` ({DIFFERENCE})" in line
        client.set_registered_model_alias(NAME, "champion", number)
    assert gate.promote(client, GOOD, FORCED).outcome == "forced"
    found = gate.promote(client, AGAIN, Asked())
    assert found.outcome == "passed", "which is not compared with the best of the former network"
    champions.rollback(client)
    champions.rollback(client)
    assert champion(client) == number, "whose own code still serves it"
    assert gate.promote(client, number, Asked()) is None
