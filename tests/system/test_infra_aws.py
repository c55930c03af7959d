"""What the manifests for AWS promise: spot, roles instead of keys, no port open to the world."""

import ipaddress
import json
import re
from typing import Any

import cfnlint.decode
import pytest
from manifests import ACCESS, CLUSTER, INFRA, documents, version

(LAUNCHER,) = documents(CLUSTER)
NODES = LAUNCHER["available_node_types"]


@pytest.fixture(scope="module")
def resources() -> Any:
    template, _ = cfnlint.decode.decode(str(ACCESS))
    return json.loads(json.dumps(template))["Resources"]


def test_workers_are_spot_and_the_head_is_not() -> None:
    market = {
        name: node["node_config"].get("InstanceMarketOptions") for name, node in NODES.items()
    }
    spot = {"MarketType": "spot"}
    assert market == {"head": None, "cpu": spot, "gpu": spot}
    assert NODES["head"]["resources"] == {"CPU": 0}


def test_machines_have_roles_closed_groups_and_metadata_by_token_alone() -> None:
    for name, node in NODES.items():
        config = node["node_config"]
        assert config["MetadataOptions"] == {"HttpTokens": "required"}, name
        # Left away, Ray would open port 22 to the world, take a role with all of S3 and EC2, and
        # start an image whose driver is too old.
        assert config["SecurityGroupIds"] == ["SECURITY_GROUP"], name
        assert config["ImageId"] == "AMI", name
        assert all(disk["Ebs"]["Encrypted"] for disk in config["BlockDeviceMappings"]), name


def test_profiles_of_the_machines_are_those_that_the_template_makes(resources: Any) -> None:
    used = {node["node_config"]["IamInstanceProfile"]["Name"] for node in NODES.values()}
    made = {
        each["Properties"]["InstanceProfileName"]
        for each in resources.values()
        if each["Type"] == "AWS::IAM::InstanceProfile"
    }
    assert used == made == {"alexnet-head", "alexnet-jobs"}


def test_launcher_installs_nothing_over_the_image() -> None:
    """Ray fills in what is left away, with wheels of its own nightly builds."""
    from ray.autoscaler._private.util import prepare_config

    prepared = prepare_config(json.loads(json.dumps(LAUNCHER)))
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert prepared[name] == [], name
    assert prepared["docker"]["image"] == f"REGISTRY/alexnet-workflow:{version()}-cuda"


def test_image_of_the_launcher_has_the_programs_that_it_calls_in_containers() -> None:
    stages = re.split(r"^FROM ", (INFRA / "Dockerfile").read_text(), flags=re.MULTILINE)
    (packages,) = (stage for stage in stages if stage.startswith("base AS cuda-packages"))
    assert {"openssh-client", "rsync"} <= set(packages.split())
    assert "HOME=/home/alexnet" in stages[1]


def test_token_is_where_every_container_looks_for_it() -> None:
    options = LAUNCHER["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options
    mounted = {source: target for target, source in LAUNCHER["file_mounts"].items()}
    assert f"-e RAY_AUTH_TOKEN_PATH={mounted.pop('infra/secrets/ray_token')}" in options
    assert mounted == {"infra/secrets/mlflow_login": "/home/alexnet/.mlflow/credentials"}


def test_dashboard_is_reached_through_ssh_alone() -> None:
    start = next(line for line in LAUNCHER["head_start_ray_commands"] if "--head" in line)
    assert "--dashboard-host=127.0.0.1" in start


def test_security_group_lets_in_one_address_range_and_itself(resources: Any) -> None:
    template, _ = cfnlint.decode.decode(str(ACCESS))
    (rule,) = resources["Machines"]["Properties"]["SecurityGroupIngress"]
    assert (rule["FromPort"], rule["ToPort"], rule["CidrIp"]) == (22, 22, {"Ref": "SshFrom"})
    among = resources["AmongMachines"]["Properties"]
    assert among["SourceSecurityGroupId"] == among["GroupId"] == {"Ref": "Machines"}
    pattern = template["Parameters"]["SshFrom"]["AllowedPattern"]
    assert re.fullmatch(pattern, "203.0.113.7/32") and re.fullmatch(pattern, "10.1.0.0/16")
    for wide in ("0.0.0.0/0", "10.0.0.0/8"):
        assert ipaddress.ip_network(wide) and not re.fullmatch(pattern, wide)


def test_only_the_head_may_start_machines_and_nobody_has_every_right(resources: Any) -> None:
    statements = {
        name: [
            (action, statement["Resource"])
            for way in ("PolicyDocument", "Policies")
            for document in [each["Properties"].get(way)]
            if document
            for part in (document if isinstance(document, list) else [{"PolicyDocument": document}])
            for statement in part["PolicyDocument"]["Statement"]
            for action in as_list(statement["Action"])
        ]
        for name, each in resources.items()
        if "Properties" in each
    }
    launchers = {
        name for name, rights in statements.items() for a, _ in rights if a == "ec2:RunInstances"
    }
    assert launchers == {"HeadRole"}
    for name, rights in statements.items():
        for action, where in rights:
            assert action != "*" and not action.startswith(("s3:*", "iam:*")), name
            assert where != "*" or action.startswith("ec2:"), (name, action)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_pods_take_the_roles_that_their_service_accounts_name(resources: Any) -> None:
    from manifests import KUBERNETES

    accounts = {
        each["metadata"]["name"]: each["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        for path in KUBERNETES
        for each in documents(path)
        if each["kind"] == "ServiceAccount"
    }
    trusted = {}
    for each in resources.values():
        if each["Type"] == "AWS::IAM::Role" and "RoleName" in each["Properties"]:
            text = each["Properties"]["AssumeRolePolicyDocument"]["Fn::Sub"]
            (statement,) = json.loads(text)["Statement"]
            condition = statement["Condition"]["StringEquals"]
            _, namespace, account = condition["${OidcIssuer}:sub"].rsplit(":", 2)
            assert namespace == "alexnet"
            assert condition["${OidcIssuer}:aud"] == "sts.amazonaws.com"
            name = each["Properties"]["RoleName"]
            trusted[account] = f"arn:aws:iam::ACCOUNT:role/{name}"
    assert trusted == accounts
