"""The command line of the training: a recipe or a saved config, and the fields that flags change.

python training/run.py [RECIPE] [--config FILE] [flags]
"""

import argparse
import contextlib
import dataclasses
import inspect
import io
import json
import logging
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import TypeAdapter, ValidationError

from alexnet import FORMER_RECIPES, renamed
from alexnet.errors import UserError
from pipelines import storage
from training.config import RETIRED, WHERE_AND_HOW_MANY, TrainConfig, completed, to_dict
from training.lease import job_id
from training.recipes import RECIPES

logger = logging.getLogger("training")


@dataclass(frozen=True)
class Command:
    config: TrainConfig
    action: Literal["train", "print", "dry-run"]


def parse(argv: list[str]) -> Command:
    """The config of the recipe named first (`baseline` by default) or of the FILE of --config, with
    the fields that flags change, and what to do with it. --help prints and raises SystemExit.

    A recipe named beside a FILE of another one takes from it where and with how many to train, not
    what, and not its name. Raises UserError, in one line, for whatever cannot be.
    """
    named, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    if named in FORMER_RECIPES:
        logger.info(f"recipe {named} is now called {FORMER_RECIPES[named]}")
        named = FORMER_RECIPES[named]
    if named is not None:
        _refuse_unknown(named)
    _refuse_retired(flags)
    file, flags = _read_first(flags)
    base = _base(named, file)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            line = tyro.cli(
                _Line,
                default=_Line(training=base),
                args=flags,
                prog=_prog(base, flags),
                description=_description(base.recipe),
            )
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue())) from None
    if line.print_config and line.dry_run:
        raise UserError("--print-config and --dry-run exclude each other; pass one of them")
    action: Literal["train", "print", "dry-run"] = "dry-run" if line.dry_run else "train"
    return Command(line.training, "print" if line.print_config else action)


def again(config: TrainConfig) -> str:
    """The shell's command that goes on with a run, from this folder: whole, with what the
    environment says of where the run and its memory lie. No keys, which the user keeps."""
    words = [config.recipe, *flags_of(config, RECIPES[config.recipe]())]
    script = Path(__file__).with_name("run.py")
    here = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    if job_id() is not None:  # the cluster has the rest
        submit = ["ray", "job", "submit", "--working-dir", "."]
        return shlex.join([*submit, "--", "python", str(here), *words])
    places = {name: os.environ.get(name) for name in _PLACES}
    if places["ALEXNET_HOME"]:
        places["ALEXNET_HOME"] = str(storage.home())
    if places["MLFLOW_TRACKING_URI"] == f"sqlite:///{storage.home() / 'mlflow.db'}":
        places["MLFLOW_TRACKING_URI"] = None  # by default, which MLflow has put into this process
    settings = [f"{name}={shlex.quote(value)}" for name, value in places.items() if value]
    python = shutil.which("python")
    usual = python is not None and Path(python).parent == Path(sys.executable).parent
    return " ".join(
        [*settings, shlex.join(["python" if usual else sys.executable, str(here), *words])]
    )


_PLACES = (
    *("ALEXNET_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"),
    *("AWS_ENDPOINT_URL", "RAY_ADDRESS"),
)


def flags_of(config: Any, base: Any, prefix: str = "--") -> list[str]:
    """The flags that make `config` of `base`, two dataclasses of one kind."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(base, field.name)
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            words += flags_of(value, usual, f"{flag}.")
        elif isinstance(value, tuple) and value != usual:
            words += [flag, *map(str, value)]
        elif value != usual:
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return words


def _prog(base: TrainConfig, flags: list[str]) -> str:
    """For usage lines; a shell completes the command that pip installs, which has one word."""
    completion = any(flag.startswith("--tyro-") for flag in flags)
    return "alexnet-train" if completion else f"training/run.py {base.recipe}"


@dataclass(frozen=True)
class _Line:
    """What tyro makes flags and help of."""

    # Fields take a value, as in `--augment.flip False`; the actions below are bare flags.
    training: Annotated[TrainConfig, tyro.conf.FlagConversionOff, tyro.conf.arg(name="")]
    config: str | None = None
    """A config.json of a run, or one printed, instead of a recipe: the same training again."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the whole config as JSON and leave."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check data, storage, MLflow, memory and numbers of steps, print them and leave."""


def _base(named: str | None, file: str | None) -> TrainConfig:
    if file is None:
        return RECIPES[named or "baseline"]()
    saved = read_config(file)
    if named in (None, saved.recipe):
        return saved
    kept = {field: getattr(saved, field) for field in WHERE_AND_HOW_MANY - {"name"}}
    return dataclasses.replace(RECIPES[named](), **kept)


def _read_first(flags: list[str]) -> tuple[str | None, list[str]]:
    """FILE of --config, and the other flags, with `--workers 2:8` as the two fields that it means;
    `--workers 8` is exactly 8, also where a saved config had a lower minimum."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", const="")
    parser.add_argument("--workers", nargs="?")
    found, rest = parser.parse_known_args(flags)
    if found.config == "":
        raise UserError("--config has no value; pass a config.json of a run")
    least, _, most = (found.workers or "").rpartition(":")
    if not re.fullmatch(r"(\d+:)?\d+", found.workers or ""):
        return found.config, flags  # tyro complains, where there is one
    least_given = any(flag.replace("_", "-").startswith("--min-workers") for flag in rest)
    if least and least_given:
        raise UserError(
            f"--workers={found.workers} and --min-workers say the same; pass one of them"
        )
    minimum = [] if least_given else [f"--min-workers={least or None}"]
    return found.config, [*rest, f"--workers={most}", *minimum]


def _description(recipe: str) -> str:
    others = ", ".join(name for name in RECIPES if name != recipe)
    text = inspect.cleandoc(RECIPES[recipe].__doc__ or "")
    # A paragraph or a point in one line, which tyro then breaks for the terminal's width.
    text = re.sub(r"(?<=\S)\n(?=[^\n-])\s*", " ", text).replace("\n\n- ", "\n- ")
    return f"{text}\n\nOther recipes: {others}."


def _one_line(complaint: str) -> str:
    """The message in tyro's complaint and the flags it suggests. The message stands between the
    first two rules: the first is the title's frame, or lies under it where there is only ASCII.

    Of a value that cannot be read it says what Python does; reported is what was given and which
    kind is expected.
    """
    lines = [line.strip("│| ") for line in complaint.splitlines()]
    rules = [number for number, line in enumerate(lines) if line.startswith(("╭", "─", "---"))]
    message = " ".join(lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines).strip(" .")
    if unread := re.match(r"Error parsing (--[\w./-]+): .*?(\[.*?\]|'.*?')", message):
        flag, _, other = unread[1].partition("/")
        kind = next(line for line in lines if re.match(rf"{flag}\s", line))
        kind = kind.partition(f", {other}")[0] if other else kind
        message = f"{unread[1]} {unread[2][:80]}: expected {kind.split(maxsplit=1)[1]}"
    _, _, meant = complaint.partition("Perhaps you meant")
    flags = re.findall(r"^\W*(--[a-z][\w.-]*)", meant, re.MULTILINE)
    hint = f"; perhaps you meant {' or '.join(flags)}" if flags else ""
    return f"{message}{hint}; see `python training/run.py --help`"


def read_config(uri: str) -> TrainConfig:
    """The config in a JSON file, local or on S3, as config.to_dict makes it.

    Raises UserError for anything but a whole one: a field that is unknown, missing or of another
    type. A missing one is not filled in, since the run may have had another value by default.
    """
    try:
        document = json.loads(storage.read(uri))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri} is not valid JSON ({error}); pass a config.json of a run") from None
    try:
        config = _config_of(document)
        _refuse_unknown(config.recipe)
    except (UserError, RecursionError) as error:
        raise UserError(f"{uri}: {error}") from None
    return config


def _config_of(document: Any) -> TrainConfig:
    if not isinstance(document, dict):
        raise UserError(f"it is not an object of fields; {_SHOWN}")
    document = renamed({name: value for name, value in document.items() if name not in RETIRED})
    document = completed(document)
    if document["cache"] in ("ram", "gpu"):  # of earlier ones: the memory of each worker
        document["cache"] = "none"
    given, known = _names(document), _names(to_dict(TrainConfig()))
    for names, problem in [(given - known, "unknown"), (known - given, "missing")]:
        if names:
            listed = ", ".join(name[:60] for name in sorted(names)[:4])
            raise UserError(f"{len(names)} {problem} field(s): {listed}; {_SHOWN}")
    try:
        # Of JSON, where lists are tuples; strict, so that "0.01" is not a number.
        return TypeAdapter(TrainConfig).validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name, value = ".".join(map(str, first["loc"])), f"{first['input']!r:.80}"
        kind = first["msg"].replace("Input should", "it should")
        raise UserError(f"{name} is {value}: {kind}; {_SHOWN}") from None


def _names(document: dict[str, Any]) -> set[str]:
    """Of fields, dotted where they are in groups."""
    return {
        f"{name}.{inner}".rstrip(".")
        for name, value in document.items()
        for inner in (value if isinstance(value, dict) and value else [""])
    }


def _refuse_unknown(recipe: str) -> None:
    if recipe not in RECIPES:
        raise UserError(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}")


def _refuse_retired(flags: list[str]) -> None:
    for flag in flags:
        if (name := flag.partition("=")[0]).removeprefix("--") in RETIRED and name != flag[2:]:
            raise UserError(
                f"{name} is no flag any more; leave it away: images are decoded on CPUs (more "
                "--cpus-per-worker decode faster, --cache decoded decodes each once)"
            )


_SHOWN = "`python training/run.py RECIPE --print-config` shows a whole one"
