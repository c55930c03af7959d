"""What each manifest is held against: the schema that its reader uses, and the names it refers to.

`complaints` gives one line for each thing that is wrong, in real files and in misspelled ones.
"""

import functools
import importlib.resources
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import kubernetes_validate
import manifests
from cfnlint.config import ConfigMixIn
from cfnlint.decode.decode import decode_str
from cfnlint.runner import Runner
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from known_settings import is_setting
from manifest_commands import CommandError, check_ray_flags
from manifests import pod_templates, settings, walk

KUBERNETES_VERSION = "1.34"
RESOURCES = {"cpu", "memory", "nvidia.com/gpu", "storage"}


def complaints(path: Path, documents: list[Any]) -> list[str]:
    """Empty where all is well."""
    if path == manifests.COMPOSE:
        return _compose(documents[0])
    if path in manifests.KUBERAY:
        return [line for each in documents for line in _kuberay(each)]
    if path in manifests.KUBERNETES:
        found = [line for each in documents for line in _kubernetes(each)]
        return found or _selectors(path, documents) + list(_read_elsewhere(documents))
    if path == manifests.CLUSTER:
        return _launcher(documents[0])
    if path == manifests.ACCESS:
        return _cloudformation(documents[0])
    if path == manifests.DASHBOARD:
        return _dashboard(documents[0])
    schema = {manifests.RULES: "rules", manifests.SCRAPE: "scrape"} | {
        each: each.stem for each in manifests.PROVISIONING
    }
    return _against(_our_schema(schema[path]), documents[0])


def kuberay_schema(kind: str) -> Any | None:
    """Derived from KubeRay's definitions, and stricter than the API server, which drops unknown
    fields in silence. None where the data folder is absent."""
    folder = os.environ.get("ALEXNET_TEST_DATA")
    path = Path(folder or "/nonexistent") / "schemas" / f"kuberay-v1-{kind.lower()}.schema.json"
    return _json(path) if path.exists() else None


@functools.cache
def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _against(schema: Any, document: Any) -> list[str]:
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [f"{list(error.path)}: {error.message}" for error in validator.iter_errors(document)]


def _compose(document: Any) -> list[str]:
    vendored = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    found = _against(_json(Path(str(vendored / "compose-spec.json"))), document)
    if found:
        return found
    for name, service in document["services"].items():
        for group in ("secrets", "volumes"):
            used = {str(each).split(":")[0] for each in service.get(group, [])}
            named = {each for each in used if re.match(r"\w", each)}
            found += [f"{name}: no {group} {each}" for each in named - document[group].keys()]
        waited = service.get("depends_on", {}).keys() - document["services"].keys()
        found += [f"{name} waits for no service: {each}" for each in waited]
    return found + _unknown_settings(document)


def _kuberay(document: Any) -> list[str]:
    schema = kuberay_schema(str(document.get("kind")))
    found = _against(schema, document) if schema else ["no schema for this kind is at hand"]
    if found:
        return found
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        try:
            check_ray_flags(group["rayStartParams"])
        except CommandError as error:
            found.append(str(error))
    # Schemas of custom resources leave metadata open: any core object shows whether it is right.
    found += _kubernetes(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}
    )
    for template in pod_templates(document):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        found += _kubernetes(pod)
        metadata = template.get("metadata", {})
        if metadata.get("labels") != {"app.kubernetes.io/name": "alexnet-ray"}:
            found.append("a pod lacks the label by which the network policies know it")
        scraped = {"prometheus.io/scrape": "true", "prometheus.io/port": "8080"}
        if metadata.get("annotations", scraped) != scraped:
            found.append("annotations that Prometheus would not find")
    return found + _unknown_settings(document) + _unknown_resources(document)


def _kubernetes(document: Any) -> list[str]:
    return _core(json.dumps(document))


@functools.cache  # of many objects in a file, one is misspelled at a time
def _core(text: str) -> list[str]:
    document = json.loads(text)
    try:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{list(error.path)}: {error.message}"]
    except (KeyError, kubernetes_validate.SchemaNotFoundError) as error:
        return [f"neither kind nor version: {error}"]
    return _unknown_settings(document) + _unknown_resources(document)


def _unknown_settings(document: Any) -> list[str]:
    return [f"no setting: {name}" for name, _ in settings(document) if not is_setting(name)]


def _unknown_resources(document: Any) -> list[str]:
    """Of containers; Kubernetes takes any name, and would look for a node that has such a thing."""
    asked = (("resources", "limits"), ("resources", "requests"))
    names = [name for path, value in walk(document) if path[-2:] in asked for name in value]
    return [f"no such resource: {name}" for name in names if name not in RESOURCES]


def _selectors(path: Path, documents: list[Any]) -> list[str]:
    """Labels are free: only what selects them shows that they are right."""
    others = [
        each
        for file in (*manifests.KUBERNETES, *manifests.KUBERAY)
        if file != path
        for each in _read(file)
    ]
    templates = [template for each in (*documents, *others) for template in pod_templates(each)]
    pods = [template["metadata"].get("labels", {}) for template in templates]
    found = []
    for way, value in walk(documents):
        if way[-1:] == ("matchLabels",) and way[-2] == "namespaceSelector":
            if [*value] != ["kubernetes.io/metadata.name"]:
                found.append(f"no such label of a namespace: {value}")
        elif _selects(way, value) and not any(value.items() <= labels.items() for labels in pods):
            found.append(f"{way} selects no pod: {value}")
    return found


def _selects(way: tuple[Any, ...], value: Any) -> bool:
    """A Service's selector is the labels themselves, the others have them inside."""
    plain = way[-1:] == ("selector",) and "matchLabels" not in value
    return plain or way[-1:] == ("matchLabels",)


_read = functools.cache(manifests.documents)


def _read_elsewhere(documents: list[Any]) -> Iterator[str]:
    """Labels and annotations that something beside the cluster's own API reads."""
    free = {
        "Namespace": ("labels", ["pod-security.kubernetes.io/enforce"]),
        "ServiceAccount": ("annotations", ["eks.amazonaws.com/role-arn"]),
    }
    for document in documents:
        if document["kind"] in free:
            field, names = free[document["kind"]]
            if [*document["metadata"].get(field, {})] != names:
                yield f"{document['kind']} should have {field} {names}"
    named = {str(value).rpartition("/")[2] for _, value in walk(documents)}
    for name in (n for each in documents if each["kind"] == "ConfigMap" for n in each["data"]):
        if name not in named:
            yield f"nothing reads the ConfigMap's file {name}"


def _launcher(document: Any) -> list[str]:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        prepared = prepare_config(json.loads(json.dumps(document)))
        validate_config(prepared)
    except (jsonschema.ValidationError, LookupError, ValueError, AssertionError) as error:
        return [f"ray up: {type(error).__name__}: {error}"[:500]]
    schema = _json(Path(ray.autoscaler.__file__).parent / "ray-schema.json")
    # Ray lets a provider have other fields than those, and passes node_config on unseen.
    provider = document["provider"].keys() - schema["properties"]["provider"]["properties"].keys()
    found = [f"provider: no such field {name}" for name in provider]
    shape = _run_instances()
    for name, node in document["available_node_types"].items():
        request = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(request, shape)
        found += [f"{name}: {report.generate_report()}"] if report.has_errors() else []
        if node["node_config"].get("InstanceType") not in shape.members["InstanceType"].enum:
            found.append(f"{name}: no such instance type")
        found += [f"{name}: no resource {each}" for each in node["resources"].keys() - {"CPU"}]
    return found + _unknown_settings(document)


@functools.cache
def _run_instances() -> Any:
    model = botocore.session.Session().get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape


def _cloudformation(document: Any) -> list[str]:
    template, errors = decode_str(json.dumps(document))
    found = [str(match) for match in errors or _runner().validate_template(template)]
    kinds = {"AWS", "Federated", "Service"}  # which it leaves open
    return found + [
        f"{path}: no such principal"
        for path, value in walk(document)
        if path and path[-1] == "Principal" and not value.keys() <= kinds
    ]


@functools.cache  # it reads all its rules when it is made
def _runner() -> Runner:
    return Runner(ConfigMixIn(regions=["us-east-1"]))


def _dashboard(document: Any) -> list[str]:
    """Read by Grafana's own types and written again: what got lost has no such name."""
    register_default_plugins()
    try:
        again = json.loads(json.dumps(Dashboard.from_json(document), cls=JSONEncoder))
    except KeyError as error:
        return [f"Grafana misses {error}"]
    kept = dict(walk(again))
    return [
        f"{path}: Grafana reads {kept.get(path)!r}, not {value!r}"
        for path, value in walk(document)
        if (not value or not isinstance(value, dict | list)) and kept.get(path, ...) != value
    ]


def _our_schema(name: str) -> Any:
    """Of formats without a published schema: the fields that we use and no others."""
    return _json(Path(__file__).parent / "schemas" / f"{name}.schema.json")
