"""A full disk while models are registered and promoted: one line, and nothing half visible."""

from collections.abc import Iterator

import pytest
from gated import enter_whole_copy
from mortal import Life, Mortals
from registered import GOOD, MLFLOW_WARNINGS
from registries import check_visible, new_run, register
from scripts import only_in_long_runs
from tmpfs import filled, tmpfs

from training.registry.versions import aliases, versions

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]


@pytest.fixture(scope="module")
def mortals() -> Iterator[Mortals]:
    with Mortals("mortal_registry") as running:
        yield running


def check_told(life: Life) -> None:
    assert life.status in (1, 2) and "Traceback" not in life.said, life.said
    assert life.said.splitlines()[-1].startswith("error: "), life.said


def test_registration_on_a_full_disk_is_finished_by_the_same_again(
    attack, request, mortals, registered_models, tmp_path, monkeypatch
):
    only_in_long_runs(request)
    with tmpfs(tmp_path / "disk", 1 << 28) as disk:
        home = disk.path / "home"
        client = enter_whole_copy(registered_models, home, monkeypatch)
        run_id, there = new_run(client, registered_models.data), len(versions(client))
        filled(disk.path / "filler", 4096 * attack.draw.randint(1, 1500))
        life = register(mortals, registered_models, home, run_id)
        check_visible(client)
        if life.status != 0:
            check_told(life)
        (disk.path / "filler").unlink()
        life = register(mortals, registered_models, home, run_id)
        assert life.status == 0, life.said
        check_visible(client)
        newest = versions(client)[0]
        assert len(versions(client)) == there + 1 and newest.run_id == run_id
        assert aliases(client)["candidate"] == str(newest.version)
    attack.survived("full disk", "registration")


def test_promotion_on_a_full_disk_is_finished_by_the_same_again(
    attack, mortals, registered_models, tmp_path, monkeypatch
):
    with tmpfs(tmp_path / "disk", 1 << 28) as disk:
        home, argv = disk.path / "home", ["promote", GOOD]
        client = enter_whole_copy(registered_models, home, monkeypatch)
        filled(disk.path / "filler", 4096 * attack.draw.randint(0, 60))
        life = mortals.live("command", argv=argv, home=home)
        check_visible(client)
        if life.status != 0:
            check_told(life)
        (disk.path / "filler").unlink()
        life = mortals.live("command", argv=argv, home=home)
        assert life.status == 0, life.said
        check_visible(client)
        assert aliases(client)["champion"] == GOOD
    attack.survived("full disk", "promote")
