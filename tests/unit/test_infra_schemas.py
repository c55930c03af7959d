"""Every manifest fits what its reader wants, and not with a misspelled field."""

import functools
import json
import random
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


def test_misspelled_fields_are_refused(manifest: Path) -> None:
    """A dozen keys of the file, drawn once, each with its first letter doubled."""
    document = plain(loaded(manifest))
    names = [pattern for file, pattern in NAMES if file == manifest]
    fields = [
        way
        for way, _ in walk(document)
        if way and isinstance(way[-1], str)
        if not any(re.fullmatch(name, "/".join(map(str, way[1:]))) for name in names)
    ]
    tried = random.Random(0).sample(fields, min(len(fields), 3 if manifest == ACCESS else 12))
    missed = []
    for way in tried:
        misspelled = plain(document)
        rename(misspelled, way)
        missed += [] if complaints(manifest, misspelled) else ["/".join(map(str, way))]
    assert tried and missed == []


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
