"""What a person sees in a browser: the report of a set, MLflow's pages of a run and a version."""

from pathlib import Path

import pytest
from browser import CHROMIUM, Page, opened
from mlflow_server import Server
from shard_sets import write_shard_set
from small_training import fit, small_config

from pipelines.report import report
from pipelines.shards import load_manifest
from training import tracking
from training.metrics import Tracker
from training.registry.package import register
from training.registry.versions import NAME

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; install it to see")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_loads_whole_and_fits_a_telephone(copy, tmp_path, width):
    report(str(copy))
    page = opened((copy / "report" / "index.html").as_uri(), tmp_path, width)
    assert (page.errors, page.broken, page.too_wide) == ([], [], 0)
    assert load_manifest(str(copy)).plan_id[:12] in page.text


@pytest.fixture
def server(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    running = Server(tmp_path)
    running.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.uri)
    yield running
    running.kill()


def test_mlflow_shows_a_run_in_groups_and_its_version_with_tags(server, tmp_path):
    uri = write_shard_set(tmp_path / "set")
    config, manifest = small_config(), load_manifest(uri)
    client = tracking.connect(tracking.tracking_uri(), write=True)
    run = tracking.open_run(client, config, manifest, uri).info
    trained = fit(config, uri, tmp_path / "run")
    tracker = Tracker(tracking.tracking_uri(), run.run_id)
    for step, line in trained.logged:
        tracker.log(line, step)
    tracker.finish()
    version = register(client, run.run_id, trained.last, manifest, config)

    place = f"{server.uri}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    page = opened(f"{place}/model-metrics", tmp_path, picture=tmp_path / "run.png")
    assert theirs_aside(page) == [] and page.broken == []
    assert "\ntrain\n" in page.text and "\nval\n" in page.text, page.text
    version_page = f"{server.uri}/#/models/{NAME}/versions/{version}"
    page = opened(version_page, tmp_path, picture=tmp_path / "version.png")
    assert theirs_aside(page) == [] and page.broken == []
    assert "candidate" in page.text and "validation_status" in page.text


def theirs_aside(page: Page) -> list[str]:
    """Without what MLflow's own page asks a server that has no users."""
    return [error for error in page.errors if "/users/current" not in error]
