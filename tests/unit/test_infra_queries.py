"""Alerts and graphs ask in PromQL for metrics that the code exports."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
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

ALERTS = [rule for file in documents(RULES) for group in file["groups"] for rule in group["rules"]]
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


def test_every_query_is_promql_over_metrics_and_labels_that_the_code_exports() -> None:
    exported = exported_metrics()
    assert exported["ray_alexnet_build_rejected_total"] == ("out", "reason")
    assert exported["ray_alexnet_train_loss"] == ("run",)
    shown = set()
    for name, query in queries():
        used = list(selectors(query))
        assert used, name
        shown |= {selector.name for selector in used}
        labels = {m.name for selector in used for m in selector.matchers.matchers}
        for kept in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
            labels |= set(kept.split(", "))
        assert all(labels <= {*exported[selector.name]} for selector in used), name
    assert shown == set(exported)  # and each of them is shown somewhere
    for query in ("sum by (out (x)", "rate(ray_x)", "sum(rate(x[5m])) !! 2"):
        with pytest.raises(ValueError, match=r"\S"):
            promql_parser.parse(query)


def test_texts_and_variables_name_labels_that_their_queries_have() -> None:
    for alert in ALERTS:
        (label,) = set(re.findall(r"\bby \((\w+)\)", alert["expr"]))
        assert set(re.findall(r"\$labels\.(\w+)", str(alert["annotations"]))) == {label}
    variables = GRAPHS["templating"]["list"]
    for variable in variables:
        asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
        assert asked and asked[2] == variable["name"]
        assert asked[2] in exported_metrics()[asked[1]]
    used = set(re.findall(r"\$(\w+)", DASHBOARD.read_text())) - {"__rate_interval"}
    assert used == {variable["name"] for variable in variables}


def test_grafana_finds_the_dashboard_and_prometheus_the_rules_and_the_nodes() -> None:
    services = documents(COMPOSE)[0]["services"]
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
    uids = {value for way, value in walk(GRAPHS) if way[-2:] == ("datasource", "uid")}
    assert uids == {source["uid"]}
    (scrape,) = documents(SCRAPE)
    assert set(scrape["rule_files"]) == {Path(mounts["./monitoring/rules.yml"]).name}
    (nodes,) = scrape["scrape_configs"][0]["dns_sd_configs"]
    ray = {name for name, each in services.items() if each.get("command", [""])[0] == "ray"}
    assert set(nodes["names"]) == ray
    for name in ray:
        assert f"--metrics-export-port={nodes['port']}" in services[name]["command"]
