"""What pip installs as commands: `alexnet-pipelines`, `alexnet-train` and `alexnet-registry` are
`python -m pipelines`, `python training/run.py` and `python -m training.registry`."""

import runpy
import sys


def pipelines() -> None:
    _run("pipelines.__main__")


def train() -> None:
    _run("training.run")


def registry() -> None:
    _run("training.registry.__main__")


def _run(module: str) -> None:
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        print(f"alexnet-workflow {version('alexnet-workflow')}")
        return
    runpy.run_module(module, run_name="__main__", alter_sys=True)
