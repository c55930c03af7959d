"""Every manifest fits what its reader wants, and no longer once a field's name is misspelled."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import cfnlint.decode
import pytest
from manifest_checks import complaints, kuberay_schema
from manifests import (
    ACCESS,
    CLUSTER,
    COMPOSE,
    DASHBOARD,
    INFRA,
    KUBERAY,
    KUBERNETES,
    PROVISIONING,
    RULES,
    SCRAPE,
    documents,
    walk,
)

MANIFESTS = [COMPOSE, *KUBERAY, *KUBERNETES, CLUSTER, ACCESS, RULES, SCRAPE, DASHBOARD]
MANIFESTS += PROVISIONING

# Where keys are names that the author chose and no field: misspelled consistently, all is well.
NAMES = [
    (COMPOSE, r"x-.*|(services|volumes|secrets)/[^/]+"),
    (CLUSTER, r"available_node_types/[^/]+|file_mounts/.*"),
    (ACCESS, r"(Parameters|Conditions|Resources|Outputs)/[^/]+|.*/Condition/StringEquals/.*"),
]


@pytest.fixture(params=MANIFESTS, ids=lambda path: str(path.relative_to(INFRA)))
def manifest(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    if path in KUBERAY and kuberay_schema("RayJob") is None:
        pytest.skip("KubeRay's schemas are not here: set ALEXNET_TEST_DATA to the data folder")
    return path


@functools.cache
def loaded(path: Path) -> list[Any]:
    if path != ACCESS:
        return documents(path)
    template, errors = cfnlint.decode.decode(str(path))  # knows !Ref and its like
    assert not errors
    return [template]


def test_all_manifests_are_checked() -> None:
    files = {path for kind in ("*.yaml", "*.yml", "*.json") for path in INFRA.rglob(kind)}
    assert {path for path in files if "secrets" not in path.parts} == set(MANIFESTS)


def test_manifest_is_accepted(manifest: Path) -> None:
    assert complaints(manifest, loaded(manifest)) == []


def test_every_misspelled_field_is_refused(manifest: Path) -> None:
    """Each key of the file in turn, with its first letter doubled."""
    tried, missed = 0, []
    for path in fields(manifest):
        misspelled = plain(loaded(manifest))
        rename(misspelled, path)
        tried += 1
        if not complaints(manifest, misspelled):
            missed.append("/".join(map(str, path)))
    assert tried > 5
    assert missed == []


def fields(path: Path) -> list[tuple[Any, ...]]:
    """The ways to all keys that are fields; for CloudFormation's slow reader each field once, in
    whatever resource it is."""
    names = [pattern for file, pattern in NAMES if file == path]
    found: dict[Any, tuple[Any, ...]] = {}
    for way, _ in walk(plain(loaded(path))):
        spelled = "/".join(map(str, way[1:]))
        if way and isinstance(way[-1], str) and not any(re.fullmatch(n, spelled) for n in names):
            alike = tuple(step for step in way[3:] if isinstance(step, str))
            found.setdefault(alike if path == ACCESS and alike else way, way)
    return list(found.values())


def plain(value: Any) -> Any:
    """Mappings and lists of their own, where aliases in the file had made several the same."""
    return json.loads(json.dumps(value))


def rename(document: Any, path: tuple[Any, ...]) -> None:
    *outer, key = path
    for step in outer:
        document = document[step]
    items = list(document.items())
    document.clear()
    document.update((key[0] + key if name == key else name, value) for name, value in items)
