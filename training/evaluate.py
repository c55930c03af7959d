"""The one scorer: accuracy that counts every image exactly once, and where it goes wrong.

    python -m training.evaluate MODEL --data OUT [--split val] [--ten-crop] [--json] [--out FOLDER]

MODEL is champion, candidate, a version's number, an MLflow model URI, or the folder or s3:// prefix
of a checkpoint or run. --out writes evaluation.json (everything), predictions.parquet (a row for
each image), mistakes.png (the most confident errors) and confusion.png. --workers N scores on Ray,
without it in this process. Exit codes: 0 done, 2 wrong usage or input.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pipelines import command

    command.begin()
    import training.evaluate  # under its own name, by which Ray's workers find it

    command.leave(training.evaluate.main)

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet.errors import UserError
from alexnet.preprocess import InputSpec, average_probabilities, centre_view, ten_crop
from pipelines import command, shards, storage
from training.accuracy import Metrics, Scored, document, short
from training.loader import Loader
from training.network import check_fits, load_model
from training.order import Ids, rank_part
from training.steps import summed
from training.transfer import sent

# centre: the middle 227×227. ten_crop: four corners, the centre and their mirror images, with their
# probabilities averaged, as in section 4.1 of the paper.
Protocol = Literal["centre", "ten_crop"]
VIEWS: dict[Protocol, int] = {"centre": 1, "ten_crop": 10}

Network = Callable[[torch.Tensor], torch.Tensor]
Where = tuple[str, shards.Manifest, str]  # data, manifest, split
Rows = tuple[NDArray[Any], ...]  # columns of `Scored`, for some of its images

_BATCH, _GPU_BATCH = 256, 1024  # views
_KEPT = 5  # likeliest classes of each image
_SHOWN = 10  # classes and pairs in the text
_LINE_SECONDS = 0.2


class Stopped(Exception):
    """The evaluation was given up because somebody asked for it."""


def evaluate(
    network: Network,
    loader: Loader,
    spec: InputSpec,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    stopping: Callable[[], bool] | None = None,
) -> Metrics:
    """Counts alone, for the training loop: of the centre views of all of the loader's split.

    network: float32 (B,3,227,227) -> logits (B, classes), in evaluation mode already. Each rank
    takes every W-th sample; counts are summed as integers, so the result does not depend on W. With
    fewer than five classes top5 counts all of them. Asserts that all ranks together saw each of the
    manifest's images exactly once. Raises as `score`, and Stopped on all ranks when `stopping()`,
    asked before each batch, said yes on any of them.
    """
    if loader.num_samples == 0:
        raise UserError("the split has no images to evaluate; choose another --split")
    ids = rank_part(np.arange(loader.num_samples), rank, world_size)
    seen = np.zeros(loader.num_samples, dtype=np.int32)
    correct = torch.zeros(2, dtype=torch.int64, device=device)
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    parts = _batches(ids, _BATCH if device.type == "cpu" else _GPU_BATCH)
    for log_probabilities, labels, part in _scores(network, loader, spec, parts, device):
        if stopping is not None and stopping():
            break
        np.add.at(seen, part.numpy(), 1)
        place = _places(log_probabilities, labels)
        correct += torch.stack([(place < 1).sum(), (place < 5).sum()])
        loss += _losses(log_probabilities, labels).sum()
    if stopping is not None and summed([stopping()], device, world_size)[0]:
        raise Stopped
    times = torch.from_numpy(seen).to(device)
    if world_size > 1:
        for tensor in (times, correct, loss):
            torch.distributed.all_reduce(tensor)
    images = int((times == 1).sum())
    assert images == len(seen), f"evaluated {images} of {len(seen)} images once"
    return Metrics.of(images, correct.tolist(), float(loss))


def score(
    network: torch.nn.Module,
    spec: InputSpec,
    data: str,
    manifest: shards.Manifest,
    split: str = "val",
    *,
    protocol: Protocol = "centre",
    batch_size: int = _BATCH,
    workers: int | None = None,
    shared_fs: bool = False,
    label: str = "",
) -> Scored:
    """Every image of the split, once.

    workers: None scores in this process with all its threads, on the network's device; a number
    does it on Ray, one shard per task, with so many processes of one CPU at most. Batches are cut
    alike either way. batch_size: views at a time. shared_fs: every node of a cluster sees a local
    `data`. label: begins the line on a terminal that says how far it is.
    Raises UserError for shards that are missing, damaged, empty, unlabelled (a test split has −1)
    or of more classes than the network has, and for ten-crop on images stored at 227×227.
    """
    keys = shards.load_index(data, split, ["key"])["key"].to_pylist()
    if not keys:
        raise UserError(f"split {split} of {data} has no images; choose another --split")
    sizes = [info.samples for info in manifest.split_shards(split)]
    of_shards = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    parts = [_batches(ids, batch_size, protocol) for ids in of_shards]
    where, report = (storage.absolute(data), manifest, split), _reporter(label, len(keys))
    if workers is None:
        with Loader(*where, threads=os.cpu_count() or 1) as loader:
            rows = _rows(network, loader, spec, protocol, [*itertools.chain(*parts)], report)
    else:
        rows = _on_ray(network, where, spec, protocol, parts, workers, shared_fs, report)
    assert len(rows[0]) == len(keys), f"scored {len(rows[0])} of {len(keys)} images"
    return Scored(tuple(keys), manifest.num_classes, *rows)


def main(argv: Sequence[str] | None = None) -> int:
    return command.answered(lambda: _answer(_parse(argv)))


def _answer(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} is below 1; pass 1 or more")
    device = _device(args.device)
    manifest = shards.load_manifest(args.data)
    model = load_model(args.model)
    check_fits(model, manifest, args.data)
    protocol: Protocol = "ten_crop" if args.ten_crop else "centre"
    scored = score(
        model.network.to(device),
        model.input_spec,
        args.data,
        manifest,
        args.split,
        protocol=protocol,
        batch_size=args.batch_size,
        workers=args.workers,
        shared_fs=args.shared_fs,
        label=args.split,
    )
    if not math.isfinite(scored.metrics.loss):
        raise UserError(f"{model.name} answers NaN or infinity; train it again")
    data = {"uri": args.data, "split": args.split, "manifest_sha256": manifest.digest}
    found = {
        "model": {"name": model.name, "about": model.about},
        "data": data,
        "protocol": protocol,
        **document(scored, manifest),
    }
    if args.out is not None:
        _write(args.out, found, scored, manifest)
    print(json.dumps(found, indent=1) if args.json else _text(found))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser("python -m training.evaluate", description=__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", required=True, help="folder or s3:// prefix of the shards")
    parser.add_argument("--split", default="val")
    parser.add_argument(
        "--ten-crop", action="store_true", help="ten views, averaged, as the paper; needs 256 px"
    )
    parser.add_argument("--json", action="store_true", help="print evaluation.json instead of text")
    parser.add_argument("--out", metavar="FOLDER", help="write files there (folder or s3://)")
    parser.add_argument("--batch-size", type=int, default=_BATCH, help="views at a time")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_ray_flags(parser)
    return parser.parse_args(argv)


def add_ray_flags(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--workers", type=int, help="score on Ray, with processes of one CPU")
    parser.add_argument("--shared-fs", action="store_true", help="all nodes see a local OUT")


def _device(choice: str) -> torch.device:
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; pass --device cpu")
    return torch.device(choice)


def _text(found: dict[str, Any]) -> str:
    """For people: what was evaluated, how well, and where it goes wrong."""
    model, data, protocol = found["model"], found["data"], found["protocol"]
    rows = [row for row in found["classes"] if row["images"]]
    worst = sorted(rows, key=lambda row: (row["top1"], row["label"]))[:_SHOWN]
    pairs = found["confused_pairs"][:_SHOWN]
    lines = [
        f"model     {model['name']}" + (f" ({model['about']})" if model["about"] else ""),
        f"data      {data['uri']}, split {data['split']}, {found['images']:,} images, "
        f"manifest {data['manifest_sha256'][:12]}",
        f"protocol  {_PROTOCOLS[protocol]}; 95 % Wilson intervals in brackets",
        f"top-1     {_share(**found['top1'])}",
        f"top-5     {_share(**found['top5'])}",
        f"loss      {found['loss']:.4f} nats",
        "",
        f"{len(worst)} of {len(rows)} classes, the worst first",
        f"  {'top-1':<6}  {'':<16}  {'of':>5}  {'class':<24}  most often taken for",
    ]
    for row in worst:
        interval = f"{row['top1']:.4f}  [{row['low']:.4f}, {row['high']:.4f}]"
        name, taken_for = short(row["name"]), short(row["taken_for"] or "")
        lines.append(f"  {interval}  {row['images']:>5}  {name:<24}  {taken_for}".rstrip())
    if pairs:
        lines += ["", f"{len(pairs)} of {len(found['confusion'])} confused pairs"]
    for pair in pairs:
        true, predicted = short(pair["true"]), short(pair["predicted"])
        lines.append(f"  {pair['images']:>5}  {true} taken for {predicted}")
    return "\n".join(lines)


_PROTOCOLS: dict[Protocol, str] = {
    "centre": "the centre 227×227 of each image, once",
    "ten_crop": "ten-crop: corners, centre and mirror images, probabilities averaged",
}


def _share(correct: int, share: float, wilson95: Sequence[float]) -> str:
    return f"{share:.4f}  [{wilson95[0]:.4f}, {wilson95[1]:.4f}]  {correct:,} right"


def _write(folder: str, found: dict[str, Any], scored: Scored, manifest: shards.Manifest) -> None:
    from training import figures  # with matplotlib, which the training loop does without

    folder = storage.absolute(folder)
    text = json.dumps(found, indent=1) + "\n"
    storage.write(storage.join(folder, "evaluation.json"), text.encode())
    table = shards.parquet_bytes(scored.table(found["model"]["name"], manifest))
    storage.write(storage.join(folder, "predictions.parquet"), table)
    data, name = found["data"], found["model"]["name"]
    errors = found["mistakes"]
    sheet = figures.most_confident_errors(errors, data["uri"], manifest, data["split"], name)
    figures.save(sheet, storage.join(folder, "mistakes.png"))
    matrix = figures.confusion(scored.confusion, manifest.class_names, name)
    figures.save(matrix, storage.join(folder, "confusion.png"))


def _rows(
    network: torch.nn.Module,
    loader: Loader,
    spec: InputSpec,
    protocol: Protocol,
    parts: Sequence[Ids],
    report: Callable[[int], None] = lambda images: None,
) -> Rows:
    """Of the images of `parts`, which are batches; `report` is called with the size of each."""
    device = next(network.parameters()).device
    found = []
    scores = _scores(network, loader, spec, parts, device, protocol)
    for wanted, (log_probabilities, labels, ids) in zip(parts, scores, strict=True):
        assert np.array_equal(ids.numpy(), wanted), "a batch of other images"
        # Stable, so that of equals the lower label is first, as in argmax.
        values, classes = log_probabilities.sort(dim=1, descending=True, stable=True)
        columns = (
            labels.int(),
            _places(log_probabilities, labels).clamp_max(torch.iinfo(torch.int32).max).int(),
            _losses(log_probabilities, labels),
            classes[:, :_KEPT].int(),
            values[:, :_KEPT].exp(),
        )
        found.append([column.cpu().numpy() for column in columns])
        report(len(ids))
    return _joined(found)


def _joined(parts: Iterable[Iterable[NDArray[Any]]]) -> Rows:
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _on_ray(
    network: torch.nn.Module,
    where: Where,
    spec: InputSpec,
    protocol: Protocol,
    parts: Sequence[list[Ids]],
    workers: int,
    shared_fs: bool,
    report: Callable[[int], None],
) -> Rows:
    """As `_rows`, with a task of one CPU for each shard, `workers` at a time."""
    import ray

    from pipelines import cluster

    if workers < 1:
        raise UserError(f"{workers} workers cannot score anything; ask for 1 or more")
    numbers, found = iter(range(len(parts))), dict[int, Rows]()
    with cluster.connected():
        cluster.refuse_local_paths([where[0]], shared_fs=shared_fs)
        # As NumPy arrays, all processes of a node share the one copy of the weights in its object
        # store instead of holding 250 MB each.
        weights = {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}
        sent = [ray.put(part) for part in (copy.deepcopy(network).to("meta"), weights, where)]
        task, running = ray.remote(num_cpus=1)(_shard), dict[Any, int]()
        try:
            while len(found) < len(parts):
                for number in itertools.islice(numbers, workers - len(running)):
                    running[task.remote(*sent, spec, protocol, parts[number])] = number
                (done,), _ = ray.wait(list(running))
                answer = ray.get(done)
                if isinstance(answer, str):
                    raise UserError(answer)
                found[running.pop(done)] = answer
                report(len(answer[0]))
        finally:
            for left in running:
                ray.cancel(left)
    return _joined(found[number] for number in range(len(parts)))


def _shard(
    network: torch.nn.Module,
    weights: dict[str, NDArray[Any]],
    where: Where,
    spec: InputSpec,
    protocol: Protocol,
    parts: list[Ids],
) -> Rows | str:
    """What the user can mend comes back as a line: raised here, it would reach them as a page of
    Ray's own traceback."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    network.load_state_dict(tensors, assign=True)
    try:
        with Loader(*where, threads=1) as loader:
            return _rows(network, loader, spec, protocol, parts)
    except UserError as error:
        return str(error)


def _reporter(label: str, total: int) -> Callable[[int], None]:
    """Renews one line on a terminal with the images, their rate and the time left."""
    began = told = time.monotonic()
    done = 0

    def report(images: int) -> None:
        nonlocal done, told
        done, now = done + images, time.monotonic()
        if not sys.stderr.isatty() or (now - told < _LINE_SECONDS and done < total):
            return
        told, rate = now, done / max(now - began, 1e-9)
        left = f"{(total - done) / rate:.0f} s left" if done < total else f"{now - began:.0f} s"
        line = f"{label}: {done:,} of {total:,} images, {rate:,.0f} a second, {left}"
        print(f"\r\x1b[K{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return report


def _batches(ids: Ids, batch_size: int = _BATCH, protocol: Protocol = "centre") -> list[Ids]:
    images = max(1, batch_size // VIEWS[protocol])
    return [ids[i : i + images] for i in range(0, len(ids), images)]


def _scores(
    network: Network,
    loader: Loader,
    spec: InputSpec,
    parts: Sequence[Ids],
    device: torch.device,
    protocol: Protocol = "centre",
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each of `parts`: log-probabilities float32 (B, classes) and labels int64 (B,) on the
    device, sample ids int64 (B,) on the CPU."""
    with contextlib.closing(sent(loader, parts, device)) as batches:
        for arriving in batches:
            images, labels = arriving.received()
            log_probabilities = _log_probabilities(network, images, spec, protocol)
            _check_labels(arriving.batch.labels, log_probabilities.shape[1])
            yield log_probabilities, labels, arriving.batch.sample_ids


@torch.no_grad()
def _log_probabilities(
    network: Network, images: torch.Tensor, spec: InputSpec, protocol: Protocol
) -> torch.Tensor:
    if protocol == "centre":
        return network(centre_view(images, spec)).float().log_softmax(1)
    views = ten_crop(images, spec)
    logits = network(views.flatten(0, 1)).reshape(*views.shape[:2], -1)
    # All ten can be 0 in float32; the logarithm of its smallest number, -87, stands for that.
    return average_probabilities(logits).clamp_min(torch.finfo(torch.float32).tiny).log()


def _check_labels(labels: torch.Tensor, classes: int) -> None:
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise UserError(
            f"the split has images without a label (label {lowest}), whose accuracy nobody can "
            "count; choose a labelled --split such as val"
        )
    if highest >= classes:
        raise UserError(
            f"label {highest} is beyond the network's {classes} classes; evaluate it on the data "
            "set that it was trained on"
        )


def _places(log_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """int64 (B,): how many classes stand before the true one. Of equals the lower label is first,
    as in argmax, so that ties fall alike on every device; NaN is behind all."""
    own = log_probabilities.gather(1, labels[:, None])
    classes = torch.arange(log_probabilities.shape[1], device=own.device)
    ties = (log_probabilities == own) & (classes < labels[:, None])
    place = ((log_probabilities > own) | ties).sum(1)
    return place.masked_fill(own[:, 0].isnan(), torch.iinfo(torch.int64).max)


def _losses(log_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """float64 (B,), nats."""
    return -log_probabilities.gather(1, labels[:, None])[:, 0].double()
