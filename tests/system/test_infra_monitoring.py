"""Alerts and graphs: their metrics are exported, their queries are PromQL, and alerts fire."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from manifests import (
    COMPOSE,
    DASHBOARD,
    INFRA,
    PROVISIONING,
    RULES,
    SCRAPE,
    documents,
    exported_metrics,
    walk,
)

(ALERTS,) = (
    [rule for group in file["groups"] for rule in group["rules"]] for file in documents(RULES)
)
(GRAPHS,) = documents(DASHBOARD)
PANELS = [panel for panel in GRAPHS["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """Every PromQL expression with the name of its alert or panel, without Grafana's variables."""
    found = [(alert["alert"], alert["expr"]) for alert in ALERTS]
    for panel in PANELS:
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "1m")
            found.append((panel["title"], re.sub(r"\$(out|run)\b", ".*", query)))
    return found


def selectors(query: str) -> Iterator[Any]:
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(query), visit)
    yield from found


@pytest.mark.parametrize(("name", "query"), queries(), ids=[name for name, _ in queries()])
def test_query_is_promql_over_metrics_that_the_code_exports(name: str, query: str) -> None:
    exported = exported_metrics()
    used = list(selectors(query))
    assert used, name
    for selector in used:
        assert selector.name in exported
        assert {matcher.name for matcher in selector.matchers.matchers} <= {
            *exported[selector.name]
        }
    for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        for label in labels.split(", "):
            assert all(label in exported[selector.name] for selector in used), label


def test_every_metric_that_the_code_exports_is_on_the_dashboard() -> None:
    shown = {s.name for title, query in queries() if title[0] for s in selectors(query)}
    assert set(exported_metrics()) == shown


def test_metrics_are_read_from_the_code_with_their_kinds_and_labels() -> None:
    exported = exported_metrics()
    assert exported["ray_alexnet_build_rejected_total"] == ("out", "reason")
    assert exported["ray_alexnet_train_loss"] == ("run",)


def test_query_that_is_no_promql_is_refused() -> None:
    for query in ("sum by (out (x)", "rate(ray_x)", "sum(rate(x[5m])) !! 2"):
        with pytest.raises(ValueError, match=r"\S"):
            promql_parser.parse(query)


def test_texts_of_alerts_name_only_labels_that_their_query_keeps() -> None:
    for alert in ALERTS:
        (label,) = set(re.findall(r"\bby \((\w+)\)", alert["expr"]))
        used = set(re.findall(r"\$labels\.(\w+)", str(alert["annotations"])))
        assert used == {label}, alert["alert"]
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)


def test_variables_of_the_dashboard_are_labels_of_the_metrics_that_they_ask() -> None:
    exported = exported_metrics()
    for variable in GRAPHS["templating"]["list"]:
        asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
        assert asked and asked[2] == variable["name"]
        assert asked[2] in exported[asked[1]]
    text = DASHBOARD.read_text()
    used = set(re.findall(r"\$(\w+)", text)) - {"__rate_interval"}
    assert used == {variable["name"] for variable in GRAPHS["templating"]["list"]}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in GRAPHS["panels"]}) == len(GRAPHS["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in GRAPHS["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {
            (at["x"] + right, at["y"] + down) for right in range(at["w"]) for down in range(at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_grafana_finds_the_dashboard_and_prometheus_the_rules_and_the_nodes() -> None:
    (compose,) = documents(COMPOSE)
    services = compose["services"]
    mounts = dict(
        each.removesuffix(":ro").split(":")
        for name in ("prometheus", "grafana")
        for each in services[name]["volumes"]
        if each.startswith("./")
    )
    assert all((INFRA / source).is_file() for source in mounts)
    by_name = {path.stem: documents(path)[0] for path in PROVISIONING}
    folder = by_name["dashboards"]["providers"][0]["options"]["path"]
    assert mounts["./monitoring/grafana/alexnet.json"] == f"{folder}/alexnet.json"
    (source,) = by_name["datasource"]["datasources"]
    assert source["url"] == "http://prometheus:9090"
    uids = {value for way, value in walk(GRAPHS) if way[-2:] == ("datasource", "uid")}
    assert uids == {source["uid"]}
    (scrape,) = documents(SCRAPE)
    assert set(scrape["rule_files"]) == {Path(mounts["./monitoring/rules.yml"]).name}
    (nodes,) = scrape["scrape_configs"][0]["dns_sd_configs"]
    ray = {name for name, each in services.items() if each.get("command", [""])[0] == "ray"}
    assert set(nodes["names"]) == ray
    for name in ray:
        assert f"--metrics-export-port={nodes['port']}" in services[name]["command"]


@pytest.fixture
def promtool() -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("the program `promtool` (Debian package prometheus) is not installed")
    return program


@pytest.mark.parametrize(("kind", "path"), [("config", SCRAPE), ("rules", RULES)])
def test_prometheus_itself_accepts_the_file(promtool: str, kind: str, path: Path) -> None:
    run = subprocess.run([promtool, "check", kind, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


# Values each minute, in Prometheus' own notation, and the one alert that is then due.
FAULTS = {
    "BuildWaitsForReads": (
        {"build_wait_seconds_total": "0+40x60", "build_work_seconds_total": "0+60x60"},
        {"out": "s3://a/b"},
    ),
    "ManyRejectedImages": (
        {"build_rejected_total": "0+3x60", "build_images_total": "0+100x60"},
        {"out": "s3://a/b"},
    ),
    "TrainingStalled": ({"train_step": "70x60", "train_eta_seconds": "900x60"}, {"run": "r"}),
    "TrainingSlower": ({"train_images_per_second": "9000x20 3000x40"}, {"run": "r"}),
    "TrainingStarved": ({"train_data_wait": "0.4x60"}, {"run": "r"}),
    "AcceleratorsIdle": (
        {"train_utilization": "0.3x60", "train_data_wait": "0.1x60"},
        {"run": "r"},
    ),
    "LossIsNotFinite": ({"train_loss": " ".join(["NaN"] * 61)}, {"run": "r"}),
    "FewerWorkers": ({"train_workers": "8x10 5x50"}, {"run": "r"}),
}
HEALTHY = {
    "build_wait_seconds_total": "0+4x60",
    "build_work_seconds_total": "0+60x60",
    "build_rejected_total": "0+0x60",
    "build_images_total": "0+100x60",
    "train_step": "0+70x60",
    "train_images_per_second": "9000x60",
    "train_eta_seconds": "9000-60x60",
    "train_data_wait": "0.01x60",
    "train_utilization": "0.9x60",
    "train_loss": "6-0.01x60",
    "train_workers": "8x60",
}


def test_every_alert_has_a_fault() -> None:
    assert set(FAULTS) == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_alert_fires_for_its_fault_and_no_other_does(
    promtool: str, fault: str | None, tmp_path: Path
) -> None:
    values, labels = FAULTS[fault] if fault else ({}, {})
    series = [
        {"series": f"ray_alexnet_{name}{tags(name)}", "values": value}
        for name, value in (HEALTHY | values).items()
    ]
    tests = [
        {
            "eval_time": "1h",
            "alertname": name,
            "exp_alerts": fired(name, labels) if name == fault else [],
        }
        for name in FAULTS
    ]
    case = {"interval": "1m", "input_series": series, "alert_rule_test": tests}
    file = tmp_path / "case.yml"
    rules = tmp_path / "rules.yml"
    rules.write_text(json.dumps(without_texts()))
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "tests": [case]}))
    run = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def tags(name: str) -> str:
    """With a label of Ray's own, which the alerts have to drop."""
    own = 'out="s3://a/b"' if name.startswith("build") else 'run="r"'
    return f'{{{own}, NodeAddress="10.0.0.1"}}'


def fired(name: str, labels: dict[str, str]) -> list[Any]:
    severity = {alert["alert"]: alert["labels"]["severity"] for alert in ALERTS}
    return [{"exp_labels": labels | {"severity": severity[name]}}]


def without_texts() -> Any:
    """The rules as they are but for their texts, which hold measured numbers."""
    (rules,) = documents(RULES)
    for group in rules["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]
    return rules
