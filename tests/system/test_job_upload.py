"""What `ray job submit --working-dir .` takes along, packed by Ray itself."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from drawn import ROOT
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

PACKAGES = {"alexnet", "pipelines", "training"}
# What people come to have in a checkout by commands of the documents: data, results, secrets.
_WRITTEN = """
.demo/shards/train-000000.tar .alexnet/mlflow.db .hypothesis/examples/1 set.parquet sheet.png
data/ILSVRC2012_img_train.tar raw/train/n01440764/n01440764_10026.JPEG cat.jpg OUT/manifest.json
RAW/val/n01440764/ILSVRC2012_val_00000293.JPEG shards/SHA256SUMS figures/conv1.png
evaluation/evaluation.json predictions/predictions.parquet mlruns/0/meta.yaml mlflow.db
runs/baseline-1/checkpoint-000100/state.json mlartifacts/1/models/m-1/artifacts/MLmodel
mlflow.db-wal infra/secrets/ray_token ray_token pgpass mlflow_password aws_credentials server.env
.env tls.pem
"""
WRITTEN = {*_WRITTEN.split()}


def uploaded(checkout: Path, folder: Path, *, gitignore: bool = True) -> set[str]:
    """The files in the archive of a job with this working directory."""
    archive = folder / "upload.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(checkout), archive, include_gitignore=gitignore, excludes=excludes)
    with zipfile.ZipFile(archive) as file:
        return {name for name in file.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git knows here, or the whole folder where there is no git, with a user's own things."""
    copy = tmp_path_factory.mktemp("upload") / "checkout"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        no_code = shutil.ignore_patterns(".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=no_code)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    others = [".git/objects/pack/big.pack", ".venv/lib/torch.so", "training/__pycache__/run.pyc"]
    for name in [*others, *WRITTEN]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"x")
    return copy


def test_a_job_takes_the_code_of_the_packages_along_and_nothing_else(checkout, tmp_path):
    names = uploaded(checkout, tmp_path)
    inside = {name for name in names if "/" in name}
    assert {name.split("/")[0] for name in inside} == PACKAGES
    files = [path for package in PACKAGES for path in (checkout / package).rglob("*")]
    code = {path for path in files if path.is_file() and path.suffix != ".pyc"}
    assert inside == {str(path.relative_to(checkout)) for path in code}
    assert "training/registry/policy.toml" in inside
    assert {"pyproject.toml", "constraints.txt"} <= names - inside


def test_data_results_and_secrets_are_ignored_by_git_and_by_ray_alone(checkout, tmp_path):
    assert uploaded(checkout, tmp_path, gitignore=False) & WRITTEN == set()
    command = ["git", "check-ignore", "--no-index", *WRITTEN]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if asked.returncode == 128:
        pytest.skip("this checkout is without git")
    assert WRITTEN - {*asked.stdout.splitlines()} == set()
