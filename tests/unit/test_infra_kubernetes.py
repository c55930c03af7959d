"""What the manifests for Kubernetes promise: limits, no privileges, GPUs for every worker, closed
ports."""

import re
import shlex
from typing import Any

import pytest
from manifests import KUBERAY, KUBERNETES, documents, pinned, pod_templates, ray_clusters, version

from training.run import parse

ALL = [document for path in (*KUBERAY, *KUBERNETES) for document in documents(path)]
JOBS = {each["metadata"]["name"]: each["spec"] for each in ALL if each["kind"] == "RayJob"}
POLICIES = {
    each["metadata"]["name"]: each["spec"] for each in ALL if each["kind"] == "NetworkPolicy"
}


def test_every_ray_cluster_asks_for_a_token_and_has_the_pinned_version() -> None:
    assert set(ray_clusters()) == {"cluster.yaml", "build-job.yaml", "train-job.yaml"}
    for name, cluster in ray_clusters().items():
        assert cluster["rayVersion"] == pinned("ray"), name
        assert cluster["authOptions"] == {"mode": "token"}, name
        # None on the head: a driver that shares its CPUs with tasks dies with them.
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", name


@pytest.mark.parametrize("name", JOBS)
def test_job_removes_its_cluster(name: str) -> None:
    assert JOBS[name]["shutdownAfterJobFinishes"] is True
    assert JOBS[name]["ttlSecondsAfterFinished"] > 0


def test_every_worker_of_the_training_gets_a_gpu_and_the_fewest_are_there_from_the_start() -> None:
    (spec,) = (spec for name, spec in JOBS.items() if name == "alexnet-train")
    python, script, *flags = shlex.split(spec["entrypoint"])
    assert (python, script) == ("python", "training/run.py")
    config = parse(flags).config
    assert (config.workers, config.min_workers, config.device) == (8, 2, "cuda")
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert group["minReplicas"] * gpus == group["replicas"] * gpus == config.min_workers
    assert group["maxReplicas"] * gpus == config.workers
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    disk = group["template"]["spec"]["volumes"][0]["emptyDir"]["sizeLimit"]
    assert int(disk.removesuffix("Gi")) > config.cache_gb


def test_build_asks_for_as_many_tasks_as_its_largest_cluster_has_cpus() -> None:
    from pipelines.cli import _parser

    words = shlex.split(JOBS["alexnet-build"]["entrypoint"])
    arguments = _parser().parse_args(words[3:])
    (group,) = JOBS["alexnet-build"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    cpus = int(container["resources"]["limits"]["cpu"])
    assert arguments.workers == group["maxReplicas"] * cpus
    assert group["minReplicas"] < group["maxReplicas"]


def pods() -> list[tuple[str, Any]]:
    """With the names of the objects that make them."""
    return [
        (document["metadata"]["name"], template["spec"])
        for document in ALL
        for template in pod_templates(document)
    ]


def test_every_pod_is_limited_and_fits_the_restricted_pod_security_standard() -> None:
    assert len(pods()) == 2 * 3 + 3 + 2  # two jobs with submitters, a cluster, MLflow, PostgreSQL
    for name, pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in pod["containers"]:
            limits = container["resources"]["limits"]
            assert limits == container["resources"]["requests"], name
            assert {"cpu", "memory"} <= limits.keys(), name
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    for name, cluster in ray_clusters().items():  # and the autoscaler, a container beside the head
        assert cluster["autoscalerOptions"]["securityContext"]["capabilities"], name
    (namespace,) = (each for each in ALL if each["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_only_what_speaks_to_kubernetes_gets_a_token_for_it() -> None:
    """The autoscaler beside a head; IRSA needs no such token."""
    for name, pod in pods():
        is_head = pod["containers"][0]["name"] == "ray-head"
        assert pod.get("automountServiceAccountToken", True) is is_head, name


def test_each_ray_cluster_is_of_one_image_and_of_this_version() -> None:
    for name, cluster in ray_clusters().items():
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        (image,) = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
        wanted = rf"REGISTRY/alexnet-workflow:{re.escape(version())}(-cuda)?"
        assert re.fullmatch(wanted, image), name
        has_gpus = "nvidia.com/gpu" in str(groups)
        assert image.endswith("-cuda") is has_gpus, name


def test_nothing_is_published_outside_of_the_cluster() -> None:
    for document in ALL:
        if document["kind"] == "Service":
            assert document["spec"].get("type", "ClusterIP") == "ClusterIP"
        assert document["kind"] != "Ingress"
    for name, cluster in ray_clusters().items():
        assert cluster["headGroupSpec"].get("serviceType", "ClusterIP") == "ClusterIP", name


def admitted(target: dict[str, str]) -> set[tuple[str, int | None]]:
    """(who, port) that policies let reach pods with these labels; None is every port."""
    found: set[tuple[str, int | None]] = set()
    for spec in POLICIES.values():
        if spec["podSelector"].get("matchLabels", target).items() <= target.items():
            for rule in spec.get("ingress", []):
                for peer in rule["from"]:
                    (selector,) = peer.values()
                    (who,) = selector["matchLabels"].values()
                    ports = [each["port"] for each in rule.get("ports", [])] or [None]
                    found |= {(who, port) for port in ports}
    return found


def test_every_port_is_closed_but_to_those_who_need_it() -> None:
    assert POLICIES["nobody-by-default"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    label = "app.kubernetes.io/name"
    assert admitted({label: "alexnet-ray"}) == {
        ("alexnet-ray", None),  # among themselves: GCS, dashboard, clients, object transfers
        ("kuberay-system", 8265),
        ("monitoring", 8080),
    }
    assert admitted({label: "mlflow"}) == {("alexnet-ray", 5000)}
    assert admitted({label: "postgres"}) == {("mlflow", 5432)}


def test_names_of_services_accounts_secrets_and_disks_meet() -> None:
    namespaces = {each["metadata"].get("namespace", "alexnet") for each in ALL}
    assert namespaces == {"alexnet"}
    by_kind: dict[str, set[str]] = {}
    for each in ALL:
        by_kind.setdefault(each["kind"], set()).add(each["metadata"]["name"])
    for name, pod in pods():
        account = pod.get("serviceAccountName")
        assert account is None or account in by_kind["ServiceAccount"], name
        mounts = {m["name"] for c in pod["containers"] for m in c.get("volumeMounts", [])}
        claims = {"data"} if name == "postgres" else set()
        assert mounts <= {volume["name"] for volume in pod.get("volumes", [])} | claims, name
    text = "\n".join(path.read_text() for path in (*KUBERAY, *KUBERNETES))
    assert set(re.findall(r"secretName: ([\w-]+)|secretKeyRef: \{name: ([\w-]+)", text)) == {
        ("mlflow-postgres", ""),
        ("", "mlflow-postgres"),
        ("", "mlflow-login"),
    }
    hosts = set(re.findall(r"http://(\w+)\.alexnet\.svc:5000|mlflow@(\w+):5432", text))
    assert {name for pair in hosts for name in pair if name} <= by_kind["Service"]
