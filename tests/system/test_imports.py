"""What importing loads and does, in a fresh process."""

import subprocess
import sys

from drawn import ROOT

PACKAGES = ("alexnet", "pipelines", "training")


def test_importing_the_model_loads_no_ray_mlflow_or_boto3():
    code = "import sys, alexnet.model; print({'ray', 'mlflow', 'boto3'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_importing_every_module_makes_no_file_starts_no_ray_and_prints_nothing(tmp_path):
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    modules = [name.removesuffix(".__init__") for name in dotted if not name.endswith("__main__")]
    assert "training.registry.gate" in modules
    code = (
        "import sys, importlib, logging, threading, os\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "path, env = list(sys.path), set(k for k in os.environ if k.startswith('ALEXNET'))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import ray\n"
        "assert not ray.is_initialized()\n"
        "assert [p for p in sys.path if p in path] == path, 'sys.path changed'\n"
        "assert env == set(k for k in os.environ if k.startswith('ALEXNET')), 'env changed'\n"
        "assert not logging.getLogger('training').handlers, 'logging configured'\n"
    )
    home = tmp_path / "home"
    work = tmp_path / "work"
    home.mkdir()
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=work,
        env={"PATH": "/usr/bin:/bin", "HOME": str(home), "MPLCONFIGDIR": str(tmp_path / "mpl")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(work.iterdir()) == []
    assert not (home / ".alexnet").exists()
