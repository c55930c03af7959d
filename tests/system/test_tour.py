"""docs/tour.ipynb: as it is read, with what its cells gave, and as it runs."""

from pathlib import Path

import pytest
from drawn import ROOT

PAGE = Path(ROOT, "docs", "tour.ipynb")


@pytest.mark.late
@pytest.mark.timeout(480)
@pytest.mark.filterwarnings("ignore")  # of the libraries about themselves
def test_the_notebook_runs_to_a_champion_and_was_kept_with_its_pictures(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    kept = nbformat.read(PAGE, 4)
    found = nbformat.from_dict(kept)
    client = nbclient.NotebookClient(found, timeout=300, coalesce_streams=True)
    client.execute()  # raises where a cell fails
    for notebook in (kept, found):
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell.outputs]
        kinds = [kind for each in outputs for kind in each.get("data", {}) if "image/" in kind]
        assert len(kinds) == 6
        said = "".join(output.get("text", "") for output in outputs)
        assert "version 1 is the champion: models:/alexnet@champion" in said
        assert str(ROOT) not in said
