"""The command line of the training: a recipe or a saved config, and the fields that flags change.

python training/run.py [RECIPE] [--config FILE] [flags]
"""

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
from itertools import zip_longest
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from alexnet import FORMER_RECIPES, renamed
from alexnet.errors import UserError
from pipelines import storage
from training.config import RETIRED, WHERE_AND_HOW_MANY, TrainConfig
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
    base = _base(named, _file_of(flags))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            line = tyro.cli(
                _Line,
                default=_Line(training=base),
                args=_with_workers(flags),
                prog=f"training/run.py {base.recipe}",
                description=_description(base.recipe),
            )
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue(), flags)) from None
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


_PLACES = ("ALEXNET_HOME", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "RAY_ADDRESS")


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


def _file_of(flags: list[str]) -> str | None:
    """FILE of the last --config; without its value, tyro will complain."""
    found = None
    for flag, following in zip_longest(flags, flags[1:]):
        if flag == "--config" and following is not None:
            found = following
        elif flag.startswith("--config="):
            found = flag.removeprefix("--config=")
    return found


def _with_workers(flags: list[str]) -> list[str]:
    """`--workers 2:8` as the two fields that it means; `--workers 8` is exactly 8, also where a
    saved config had fewer as its least."""
    least_given = any(flag.replace("_", "-").startswith("--min-workers") for flag in flags)
    spread: list[str] = []
    words = list(flags)
    while words:
        word = words.pop(0)
        if word == "--workers" and words and not words[0].startswith("--"):
            word += f"={words.pop(0)}"
        if found := re.fullmatch(r"--workers=(?:(\d+):)?(\d+)", word):
            if found[1] and least_given:
                raise UserError(f"{word} and --min-workers say the same; pass one of them")
            least = [] if least_given else [f"--min-workers={found[1]}"]
            spread += [f"--workers={found[2]}", *least]
        else:
            spread.append(word)
    return spread


def _description(recipe: str) -> str:
    others = ", ".join(name for name in RECIPES if name != recipe)
    text = inspect.cleandoc(RECIPES[recipe].__doc__ or "")
    # A paragraph or a point in one line, which tyro then breaks for the terminal's width.
    text = re.sub(r"(?<=\S)\n(?=[^\n-])\s*", " ", text).replace("\n\n- ", "\n- ")
    return f"{text}\n\nOther recipes: {others}."


def _one_line(complaint: str, given: list[str]) -> str:
    """The message in tyro's complaint and the flags it suggests. The message stands between the
    first two rules: the first is the title's frame, or lies under it where there is only ASCII.

    Of a value that cannot be read it says what Python does; told is what was given and expected.
    """
    lines = [line.strip("│| ") for line in complaint.splitlines()]
    rules = [number for number, line in enumerate(lines) if line.startswith(("╭", "─", "---"))]
    message = " ".join(lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines).strip(" .")
    if unread := re.match(r"Error parsing (--[\w.-]+)", message):
        kind = next(line for line in lines if re.match(rf"{unread[1]}\s", line))
        message = f"{unread[1]} {_value_of(unread[1], given)!r}: expected {_expected(kind)}"
    _, _, meant = complaint.partition("Perhaps you meant")
    flags = re.findall(r"^\W*(--[a-z][\w.-]*)", meant, re.MULTILINE)
    hint = f"; perhaps you meant {' or '.join(flags)}" if flags else ""
    return f"{message}{hint}; see `python training/run.py --help`"


def _value_of(flag: str, given: list[str]) -> str:
    """What the last FLAG VALUE… or FLAG=VALUE of the command line gives, at most 80 characters."""
    texts: dict[str, list[str]] = {}
    name = ""
    for word in given:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            texts[name] = [value] if equals else []
        else:
            texts.setdefault(name, []).append(word)
    return " ".join(texts.get(flag, []))[:80]


def _expected(kind: str) -> str:
    """From tyro's `--flag {None}|INT`, or `--flag [INT [INT ...]]`."""
    metavar = kind.split(maxsplit=1)[1]
    names = {"INT": "a whole number", "FLOAT": "a number", "{None}": "None"}
    if "..." in metavar:
        return "whole numbers" if "INT" in metavar else "values"
    words = sorted((names.get(part, part) for part in metavar.split("|")), key="None".__eq__)
    spread = ", or the least and the most as in 2:8" if kind.startswith("--workers ") else ""
    return " or ".join(words) + spread


def read_config(uri: str) -> TrainConfig:
    """The config in a JSON file, local or on S3, as config.to_dict makes it.

    Raises UserError for anything but a whole one: a field that is unknown, missing or of another
    type. A missing one is not filled in, since the run may have had another value by default.
    """
    try:
        document = json.loads(storage.read(uri))
        document = renamed(document) if isinstance(document, dict) else document
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri} is not JSON ({error}); pass a config.json of a run") from None
    if isinstance(document, dict):
        document = {name: value for name, value in document.items() if name not in RETIRED}
    try:
        config: TrainConfig = _record(TrainConfig, document, "")
        _refuse_unknown(config.recipe)
    except UserError as error:
        raise UserError(f"{uri}: {error}") from None
    return config


def _refuse_unknown(recipe: str) -> None:
    if recipe not in RECIPES:
        raise UserError(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}")


def _refuse_retired(flags: list[str]) -> None:
    for flag in flags:
        if (name := flag.partition("=")[0]).removeprefix("--") in RETIRED and name != flag[2:]:
            raise UserError(
                f"{name} is no flag any more; leave it away: images are decoded on CPUs, in every "
                "epoch (more --cpus-per-worker decode faster)"
            )


def _record(kind: Any, document: Any, prefix: str) -> Any:
    """A dataclass from a dict that has its fields and no other."""
    hints = get_type_hints(kind)
    if not isinstance(document, dict):
        raise UserError(f"{prefix[:-1] or 'the whole'} is no object of fields; {_SHOWN}")
    for names, problem in [
        (document.keys() - hints.keys(), "unknown"),
        (hints.keys() - document.keys(), "missing"),
    ]:
        if names:
            listed = ", ".join(f"{prefix}{name}"[:60] for name in sorted(names)[:4])
            raise UserError(f"{len(names)} {problem} field(s): {listed}; {_SHOWN}")
    values = {name: _value(hint, document[name], prefix + name) for name, hint in hints.items()}
    return kind(**values)


def _value(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _record(hint, value, f"{name}.")
    if type(value) is int and float in (hint, *get_args(hint)):  # as people write it
        with contextlib.suppress(OverflowError):  # beyond every float: refused below
            return float(value)
    if get_origin(hint) is tuple and isinstance(value, list):
        value = tuple(value)
    if not _fits(hint, value):
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise UserError(f"{name} is {_shown(value)}, not {wanted}; {_SHOWN}")
    return value


def _shown(value: Any) -> str:
    """At most 80 characters; Python writes no number of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fits(hint: Any, value: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(kind, value) for kind in args)
    if origin is Literal:
        return value in args
    if origin is tuple:  # of any length, of one kind
        return isinstance(value, tuple) and all(_fits(args[0], item) for item in value)
    if hint is NoneType:
        return value is None
    return type(value) is hint


_SHOWN = "`python training/run.py RECIPE --print-config` shows a whole one"
