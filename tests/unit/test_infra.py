"""All of infra/: no secret in it, everything pinned, closed to whoever needs no access."""

import configparser
import ipaddress
import json
import re
import shlex
from typing import Any

import cfnlint.decode
import pytest
import yaml
from manifests import (
    ACCESS,
    CLUSTER,
    COMPOSE,
    INFRA,
    KUBERAY,
    KUBERNETES,
    ROOT,
    documents,
    pinned,
    pod_templates,
    ray_clusters,
    settings,
    version,
    walk,
)

from pipelines.cli import _parser
from training.recipes import small_parts
from training.run import parse

SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|ACCESS_KEY|CREDENTIAL|PASS$", re.IGNORECASE)
DOCKERFILE = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
STAGES = {
    stage.splitlines()[0].split()[-1]: stage
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
}
SERVICES = documents(COMPOSE)[0]["services"]
OBJECTS = [document for path in (*KUBERAY, *KUBERNETES) for document in documents(path)]
JOBS = {each["metadata"]["name"]: each["spec"] for each in OBJECTS if each["kind"] == "RayJob"}
PODS = [
    (document["metadata"]["name"], template["spec"])
    for document in OBJECTS
    for template in pod_templates(document)
]
(LAUNCHER,) = documents(CLUSTER)
NODES = LAUNCHER["available_node_types"]
DOCUMENTS = [documents(COMPOSE)[0], LAUNCHER, *OBJECTS]


# Secrets and pins


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
    assert all(set(each) == {"file"} for each in documents(COMPOSE)[0]["secrets"].values())


def test_no_file_holds_a_key_a_password_in_a_uri_or_a_long_random_word() -> None:
    for path in (path for path in INFRA.rglob("*") if path.is_file()):
        if "secrets" in path.parts:
            continue
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN", text), path
        assert not re.search(r"://[^/\s\"'@]+:[^/\s\"'@]+@", text), path
        assert not re.search(r"\b[0-9a-f]{32,}\b", text), path
    assert "secrets/" in (INFRA / ".gitignore").read_text().split()


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


def test_images_install_by_the_constraints_and_run_as_an_ordinary_user() -> None:
    installs = re.findall(r"pip install (.+?)(?:&&|$)", DOCKERFILE, re.MULTILINE)
    assert len(installs) > 2 and all("constraints.txt" in install for install in installs)
    for target in ("cpu", "cuda", "store"):
        stage = STAGES[target]
        assert re.findall(r"^USER (\S+)", stage, re.MULTILINE) == ["1000:1000"], target
        assert "\nRUN" not in stage[stage.index("\nUSER") :], target


def test_images_are_built_of_files_that_exist_and_the_ignore_file_lets_through() -> None:
    allowed = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    assert allowed[0] == "*" and len(copied) > 5
    for source in (source for line in copied for source in line.split()[:-1]):
        assert (ROOT / source).exists() and f"!{source}" in allowed
    for service in (each for each in SERVICES.values() if "build" in each):
        build = service["build"]
        assert (INFRA / build["context"]).resolve() == ROOT and build["target"] in STAGES


def test_yaml_repeats_no_key() -> None:
    """Readers keep the last of two and say nothing."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            assert len(set(keys)) == len(keys), (node.start_mark, keys)
            return super().construct_mapping(node, deep)

    for path in [*INFRA.rglob("*.yaml"), *INFRA.rglob("*.yml")]:
        if path != ACCESS:  # CloudFormation's tags; cfn-lint sees to it
            list(yaml.load_all(path.read_text(), Strict))


# Compose


def test_every_published_port_is_on_loopback_and_no_service_has_privileges() -> None:
    for name, service in SERVICES.items():
        assert "network_mode" not in service and "privileged" not in service, name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
    assert "ports" not in SERVICES["postgres"]
    assert [name for name, each in SERVICES.items() if "cap_add" in each] == ["postgres"]


def test_every_file_named_by_a_service_is_a_secret_that_it_has() -> None:
    for name, service in SERVICES.items():
        words = [*service.get("environment", {}).values(), *service.get("command", [])]
        named = {str(word).rpartition("/")[2] for word in words if "/run/secrets/" in str(word)}
        assert named == {each for each in service.get("secrets", []) if isinstance(each, str)}, name


# Every Ray asks for a token, every MLflow for a login


def test_every_ray_asks_for_a_token_and_each_node_finds_it() -> None:
    for name in ("head", "worker", "gpu-worker"):
        environment = SERVICES[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert len(ray_clusters()) == 3
    for name, cluster in ray_clusters().items():
        assert cluster["authOptions"] == {"mode": "token"}, name
        # None on the head: a driver that shares its CPUs with tasks dies with them.
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", name
    options = LAUNCHER["docker"]["run_options"]
    mounted = {source: target for target, source in LAUNCHER["file_mounts"].items()}
    assert "-e RAY_AUTH_MODE=token" in options
    assert f"-e RAY_AUTH_TOKEN_PATH={mounted['infra/secrets/ray_token']}" in options


def test_pods_have_the_login_that_the_server_is_given() -> None:
    (container,) = next(pod["containers"] for name, pod in PODS if name == "mlflow")
    assert "--app-name=basic-auth" in container["command"]
    given = {each["name"]: each for each in container["env"]}
    user, password = (given[f"MLFLOW_AUTH_ADMIN_{what}"] for what in ("USERNAME", "PASSWORD"))
    trains = [name for name in ray_clusters() if name != "build-job.yaml"]  # builds need no MLflow
    for name in trains:
        cluster = ray_clusters()[name]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for pod in (group["template"]["spec"]["containers"][0] for group in groups):
            found = {each["name"]: each for each in pod["env"]}
            assert found["MLFLOW_TRACKING_USERNAME"]["value"] == user["value"]
            assert found["MLFLOW_TRACKING_PASSWORD"]["valueFrom"] == password["valueFrom"]
    (kept,) = (each["data"]["login.ini"] for each in OBJECTS if each["kind"] == "ConfigMap")
    (uri,) = (word for word in container["command"] if "postgresql" in word)
    assert login(kept) == login((INFRA / "mlflow-login.ini").read_text())
    assert login(kept)["database_uri"] == uri.partition("=")[2]


def login(text: str) -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read_string(text)
    return dict(parser["mlflow"])


# Kubernetes


def test_every_worker_of_the_training_has_a_gpu_and_the_minimum_is_there_from_the_start() -> None:
    python, script, *flags = shlex.split(JOBS["alexnet-train"]["entrypoint"])
    assert (python, script) == ("python", "training/run.py")
    config = parse(flags).config
    cluster = JOBS["alexnet-train"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    least = config.min_workers or config.workers
    assert group["minReplicas"] * gpus == group["replicas"] * gpus == least
    assert group["maxReplicas"] * gpus == config.workers and cluster["enableInTreeAutoscaling"]
    assert small_parts(config) is None
    volumes = {each["name"]: each["emptyDir"] for each in group["template"]["spec"]["volumes"]}
    assert config.cache == "decoded"
    assert int(volumes["data"]["sizeLimit"].removesuffix("Gi")) > config.cache_gb + 207
    assert volumes["shm"]["medium"] == "Memory"
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_build_asks_for_as_many_tasks_as_its_largest_cluster_has_cpus() -> None:
    words = shlex.split(JOBS["alexnet-build"]["entrypoint"])
    (group,) = JOBS["alexnet-build"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    cpus = int(container["resources"]["limits"]["cpu"])
    assert _parser().parse_args(words[3:]).workers == group["maxReplicas"] * cpus


def test_every_pod_is_limited_and_fits_the_restricted_pod_security_standard() -> None:
    assert len(PODS) > 10
    for name, pod in PODS:
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        # For the autoscaler beside a head alone; IRSA needs no such token.
        is_head = pod["containers"][0]["name"] == "ray-head"
        assert pod.get("automountServiceAccountToken", True) is is_head, name
        for container in pod["containers"]:
            limits = container["resources"]["limits"]
            assert limits == container["resources"]["requests"], name
            assert {"cpu", "memory"} <= limits.keys(), name
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
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


def test_names_of_services_accounts_secrets_and_disks_meet() -> None:
    by_kind: dict[str, set[str]] = {}
    for each in OBJECTS:
        assert each["metadata"].get("namespace", "alexnet") == "alexnet"
        by_kind.setdefault(each["kind"], set()).add(each["metadata"]["name"])
    for name, pod in PODS:
        assert {pod.get("serviceAccountName")} - {None} <= by_kind["ServiceAccount"], name
        mounts = {m["name"] for c in pod["containers"] for m in c.get("volumeMounts", [])}
        claims = {"data"} if name == "postgres" else set()
        assert mounts <= {volume["name"] for volume in pod.get("volumes", [])} | claims, name
    text = "\n".join(path.read_text() for path in (*KUBERAY, *KUBERNETES))
    hosts = set(re.findall(r"http://(\w+)\.alexnet\.svc:5000|mlflow@(\w+):5432", text))
    assert {name for pair in hosts for name in pair if name} <= by_kind["Service"]


# AWS


@pytest.fixture(scope="module")
def template() -> Any:
    decoded, _ = cfnlint.decode.decode(str(ACCESS))
    return json.loads(json.dumps(decoded))


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
    assert used == {
        each["Properties"]["InstanceProfileName"]
        for each in template["Resources"].values()
        if each["Type"] == "AWS::IAM::InstanceProfile"
    }


def test_launcher_installs_nothing_over_the_image() -> None:
    """Ray fills in what is left away, with wheels of its own nightly builds."""
    from ray.autoscaler._private.util import prepare_config

    prepared = prepare_config(json.loads(json.dumps(LAUNCHER)))
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert prepared[name] == [], name


def test_security_group_lets_in_one_narrow_range_and_itself(template: Any) -> None:
    (rule,) = template["Resources"]["Machines"]["Properties"]["SecurityGroupIngress"]
    assert (rule["FromPort"], rule["ToPort"], rule["CidrIp"]) == (22, 22, {"Ref": "SshFrom"})
    among = template["Resources"]["AmongMachines"]["Properties"]
    assert among["SourceSecurityGroupId"] == among["GroupId"] == {"Ref": "Machines"}
    pattern = template["Parameters"]["SshFrom"]["AllowedPattern"]
    assert re.fullmatch(pattern, "203.0.113.7/32") and re.fullmatch(pattern, "10.1.0.0/16")
    for wide in ("0.0.0.0/0", "10.0.0.0/8"):
        assert ipaddress.ip_network(wide) and not re.fullmatch(pattern, wide)


def test_only_the_head_may_start_machines_and_nobody_has_every_right(template: Any) -> None:
    launchers = set()
    for name, each in template["Resources"].items():
        for way, value in walk(each):
            if way[-1:] != ("Statement",) or "AssumeRolePolicyDocument" in way:
                continue
            for statement in value:
                actions = statement["Action"]
                for action in [actions] if isinstance(actions, str) else actions:
                    launchers |= {name} if action == "ec2:RunInstances" else set()
                    assert action != "*" and not action.startswith(("s3:*", "iam:*")), name
                    assert statement["Resource"] != "*" or action.startswith("ec2:"), name
    assert launchers == {"HeadRole"}


def test_pods_take_the_roles_that_their_service_accounts_name(template: Any) -> None:
    accounts = {
        each["metadata"]["name"]: each["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        for each in OBJECTS
        if each["kind"] == "ServiceAccount"
    }
    trusted = {}
    for each in template["Resources"].values():
        if each["Type"] == "AWS::IAM::Role" and "RoleName" in each["Properties"]:
            text = each["Properties"]["AssumeRolePolicyDocument"]["Fn::Sub"]
            (statement,) = json.loads(text)["Statement"]
            condition = statement["Condition"]["StringEquals"]
            _, namespace, account = condition["${OidcIssuer}:sub"].rsplit(":", 2)
            assert namespace == "alexnet"
            assert condition["${OidcIssuer}:aud"] == "sts.amazonaws.com"
            trusted[account] = f"arn:aws:iam::ACCOUNT:role/{each['Properties']['RoleName']}"
    assert trusted == accounts
