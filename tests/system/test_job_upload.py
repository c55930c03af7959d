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
WRITTEN = (
    ".demo/shards/train-000000.tar",
    ".alexnet/mlflow.db",
    ".hypothesis/examples/1",
    "data/ILSVRC2012_img_train.tar",
    "raw/train/n01440764/n01440764_10026.JPEG",
    "RAW/val/n01440764/ILSVRC2012_val_00000293.JPEG",
    "OUT/manifest.json",
    "shards/SHA256SUMS",
    "figures/conv1.png",
    "evaluation/evaluation.json",
    "predictions/predictions.parquet",
    "runs/baseline-1/checkpoint-000100/state.json",
    "mlruns/0/meta.yaml",
    "mlartifacts/1/models/m-1/artifacts/MLmodel",
    "mlflow.db",
    "mlflow.db-wal",
    "set.parquet",
    "sheet.png",
    "cat.jpg",
    "infra/secrets/ray_token",
    "ray_token",
    "pgpass",
    "mlflow_password",
    "aws_credentials",
    "server.env",
    ".env",
    "tls.pem",
)


def uploaded(checkout: Path, folder: Path, *, gitignore: bool = True) -> zipfile.ZipFile:
    """The archive of a job with this working directory."""
    archive = folder / "upload.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(checkout), archive, include_gitignore=gitignore, excludes=excludes)
    return zipfile.ZipFile(archive)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git knows here, or the whole folder where there is no git, with a user's own things."""
    copy = tmp_path_factory.mktemp("upload") / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".venv", "__pycache__", ".*_cache")
        )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    for name in (
        ".git/objects/pack/big.pack",
        ".venv/lib/torch.so",
        "training/__pycache__/run.cpython-311.pyc",
        *WRITTEN,
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"x" * 2_000_000)
    return copy


def test_a_job_takes_the_code_of_the_packages_along_and_nothing_else(checkout, tmp_path):
    with uploaded(checkout, tmp_path) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    inside = {name for name in names if "/" in name}
    assert {name.split("/")[0] for name in inside} == PACKAGES
    expected = {
        str(path.relative_to(checkout))
        for package in PACKAGES
        for path in (checkout / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert inside == expected
    assert "training/registry/policy.toml" in inside
    assert {"pyproject.toml", "constraints.txt"} <= names - inside


def test_data_results_and_secrets_are_ignored_by_git_and_by_ray_alone(checkout, tmp_path):
    with uploaded(checkout, tmp_path, gitignore=False) as archive:
        assert sorted({*archive.namelist()} & {*WRITTEN}) == []
    asked = subprocess.run(
        ["git", "check-ignore", "--no-index", *WRITTEN], cwd=ROOT, capture_output=True, text=True
    )
    if asked.returncode == 128:
        pytest.skip("this checkout is without git")
    assert sorted(set(WRITTEN) - set(asked.stdout.splitlines())) == []
