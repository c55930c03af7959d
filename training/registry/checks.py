"""The gate's checks, each a found value, a limit, and yes or no; and the policy of the limits."""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from alexnet import FORMER_RECIPES, NETWORK_SIDE
from alexnet.classifier import decode, top_k
from alexnet.errors import UserError
from alexnet.preprocess import resize_and_crop
from training.accuracy import Z95, Metrics, Scored
from training.registry.versions import Registered, verified

SHIPPED = Path(__file__).with_name("policy.toml")
FULL_SET = 1000  # classes, which the floors of top-1 and top-5 are about
# Another machine may round differently: an image or two at the border may flip, no more.
_TOP1_TOLERANCE = 0.005
_LOSS_TOLERANCE = 0.01  # relative
_FEWEST_OF_A_CLASS = 10  # images, for its share to mean something
_TIMED = 11  # forward passes after the warm-up; an odd number has a middle
_PROBABILITY_TOLERANCE = 1e-3
_FRESH_SECONDS = 300


@dataclass(frozen=True)
class Check:
    """One line of the verdict: what was found, what is asked for, and whether that is met."""

    name: str
    value: str
    limit: str
    passed: bool


Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Strict = Annotated[bool, Field(strict=True)]
Limit = Annotated[float, Field(strict=True, ge=0)]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Policy:
    """What a version must show; policy.toml says what each limit means."""

    top1: Share
    top5: Share
    above_chance: Share
    worst_class: Share
    margin: Share
    latency_ms: Limit
    size_mb: Limit
    best_champion: Strict = True
    approval: Strict = False
    approver_may_be_trainer: Strict = False


def read_policy(path: str | Path, recipe: str) -> Policy:
    """That of a recipe. The whole file is checked, also the tables of others.

    Raises UserError for a file that is not there, is not TOML, or has a key that means nothing, a
    value out of its range, or no whole [default].
    """
    shown = f"{SHIPPED} is a whole one"
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"policy {path}: {error.strerror}; pass a file with --policy") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"policy {path} is not TOML ({error}); {shown}") from error
    if outside := [key for key, table in tables.items() if not isinstance(table, dict)]:
        raise UserError(f"policy {path}: {outside[0]} stands outside of a table; {shown}")
    default = tables.get("default", {})
    whole = {FORMER_RECIPES.get(k, k): default | v for k, v in ({"default": {}} | tables).items()}
    try:
        policies = TypeAdapter(dict[str, Policy]).validate_python(whole)
    except ValidationError as error:
        first = error.errors()[0]
        found = "" if first["type"] == "missing" else f" is {first['input']!r}"
        table, key = first["loc"][:2]
        line = f"[{table}] {key}{found}: {first['msg']}"
        raise UserError(f"policy {path}: {line}; {shown}") from error
    return policies.get(recipe, policies["default"])


def logged(found: Metrics, metrics: Mapping[str, float]) -> Check:
    """Whether the model as loaded does what its run logged in the end."""
    value = f"top-1 {found.top1:.4f}, loss {found.loss:.4f}"
    top1, loss = metrics.get("val_top1"), metrics.get("val_loss")
    if top1 is None or loss is None:
        return Check("as logged", value, "val_top1 and val_loss of its run, which has none", False)
    near = abs(found.top1 - top1) <= max(_TOP1_TOLERANCE, 2 / found.images)
    near = near and abs(found.loss - loss) <= _LOSS_TOLERANCE * max(1.0, loss)
    return Check("as logged", value, f"top-1 {top1:.4f}, loss {loss:.4f}, as logged", near)


def accuracy(found: Metrics, classes: int, policy: Policy) -> list[Check]:
    """top-1 and, of the full set's 1000 classes, top-5."""
    top1, why = policy.top1, ""
    if classes != FULL_SET:
        top1 = 1 / classes + policy.above_chance * (1 - 1 / classes)
        why = f" ({policy.above_chance:.0%} above chance, {classes} classes)"
    made = [Check("top-1", f"{found.top1:.4f}", f"{top1:.4f} or more{why}", found.top1 >= top1)]
    if classes == FULL_SET:
        value, limit = f"{found.top5:.4f}", f"{policy.top5:.4f} or more"
        made.append(Check("top-5", value, limit, found.top5 >= policy.top5))
    return made


def worst_class(scored: Scored, names: Sequence[str], policy: Policy) -> Check:
    limit = f"{policy.worst_class:.4f} or more"
    images, correct = scored.confusion.sum(axis=1), scored.confusion.diagonal()
    counted = np.flatnonzero(images >= _FEWEST_OF_A_CLASS).tolist()
    if not counted:
        return Check("worst class", f"none has {_FEWEST_OF_A_CLASS} images", limit, True)
    worst = min(counted, key=lambda label: correct[label] / images[label])
    share = correct[worst] / images[worst]
    value = f"{share:.4f}, {names[worst]} ({correct[worst]} of {images[worst]})"
    return Check("worst class", value, limit, bool(share >= policy.worst_class))


@dataclass(frozen=True)
class Paired:
    """only_first, only_second: images that one model alone gets right; difference: top-1 of the
    first less that of the second, with its 95 % interval; p: of McNemar's exact test, two-sided,
    that both are equally accurate."""

    images: int
    both: int
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p: float


def compare(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Paired:
    """first, second: bool (N,), whether each model is right about image i; N is 1 or more."""
    if first.shape != second.shape or not len(first):
        raise ValueError(f"{first.shape} and {second.shape} are not answers to the same images")
    from scipy.stats import binomtest  # takes a second

    images = len(first)
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    disagree = only_first + only_second
    low, high = interval(only_first, only_second, images)
    return Paired(
        images=images,
        both=int((first & second).sum()),
        only_first=only_first,
        only_second=only_second,
        difference=(only_first - only_second) / images,
        low=low,
        high=high,
        p=float(binomtest(only_first, disagree).pvalue) if disagree else 1.0,
    )


def interval(only_first: int, only_second: int, images: int) -> tuple[float, float]:
    """At 95 %, of the difference of two paired shares, as Bonett and Price (2012, J. Educ. Behav.
    Stat. 37, 479-488) adjust Wald's: one image is added to each kind of disagreement, so that it
    covers what it says also for a dozen images, and is not of length 0 where none disagreed."""
    first, second = (only_first + 1) / (images + 2), (only_second + 1) / (images + 2)
    difference = first - second
    half = Z95 * ((first + second - difference**2) / (images + 2)) ** 0.5
    return max(-1.0, difference - half), min(1.0, difference + half)


def no_worse(
    candidate: Scored, other: Scored, policy: Policy, name: str = "champion"
) -> tuple[Check, Paired]:
    """Non-inferiority on the same images. A model that says the same of each is no worse, also
    where there are too few of them to show it of another one. name: of the other one."""
    found = compare(candidate.correct, other.correct)
    value = (
        f"{found.difference:+.4f} top-1, 95 % {found.low:+.4f} to {found.high:+.4f} (only one is "
        f"right: {found.only_first} to {found.only_second}, p {found.p:.3g})"
    )
    if np.array_equal(candidate.predicted, other.predicted):
        return Check(name, f"{value}, the same answers", "no worse", True), found
    limit = f"interval above {-policy.margin:+.4f}"
    return Check(name, value, limit, found.low >= -policy.margin), found


def size(network: torch.nn.Module, policy: Policy) -> Check:
    """Of weights and statistics as they are kept, in float32."""
    megabytes = sum(t.numel() * t.element_size() for t in network.state_dict().values()) / 1e6
    limit = f"{policy.size_mb:g} MB or less"
    return Check("size", f"{megabytes:.1f} MB", limit, megabytes <= policy.size_mb)


@torch.inference_mode()
def latency(network: torch.nn.Module, policy: Policy) -> Check:
    """Median time of one image on this CPU, with as many threads as torch takes."""
    image = torch.zeros(1, 3, NETWORK_SIDE, NETWORK_SIDE)
    seconds = []
    for _ in range(3 + _TIMED):
        began = time.perf_counter()
        network(image)
        seconds.append(time.perf_counter() - began)
    found = statistics.median(seconds[3:]) * 1000
    limit = f"{policy.latency_ms:g} ms or less"
    return Check("latency", f"{found:.1f} ms", limit, found <= policy.latency_ms)


# -I: neither this folder nor $PYTHONPATH is searched, so that it is the model's own code that runs.
# pycache_prefix: it is compiled here from the source that was verified, and nothing is left there.
# What is installed comes before that, with its own compiled files: it takes seconds to compile.
_FRESH = """
import json, pathlib, sys
import mlflow.pyfunc, torch
model, folder, answers, sys.pycache_prefix = sys.argv[1:]
images = [path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())]
found = mlflow.pyfunc.load_model(model).predict(images)
rows = list(zip(found["classes"].tolist(), found["probabilities"].tolist()))
pathlib.Path(answers).write_text(json.dumps(rows))
"""


def as_used(uri: str, tracking_uri: str, model: Registered, files: Sequence[bytes]) -> Check:
    """Whether `mlflow.pyfunc` in a fresh process says of image files what the network says here.

    It runs code of the registry, from a copy whose files are verified once more.
    """
    limit, spec = "the same classes from mlflow.pyfunc", model.input_spec
    images = [resize_and_crop(decode(content), spec.resize, spec.crop) for content in files]
    expected = top_k(model.network, torch.stack(images), spec, model.class_names, k=5)
    try:
        with verified(uri) as folder:
            rows = in_fresh_process(folder, tracking_uri, files)
    except UserError as error:
        return Check("as used", str(error), limit, False)
    agree = sum(_agree(dict(own), row) for own, row in zip(expected, rows, strict=True))
    return Check("as used", f"{agree} of {len(files)} images alike", limit, agree == len(files))


def _agree(own: Mapping[str, float], row: tuple[list[str], list[float]]) -> bool:
    """Of two classes that are equally likely within the tolerance, either may be the first."""
    name, probability = row[0][0], row[1][0]
    likeliest = max(own.values())
    return all(
        math.isclose(probability, other, abs_tol=_PROBABILITY_TOLERANCE)
        for other in (likeliest, own.get(name, -1.0))
    )


def in_fresh_process(
    model: Path, tracking_uri: str, files: Sequence[bytes]
) -> list[tuple[list[str], list[float]]]:
    """model: a folder whose code may run. The likeliest classes of each with their probabilities.
    Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="as-used-") as temporary:
        folder, answers = Path(temporary) / "images", Path(temporary) / "answers.json"
        folder.mkdir()
        for number, content in enumerate(files):
            (folder / f"{number:03d}").write_bytes(content)
        command = [sys.executable, "-I", "-W", "ignore", "-c", _FRESH]
        command += [str(model), str(folder), str(answers), str(Path(temporary) / "compiled")]
        try:
            subprocess.run(
                command,
                cwd=temporary,
                env=os.environ | {"MLFLOW_TRACKING_URI": tracking_uri},
                capture_output=True,
                text=True,
                check=True,
                timeout=_FRESH_SECONDS,
            )
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[-1]
            raise UserError(f"it cannot be used: {last[:200]}") from error
        except subprocess.TimeoutExpired as error:
            raise UserError(f"no answer within {_FRESH_SECONDS} s") from error
        rows = json.loads(answers.read_text())
    return [(names, shares) for names, shares in rows]
