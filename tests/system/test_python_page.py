"""docs/python.md: every block runs, one after the other, on a real set and a real registry."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from drawn import ROOT, jpeg
from registered import GOOD

from training.registry.versions import NAME


@pytest.mark.filterwarnings("ignore")  # of the libraries about themselves
def test_every_block_of_the_page_runs(
    local_ray, drawn_shards, registry, tmp_path, monkeypatch, capsys
):
    registry.set_registered_model_alias(NAME, "champion", GOOD)
    place = tmp_path / "place"
    shutil.copytree(drawn_shards, place / "shards")
    (place / "cat.jpg").write_bytes(jpeg(3))
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "pycache_prefix", None)  # which the page sets
    page = Path(ROOT, "docs", "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert len(blocks) >= 5
    said = capsys.readouterr().out
    assert "torch.Size([" in said and "image" in said
    assert names["pixels"].shape == (227, 227, 3) and isinstance(names["label"], int)
