"""docs/operations.md says what is so: its flags parse, its table is printed, its names exist."""

import math
import re
from pathlib import Path

import pytest
from drawn import ROOT
from manifests import exported_metrics
from registered import MLFLOW_WARNINGS

from benchmarks import cost_estimate, cost_model, results, summary
from benchmarks.cost_estimate import INSTANCES, Instance, building, training
from pipelines.plan import Recipe
from training.run import parse

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]

DOCUMENT = (ROOT / "docs" / "operations.md").read_text()
_CODE = re.findall(r"^    (.+)$|`([^`\n]+)`", DOCUMENT, re.MULTILINE)
COMMANDS = sorted({(block or inline).strip() for block, inline in _CODE})


def test_flags_that_are_named_alone_are_flags_of_the_training():
    flags = re.findall(r"`(--[a-z.-]+(?: [a-z0-9:]+)?)`", DOCUMENT)
    known = [f for f in flags if not re.match(r"--(dry-run|name|price|dash|met|run|app|shuf)", f)]
    assert {"--workers 2:8", "--cpus-per-worker"} <= set(known)
    for flag in known:
        name, _, value = flag.partition(" ")
        value = (
            value
            or {
                "--cpus-per-worker": "2",
                "--cache-gb": "5",
                "--checkpoint-minutes": "5",
                "--decoded-gb": "50",
                "--optim.lr": "0.1",
                "--data": "OUT",
            }[name]
        )
        parse(["baseline", name, value])


def test_metrics_of_the_document_are_those_of_the_code():
    made = set(exported_metrics())
    told = set()
    for row in re.findall(r"^\| (`ray_alexnet.*?) \|", DOCUMENT, re.MULTILINE):
        first, *others = re.findall(r"`([\w…]+)`", row)
        prefix = re.match(r"ray_alexnet_(?:build|train)_", first)[0]
        told |= {first} | {name.replace("…_", prefix) for name in others if "…_" in name}
    assert told == made and len(made) == 17
    for expression in (c for c in COMMANDS if "by (" in c):
        assert set(re.findall(r"ray_\w+", expression)) <= made


def test_table_of_costs_is_the_printed_one_and_its_example_too(capsys):
    assert cost_estimate.main([]) == 0
    assert capsys.readouterr().out in DOCUMENT
    assert cost_estimate.main(["--price", "p5.48xlarge=60"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"for p5.48xlarge: {last.split('|')[-2].strip()} USD for 90 epochs" in DOCUMENT
    for wrong in (["--price", "p5=1"], ["--price", "p5.48xlarge=x"], ["--epochs", "0"]):
        assert cost_estimate.main(wrong) == 2
        assert wrong[0] in capsys.readouterr().err


def test_hours_of_a_build_are_those_of_the_slower_of_cpus_and_network():
    alone = Instance("", cpus=2, network=1e12)
    assert building(alone).hours == pytest.approx(1_331_167 / 546 / 3600)
    assert building(alone).bound_by == "CPUs"
    slow = Instance("", cpus=1000, network=1e9)
    assert building(slow).bound_by == "network"
    assert building(slow).hours == pytest.approx(1_331_167 * 135_700 / (0.115e9) / 3600)
    assert Recipe().bytes_per_sample == pytest.approx(cost_estimate.STORED_SAMPLE_BYTES, rel=0.01)


def test_hours_of_a_training_are_those_of_the_cost_model():
    machine = next(i for i in INSTANCES if i.name == "p5.48xlarge")
    assert machine.cluster().images_per_second == pytest.approx(50_000, rel=0.01)
    assert machine.cluster().decode == 24 * 2880
    found = training(machine, 4096, 90).hours
    each = cost_model.step(machine.cluster(), 8, 512, 2).seconds
    assert found == pytest.approx(90 * 1_281_167 / 4096 * each / 3600)
    few = Instance("", cpus=8, network=1e12, gpus=8, flops=989e12, inside=476e9)
    assert training(few, 4096, 90).bound_by == "data"


def test_figures_of_the_sizing_follow_from_the_measured_ones():
    build, decode = cost_estimate.BUILD_PER_CORE, cost_model.DECODE_PER_CORE
    read, written = (build * size / 1e6 for size in (113e3, 22.7e3))
    assert f"{build:.0f} images/s, reading {read:.0f} MB/s and writing {written:.0f}" in DOCUMENT
    assert f"{build:.0f} and {decode:,.0f} images/s per CPU" in DOCUMENT
    few, many = (math.ceil(rate / decode) for rate in (16_000, 50_000))
    needed = f"its images/s / {decode:,.0f}: {many} for 50,000, {few} for 16,000"
    assert needed in DOCUMENT
    assert round(1_331_167 * 22.7e3 / 1e9) == 30 and round(1_281_167 * 22.7e3 / 1e9) == 29
    assert round(50_000 * 22.7e3 * 8 / 1e9) == 9
    assert round(62_378_344 * 8 / 1e9, 2) == 0.50


@pytest.mark.parametrize("theme", ["builder", "loader"])
def test_rates_of_the_sizing_lie_within_the_spread_of_the_newest_result(theme):
    _, row, column = summary.COMPARED[theme]
    per_core = {"builder": cost_estimate.BUILD_PER_CORE, "loader": cost_model.DECODE_PER_CORE}
    found = [r for r in results.newest() if (r.name, r.hardware) == (theme, "amd-epyc-2cpus")]
    assert found
    for result in found:
        low, high = re.search(r"\[([\d.]+)\.\.([\d.]+)\]", result.cell(row, column)).groups()
        assert float(low) / 2 <= per_core[theme] <= float(high) / 2


def test_links_lead_to_files_and_the_document_stays_short():
    links = re.findall(r"\]\(([^)#]+)\)", DOCUMENT)
    assert links and all((Path(ROOT) / "docs" / link).exists() for link in links)
    assert len(DOCUMENT.splitlines()) < 270
