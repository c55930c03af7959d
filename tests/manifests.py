"""The manifests under infra/ as documents, and what is read out of them by several tests."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
INFRA = ROOT / "infra"

COMPOSE = INFRA / "compose.yaml"
CLUSTER = INFRA / "aws" / "cluster.yaml"
ACCESS = INFRA / "aws" / "access.yaml"
RULES = INFRA / "monitoring" / "rules.yml"
SCRAPE = INFRA / "monitoring" / "prometheus.yml"
DASHBOARD = INFRA / "monitoring" / "grafana" / "alexnet.json"
PROVISIONING = sorted((INFRA / "monitoring" / "grafana").glob("*.yml"))
KUBERAY = sorted((INFRA / "kuberay").glob("*.yaml"))
KUBERNETES = sorted((INFRA / "kubernetes").glob("*.yaml"))


def documents(path: Path) -> list[Any]:
    """What a YAML (or JSON) file holds; aliases and merges are written out."""
    return list(yaml.safe_load_all(path.read_text()))


def pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}==")).split("==")[1]


def version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every mapping, list and value in a document, with the way to it."""
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from walk(inner, (*path, number))


def settings(document: Any) -> Iterator[tuple[str, Any]]:
    """Every environment variable with its literal value, wherever it is in a manifest."""
    for path, value in walk(document):
        if path and path[-1] == "environment" and isinstance(value, dict):
            yield from value.items()
        elif isinstance(value, dict) and {"name", "value"} <= value.keys():
            yield value["name"], value["value"]
        elif path and path[-1] == "run_options":
            for option in value:
                if option.startswith("-e "):
                    name, _, given = option.removeprefix("-e ").partition("=")
                    yield name, given


def ray_clusters() -> dict[str, Any]:
    """The specification of each Ray cluster on Kubernetes, by the name of its file."""
    specs = {path.name: documents(path)[0]["spec"] for path in KUBERAY}
    return {name: spec.get("rayClusterSpec", spec) for name, spec in specs.items()}


def pod_templates(document: Any) -> list[Any]:
    """Every pod that a Kubernetes object makes."""
    return [
        value
        for path, value in walk(document)
        if isinstance(value, dict) and path and path[-1] in ("template", "submitterPodTemplate")
    ]


def exported_metrics() -> dict[str, tuple[str, ...]]:
    """The project's metrics as Prometheus sees them, with their labels."""
    built = _names("pipelines/progress.py", "COUNTERS")
    found = {f"ray_alexnet_build_{name}_total": ("out",) for name in built}
    found["ray_alexnet_build_rejected_total"] = ("out", "reason")
    shown = _names("training/worker.py", "GAUGES")
    found |= {f"ray_alexnet_train_{name}": ("run",) for name in shown}
    return found | {"ray_alexnet_train_restarts_total": ("run",)}


def _names(path: str, variable: str) -> list[str]:
    """The keys of a dictionary at the top of a module."""
    (found,) = (
        node.value
        for node in ast.parse((ROOT / path).read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable
    )
    return list(ast.literal_eval(found))
