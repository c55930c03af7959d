"""The gate's checks of a network that was scored: each a found value, a limit, and yes or no."""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from alexnet import NETWORK_SIDE
from alexnet.classifier import decode, top_k
from alexnet.errors import UserError
from alexnet.preprocess import resize_and_crop
from training.accuracy import Metrics, Scored
from training.registry.mcnemar import Paired, compare
from training.registry.policy import FULL_SET, Policy
from training.registry.verdict import Check
from training.registry.versions import Registered, verified

# Another machine may round differently: a picture or two at the border may flip, no more.
_TOP1_TOLERANCE = 0.005
_LOSS_TOLERANCE = 0.01  # relative
_FEWEST_OF_A_CLASS = 10  # pictures, for its share to mean something
_TIMED = 11  # forward passes after the warm-up; an odd number has a middle
_PROBABILITY_TOLERANCE = 1e-3
_FRESH_SECONDS = 300


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
    top1, top5 = policy.floors(classes)
    why = (
        ""
        if classes == FULL_SET
        else f" ({policy.above_chance:.0%} above chance, {classes} classes)"
    )
    checks = [Check("top-1", f"{found.top1:.4f}", f"{top1:.4f} or more{why}", found.top1 >= top1)]
    if top5 is not None:
        value, limit = f"{found.top5:.4f}", f"{top5:.4f} or more"
        checks.append(Check("top-5", value, limit, found.top5 >= top5))
    return checks


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


def no_worse(candidate: Scored, champion: Scored, policy: Policy) -> tuple[Check, Paired]:
    """Non-inferiority on the same pictures. A model that says the same of each is no worse, also
    where there are too few of them to show it of another one."""
    found = compare(candidate.correct, champion.correct)
    value = (
        f"{found.difference:+.4f} top-1, 95 % {found.low:+.4f} to {found.high:+.4f} (only one is "
        f"right: {found.only_first} to {found.only_second}, p {found.p:.3g})"
    )
    if np.array_equal(candidate.predicted, champion.predicted):
        return Check("champion", f"{value}, the same answers", "no worse", True), found
    limit = f"interval above {-policy.margin:+.4f}"
    return Check("champion", value, limit, found.low >= -policy.margin), found


def size(network: torch.nn.Module, policy: Policy) -> Check:
    """Of weights and statistics as they are kept, in float32."""
    megabytes = sum(t.numel() * t.element_size() for t in network.state_dict().values()) / 1e6
    limit = f"{policy.size_mb:g} MB or less"
    return Check("size", f"{megabytes:.1f} MB", limit, megabytes <= policy.size_mb)


@torch.inference_mode()
def latency(network: torch.nn.Module, policy: Policy) -> Check:
    """Median time of one picture on this CPU, with as many threads as torch takes."""
    picture = torch.zeros(1, 3, NETWORK_SIDE, NETWORK_SIDE)
    seconds = []
    for _ in range(3 + _TIMED):
        began = time.perf_counter()
        network(picture)
        seconds.append(time.perf_counter() - began)
    found = statistics.median(seconds[3:]) * 1000
    limit = f"{policy.latency_ms:g} ms or less"
    return Check("latency", f"{found:.1f} ms", limit, found <= policy.latency_ms)


# -I: neither this folder nor $PYTHONPATH is searched, so that it is the model's own code that runs.
# pycache_prefix: it is compiled here from the source that was verified, and nothing is left there.
_FRESH = """
import json, pathlib, sys
import mlflow
model, folder, answers = sys.argv[1:]
pictures = [path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())]
found = mlflow.pyfunc.load_model(model).predict(pictures)
rows = list(zip(found["classes"].tolist(), found["probabilities"].tolist()))
pathlib.Path(answers).write_text(json.dumps(rows))
"""


def as_used(uri: str, tracking_uri: str, model: Registered, pictures: Sequence[bytes]) -> Check:
    """Whether `mlflow.pyfunc` in a fresh process says of picture files what the network says here.

    It runs code of the registry, from a copy whose files are verified once more.
    """
    limit = "the same classes from mlflow.pyfunc"
    spec = model.input_spec
    images = [resize_and_crop(decode(content), spec.resize, spec.crop) for content in pictures]
    expected = top_k(model.network, torch.stack(images), spec, model.class_names, k=5)
    try:
        with verified(uri) as folder:
            rows = in_fresh_process(folder, tracking_uri, pictures)
    except UserError as error:
        return Check("as used", str(error), limit, False)
    agree = sum(_agree(dict(own), row) for own, row in zip(expected, rows, strict=True))
    value = f"{agree} of {len(pictures)} pictures alike"
    return Check("as used", value, limit, agree == len(pictures))


def _agree(own: Mapping[str, float], row: tuple[list[str], list[float]]) -> bool:
    """Of two classes that are equally likely within the tolerance, either may be the first."""
    name, probability = row[0][0], row[1][0]
    likeliest = max(own.values())
    return all(
        math.isclose(probability, other, abs_tol=_PROBABILITY_TOLERANCE)
        for other in (likeliest, own.get(name, -1.0))
    )


def in_fresh_process(
    model: Path, tracking_uri: str, pictures: Sequence[bytes]
) -> list[tuple[list[str], list[float]]]:
    """model: a folder whose code may run. The likeliest classes of each with their probabilities.
    Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="as-used-") as temporary:
        folder, answers = Path(temporary) / "pictures", Path(temporary) / "answers.json"
        folder.mkdir()
        for number, content in enumerate(pictures):
            (folder / f"{number:03d}").write_bytes(content)
        compiled = f"pycache_prefix={Path(temporary) / 'compiled'}"
        command = [sys.executable, "-I", "-X", compiled, "-W", "ignore", "-c", _FRESH]
        command += [str(model), str(folder), str(answers)]
        environment = os.environ | {"MLFLOW_TRACKING_URI": tracking_uri}
        try:
            subprocess.run(
                command,
                cwd=temporary,
                env=environment,
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
