"""All of infra/: it fits what its readers want, holds no secret, is pinned, and closed to whoever
needs no access; alerts and graphs ask in PromQL for metrics that the code exports."""

import functools
import json
import operator
import random
import re
import shlex
from pathlib import Path
from typing import Any

import cfnlint.decode
import promql_parser
import pytest
import yaml
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
    ROOT,
    RULES,
    SCRAPE,
    documents,
    exported_metrics,
    pinned,
    pod_templates,
    ray_clusters,
    settings,
    version,
    walk,
)

from pipelines.cli import _parser
from training.run import parse

SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|ACCESS_KEY|CREDENTIAL|PASS$", re.IGNORECASE)
(COMPOSED,) = documents(COMPOSE)
SERVICES = COMPOSED["services"]
OBJECTS = [document for path in (*KUBERAY, *KUBERNETES) for document in documents(path)]
JOBS = {each["metadata"]["name"]: each["spec"] for each in OBJECTS if each["kind"] == "RayJob"}
PODS = [
    (document["metadata"]["name"], template["spec"])
    for document in OBJECTS
    for template in pod_templates(document)
]
(LAUNCHER,) = documents(CLUSTER)
NODES = LAUNCHER["available_node_types"]
DOCUMENTS = [COMPOSED, LAUNCHER, *OBJECTS]


def test_manifests_hold_no_secret() -> None:
    found = [each for document in DOCUMENTS for each in settings(document)]
    assert len(found) > 20
    for name, value in found:
        if name.endswith(("_PATH", "_FILE", "PASSFILE")):
            files = ("/run/secrets/", "/home/alexnet/ray_token", "/etc/mlflow")
            assert str(value).startswith(files), name
        else:
            assert not SECRET_NAME.search(name), f"{name} has its value in a manifest"
    assert "Secret" not in {each["kind"] for each in OBJECTS}
    assert all(set(each) == {"file"} for each in COMPOSED["secrets"].values())


def test_no_file_holds_a_key_a_password_in_a_uri_or_a_long_random_word() -> None:
    for path in (path for path in INFRA.rglob("*") if path.is_file()):
        if "secrets" in path.parts:
            continue
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN", text), path
        assert not re.search(r"://[^/\s\"'@]+:[^/\s\"'@]+@", text), path
        assert not re.search(r"\b[0-9a-f]{32,}\b", text), path


def test_every_image_is_of_one_release_and_ours_of_this_one() -> None:
    images = [v for each in DOCUMENTS for way, v in walk(each) if way[-1:] == ("image",)]
    assert len(images) > 10
    for image in images:
        name, _, tag = image.rpartition(":")
        assert re.match(r"v?\d+\.\d+", tag), image
        assert "alexnet" not in name or tag.removesuffix("-cuda") == version(), image
    assert len({image for image in images if "postgres" in image}) == 1
    for name, cluster in ray_clusters().items():
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        (image,) = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
        assert image.endswith("-cuda") is ("nvidia.com/gpu" in str(groups)), name
        assert cluster["rayVersion"] == pinned("ray"), name


def test_images_install_what_is_pinned_of_files_that_exist_and_run_as_an_ordinary_user() -> None:
    dockerfile = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install (.+?)(?:&&|$)", dockerfile, re.MULTILINE)
    assert len(installs) > 2 and all("constraints.txt" in install for install in installs)
    stages = re.split(r"^FROM ", dockerfile, flags=re.MULTILINE)[1:]
    by_name = {stage.partition("\n")[0].split()[-1]: stage for stage in stages}
    targets = {each["build"]["target"] for each in SERVICES.values() if "build" in each}
    for target in targets | {"cuda"}:
        assert re.findall(r"^USER (\S+)", by_name[target], re.MULTILINE) == ["1000:1000"], target
    allowed = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE)
    for source in (source for line in copied for source in line.split()[:-1]):
        assert (ROOT / source).exists() and f"!{source}" in allowed


def test_every_published_port_is_on_loopback_and_no_service_has_privileges() -> None:
    for name, service in SERVICES.items():
        assert "network_mode" not in service and "privileged" not in service, name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_every_ray_asks_for_a_token_and_each_node_finds_it() -> None:
    for name in ("head", "worker", "gpu-worker"):
        environment = SERVICES[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert len(ray_clusters()) == 3
    for name, cluster in ray_clusters().items():
        assert cluster["authOptions"] == {"mode": "token"}, name
    options = LAUNCHER["docker"]["run_options"]
    mounted = {source: target for target, source in LAUNCHER["file_mounts"].items()}
    assert "-e RAY_AUTH_MODE=token" in options
    assert f"-e RAY_AUTH_TOKEN_PATH={mounted['infra/secrets/ray_token']}" in options


def test_pods_have_the_login_that_the_server_is_given() -> None:
    (container,) = next(pod["containers"] for name, pod in PODS if name == "mlflow")
    assert "--app-name=basic-auth" in container["command"]
    given = {each["name"]: each for each in container["env"]}
    user, password = (given[f"MLFLOW_AUTH_ADMIN_{what}"] for what in ("USERNAME", "PASSWORD"))
    for name, cluster in ray_clusters().items():
        if name == "build-job.yaml":  # which needs no MLflow
            continue
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for pod in (group["template"]["spec"]["containers"][0] for group in groups):
            found = {each["name"]: each for each in pod["env"]}
            assert found["MLFLOW_TRACKING_USERNAME"]["value"] == user["value"]
            assert found["MLFLOW_TRACKING_PASSWORD"]["valueFrom"] == password["valueFrom"]
    (kept,) = (each["data"]["login.ini"] for each in OBJECTS if each["kind"] == "ConfigMap")
    (uri,) = (word.partition("=")[2] for word in container["command"] if "postgresql" in word)
    assert f"database_uri = {uri}\n" in kept


# Kubernetes


def test_jobs_ask_for_as_many_workers_as_their_clusters_have_room_for() -> None:
    _, _, *flags = shlex.split(JOBS["alexnet-train"]["entrypoint"])
    config = parse(flags).config
    group, limits = only_group("alexnet-train")
    gpus = int(limits["nvidia.com/gpu"])
    least = config.min_workers or config.workers
    assert group["minReplicas"] * gpus == group["replicas"] * gpus == least
    assert group["maxReplicas"] * gpus == config.workers
    words = shlex.split(JOBS["alexnet-build"]["entrypoint"])
    group, limits = only_group("alexnet-build")
    assert _parser().parse_args(words[3:]).workers == group["maxReplicas"] * int(limits["cpu"])


def only_group(job: str) -> tuple[Any, Any]:
    """The workers of a job and what each of them may use."""
    (group,) = JOBS[job]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    return group, container["resources"]["limits"]


def test_every_pod_is_limited_and_fits_the_restricted_pod_security_standard() -> None:
    assert len(PODS) > 10
    closed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for name, pod in PODS:
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        # For the autoscaler beside a head alone; IRSA needs no such token.
        is_head = pod["containers"][0]["name"] == "ray-head"
        assert pod.get("automountServiceAccountToken", True) is is_head, name
        for container in pod["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), name
            assert container["securityContext"] == closed, name
    (namespace,) = (each for each in OBJECTS if each["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


POLICIES = [each["spec"] for each in OBJECTS if each["kind"] == "NetworkPolicy"]


def admitted(target: dict[str, str]) -> set[tuple[str, int | None]]:
    """(who, port) that policies let reach pods with these labels; None is every port."""
    found: set[tuple[str, int | None]] = set()
    for spec in POLICIES:
        if spec["podSelector"].get("matchLabels", target).items() <= target.items():
            for rule in spec.get("ingress", []):
                for peer in rule["from"]:
                    (selector,) = peer.values()
                    (who,) = selector["matchLabels"].values()
                    ports = [each["port"] for each in rule.get("ports", [])] or [None]
                    found |= {(who, port) for port in ports}
    return found


def test_every_port_is_closed_but_to_those_who_need_it() -> None:
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in POLICIES  # nobody by default
    label = "app.kubernetes.io/name"
    assert admitted({label: "alexnet-ray"}) == {
        ("alexnet-ray", None),  # among themselves: GCS, dashboard, clients, object transfers
        ("kuberay-system", 8265),
        ("monitoring", 8080),
    }
    assert admitted({label: "mlflow"}) == {("alexnet-ray", 5000)}
    assert admitted({label: "postgres"}) == {("mlflow", 5432)}
    for each in OBJECTS:
        assert each["kind"] != "Ingress"
        assert each["kind"] != "Service" or each["spec"].get("type", "ClusterIP") == "ClusterIP"
    for cluster in ray_clusters().values():
        assert cluster["headGroupSpec"].get("serviceType", "ClusterIP") == "ClusterIP"


# AWS

ARN = "arn:aws:iam::ACCOUNT:role/"


@pytest.fixture(scope="module")
def template() -> Any:
    return json.loads(json.dumps(loaded(ACCESS)[0]))


def test_machines_have_roles_closed_groups_and_metadata_by_token_alone(template: Any) -> None:
    for name, node in NODES.items():
        config = node["node_config"]
        assert config["MetadataOptions"] == {"HttpTokens": "required"}, name
        # Left away, Ray would open port 22 to the world, take a role with all of S3 and EC2, and
        # start an image whose driver is too old.
        assert config["SecurityGroupIds"] == ["SECURITY_GROUP"], name
        assert config["ImageId"] == "AMI", name
        assert all(disk["Ebs"]["Encrypted"] for disk in config["BlockDeviceMappings"]), name
    start = next(line for line in LAUNCHER["head_start_ray_commands"] if "--head" in line)
    assert "--dashboard-host=127.0.0.1" in start  # reached through SSH alone
    used = {node["node_config"]["IamInstanceProfile"]["Name"] for node in NODES.values()}
    made = [each["Properties"] for each in template["Resources"].values()]
    assert used == {e["InstanceProfileName"] for e in made if "InstanceProfileName" in e}


def test_security_group_lets_in_one_narrow_range_and_itself(template: Any) -> None:
    (rule,) = template["Resources"]["Machines"]["Properties"]["SecurityGroupIngress"]
    assert (rule["FromPort"], rule["ToPort"], rule["CidrIp"]) == (22, 22, {"Ref": "SshFrom"})
    pattern = template["Parameters"]["SshFrom"]["AllowedPattern"]
    taken = ("203.0.113.7/32", "10.1.0.0/16", "0.0.0.0/0", "10.0.0.0/8")
    assert [bool(re.fullmatch(pattern, each)) for each in taken] == [True, True, False, False]


def test_only_the_head_may_start_machines_and_nobody_has_every_right(template: Any) -> None:
    launchers = set()
    for (name, *_), statement in list(walk(template["Resources"]))[1:]:
        if not isinstance(statement, dict) or "Resource" not in statement:
            continue
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            launchers |= {name} if action == "ec2:RunInstances" else set()
            assert action != "*" and not action.startswith(("s3:*", "iam:*")), name
            assert statement["Resource"] != "*" or action.startswith("ec2:"), name
    assert launchers == {"HeadRole"}


def test_pods_take_the_roles_that_their_service_accounts_name(template: Any) -> None:
    trusted = {}
    for each in (e["Properties"] for e in template["Resources"].values()):
        if "RoleName" in each:
            (statement,) = json.loads(each["AssumeRolePolicyDocument"]["Fn::Sub"])["Statement"]
            subject = statement["Condition"]["StringEquals"]["${OidcIssuer}:sub"]
            trusted[subject] = {"eks.amazonaws.com/role-arn": ARN + each["RoleName"]}
    assert trusted == {
        f"system:serviceaccount:alexnet:{each['metadata']['name']}": each["metadata"]["annotations"]
        for each in OBJECTS
        if each["kind"] == "ServiceAccount"
    }


# Schemas

OTHERS = [CLUSTER, ACCESS, RULES, SCRAPE, DASHBOARD, *PROVISIONING]
MANIFESTS = [COMPOSE, *KUBERAY, *KUBERNETES, *OTHERS]

# Where keys are names that the author chose and no field: misspelled consistently, all is well.
NAMES = {
    COMPOSE: r"x-.*|(services|volumes|secrets)/[^/]+",
    CLUSTER: r"available_node_types/[^/]+|file_mounts/.*",
    ACCESS: r"(Parameters|Conditions|Resources|Outputs)/[^/]+|.*/Condition/StringEquals/.*",
}


@pytest.fixture(params=MANIFESTS, ids=lambda path: str(path.relative_to(INFRA)))
def manifest(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    if path in KUBERAY and kuberay_schema("RayJob") is None:
        pytest.skip("KubeRay's schemas are not here: set ALEXNET_TEST_DATA to the data folder")
    return path


def loaded(path: Path) -> list[Any]:
    return [cfnlint.decode.decode(str(path))[0]] if path == ACCESS else documents(path)


def test_all_manifests_are_checked() -> None:
    files = {path for kind in ("*.yaml", "*.yml", "*.json") for path in INFRA.rglob(kind)}
    assert {path for path in files if "secrets" not in path.parts} == set(MANIFESTS)


def test_yaml_repeats_no_key() -> None:
    """Readers keep the last of two and say nothing."""
    for path in [*INFRA.rglob("*.yaml"), *INFRA.rglob("*.yml")]:
        nodes = list(yaml.compose_all(path.read_text()))
        while nodes:
            node = nodes.pop()
            if isinstance(node, yaml.SequenceNode):
                nodes += node.value
            elif isinstance(node, yaml.MappingNode):
                keys = [key.value for key, _ in node.value if key.value != "<<"]
                assert len(set(keys)) == len(keys), (node.start_mark, keys)
                nodes += [value for _, value in node.value]


def test_manifest_is_accepted(manifest: Path) -> None:
    assert complaints(manifest, loaded(manifest)) == []


def test_misspelled_fields_are_refused(manifest: Path) -> None:
    """A dozen keys of the file, drawn once, each with its first letter doubled."""
    document = json.dumps(loaded(manifest))
    ways = [way for way, _ in walk(json.loads(document)) if way and isinstance(way[-1], str)]
    if names := NAMES.get(manifest):
        ways = [way for way in ways if not re.fullmatch(names, "/".join(map(str, way[1:])))]
    tried = random.Random(0).sample(ways, min(len(ways), 3 if manifest == ACCESS else 12))
    missed = []
    for *outer, key in tried:
        misspelled = json.loads(document)  # without the aliases that made several the same
        inner = functools.reduce(operator.getitem, outer, misspelled)
        inner[key[0] + key] = inner.pop(key)
        missed += [] if complaints(manifest, misspelled) else [(*outer, key)]
    assert tried and missed == []


# Queries

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


def selectors(query: str) -> list[Any]:
    nodes: list[Any] = []
    promql_parser.walk(promql_parser.parse(query), lambda node: nodes.append(node) or True)
    return [node for node in nodes if isinstance(node, promql_parser.VectorSelector)]


def test_every_query_is_promql_over_metrics_and_labels_that_the_code_exports() -> None:
    exported = exported_metrics()
    assert exported["ray_alexnet_build_rejected_total"] == ("out", "reason")
    assert exported["ray_alexnet_train_loss"] == ("run",)
    shown = set()
    for name, query in queries():
        used = selectors(query)
        assert used, name
        shown |= {selector.name for selector in used}
        labels = {m.name for selector in used for m in selector.matchers.matchers}
        for kept in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
            labels |= set(kept.split(", "))
        assert all(labels <= {*exported[selector.name]} for selector in used), name
    assert shown == set(exported)  # and each of them is shown somewhere
    with pytest.raises(ValueError, match="expected type matrix in call to function"):
        selectors("rate(ray_x)")


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
    volumes = SERVICES["prometheus"]["volumes"] + SERVICES["grafana"]["volumes"]
    mounts = dict(v.removesuffix(":ro").split(":") for v in volumes if v.startswith("./"))
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
    port = f"--metrics-export-port={nodes['port']}"
    assert set(nodes["names"]) == {n for n, e in SERVICES.items() if port in e.get("command", [])}
