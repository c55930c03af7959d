"""The manifests are checked without Docker or Kubernetes: schema, versions, commands, ports."""

import copy
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from training.run import parse

ROOT = Path(__file__).resolve().parents[1]
INFRA = ROOT / "infra"
# `ray stop` in a shell, and as an argument list; written so that this line is not found itself.
RAY_STOP = re.compile(r"\bray\s+st[o]p\b|[\"']ray[\"'],\s*[\"']st[o]p\b")
SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)


@pytest.fixture
def rayjob() -> Any:
    return yaml.safe_load((INFRA / "kuberay" / "rayjob.yaml").read_text())


@pytest.fixture
def compose() -> Any:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def schema() -> Any:
    folder = os.environ.get("ALEXNET_TEST_DATA")
    path = Path(folder or "/nonexistent") / "schemas" / "kuberay-v1-rayjob.schema.json"
    if not path.exists():
        pytest.skip("KubeRay's schema is not here: set ALEXNET_TEST_DATA to the data folder")
    return json.loads(path.read_text())


def pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}==")).split("==")[1]


def pod_specs(rayjob: Any) -> list[Any]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Every environment variable with its literal value, wherever it is in a manifest."""
    if isinstance(value, dict):
        if isinstance(value.get("environment"), dict):
            yield from value["environment"].items()
        if "name" in value and "value" in value:
            yield value["name"], value["value"]
        for inner in value.values():
            yield from settings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from settings(inner)


def test_every_yaml_file_parses_to_one_document() -> None:
    files = sorted(INFRA.rglob("*.yaml"))
    assert {file.name for file in files} >= {"compose.yaml", "rayjob.yaml"}
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text()), dict), file


def test_rayjob_fits_kuberays_schema(rayjob: Any, schema: Any) -> None:
    jsonschema.validate(rayjob, schema)


def test_a_misspelled_field_does_not_fit_the_schema(rayjob: Any, schema: Any) -> None:
    for field in ("shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"):
        broken = copy.deepcopy(rayjob)
        broken["spec"][field + "s"] = broken["spec"].pop(field)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_rayjob_names_the_pinned_ray_and_removes_its_cluster(rayjob: Any) -> None:
    spec = rayjob["spec"]
    assert spec["rayClusterSpec"]["rayVersion"] == pinned("ray")
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_rayjobs_entry_point_is_understood_by_the_real_command_line(rayjob: Any) -> None:
    python, script, *flags = shlex.split(rayjob["spec"]["entrypoint"])
    assert (python, script) == ("python", "training/run.py") and (ROOT / script).exists()
    config = parse(flags).config
    assert (config.recipe, config.workers, config.device) == ("deck", 2, "cuda")
    assert str(config.data).startswith("s3://") and str(config.storage).startswith("s3://")


def test_every_training_worker_has_a_node_and_a_gpu(rayjob: Any) -> None:
    workers = parse(shlex.split(rayjob["spec"]["entrypoint"])[2:]).config.workers
    (group,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert group["replicas"] * gpus == workers


def test_every_pod_is_limited_and_runs_without_privileges(rayjob: Any) -> None:
    images = set()
    for pod in pod_specs(rayjob):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            images.add(container["image"])
            resources = container["resources"]
            assert resources["limits"] == resources["requests"]
            assert {"cpu", "memory"} <= resources["limits"].keys()
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
    (image,) = images  # Ray refuses nodes of different versions
    assert re.fullmatch(r"REGISTRY/alexnet-workflow:\d+\.\d+\.\d+-cuda", image)


def test_manifests_hold_no_secret(rayjob: Any, compose: Any) -> None:
    for name, value in [*settings(rayjob), *settings(compose)]:
        if name.endswith(("_PATH", "_FILE")):
            assert str(value).startswith("/"), f"{name} should name a mounted file"
        else:
            assert not SECRET_NAME.search(name), f"{name} has its value in a manifest"
    assert all(set(secret) == {"file"} for secret in compose["secrets"].values())


def test_compose_listens_on_loopback_alone(compose: Any) -> None:
    for name, service in compose["services"].items():
        assert service["ports"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service.get("network_mode") is None, name
        assert service["healthcheck"]["test"][0] == "CMD", name


def test_compose_builds_the_one_image_of_this_version(compose: Any) -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    images = {service["image"] for service in compose["services"].values()}
    assert images == {f"alexnet-workflow:{version[1]}"}
    for service in compose["services"].values():
        build = service["build"]
        assert (INFRA / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).exists()


def test_dockerfile_pins_its_base_and_installs_within_the_constraints() -> None:
    text = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
    (base,) = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    installs = re.findall(r"pip install (.+?)(?:&&|$)", text, re.MULTILINE)
    assert len(installs) == 2
    assert all("constraints.txt" in install for install in installs)
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["1000:1000"]


def test_dockerfile_copies_what_exists_and_its_ignore_file_lets_through() -> None:
    text = (INFRA / "Dockerfile").read_text()
    allowed = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    assert allowed[0] == "*"
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and f"!{source}" in allowed


def test_nothing_here_ends_every_ray_on_the_host() -> None:
    files = [ROOT / "Makefile", *(ROOT / ".ci").iterdir()]
    for folder in ("infra", "tests", "benchmarks", "alexnet", "pipelines", "training"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in {".sh", ".py", ".yaml", ""}]
    scripts = [file for file in files if file.is_file()]
    assert {"Dockerfile", "Makefile", "run", "test_infra.py"} <= {file.name for file in scripts}
    for script in scripts:
        for number, line in enumerate(script.read_text().splitlines(), start=1):
            command = line.partition("#")[0]  # comments may warn of it
            # and so may docstrings; a pattern that looks for it is no command either
            quoted = script.suffix == ".py" and ("`" in command or "re." in command)
            assert quoted or not RAY_STOP.search(command), f"{script}:{number}"
