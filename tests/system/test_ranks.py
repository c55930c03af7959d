"""Two and three processes over gloo learn and measure what one does."""

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from safetensors.torch import load_file
from shard_sets import write_shard_set
from small_training import CPU, Record, evaluated, fit, seen_ids, small_config, without_dropout

from pipelines.shards import load_manifest
from training import loop
from training.evaluate import evaluate
from training.loader import Loader
from training.network import build_model, input_spec


def counted(uri: str, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Of an untrained network, in float64: batches of other sizes round alike."""
    manifest, config = load_manifest(uri), small_config()
    network = build_model(config, 4).double().eval()
    with Loader(uri, manifest, "val", threads=1) as loader:
        where = {"device": CPU, "rank": rank, "world_size": world_size}
        found = evaluate(
            lambda x: network(x.double()), loader, input_spec(manifest, config), **where
        )
    return asdict(found)


def train_on_rank(
    rank: int, world_size: int, uri: str, few: str, keep: Path, middle: Path
) -> dict[str, Any]:
    steps = seen_ids(setattr)
    place = loop.Place(CPU, rank=rank, world_size=world_size)
    keep = keep / f"{world_size}-{rank}"
    with pytest.MonkeyPatch.context() as patch:
        without_dropout(patch.setattr)
        plain = fit(small_config(), uri, keep / "plain", place=place)
        ids = list(steps)
        rest = fit(small_config(), uri, keep / "rest", resume=middle, place=place)
    norm = fit(small_config(model_batch_norm=True), uri, keep / "norm", place=place)
    return {
        "ids": ids,
        "resumed_ids": steps[8 : 8 + 5],
        "folders": [str(run.last) if run.folders else "" for run in (plain, rest, norm)],
        "logged": [len(plain.logged), [sorted(metrics) for _, metrics in plain.logged[-2:]]],
        "reported": [(metrics, str(folder)) for metrics, folder in plain.reported],
        "losses": [metrics["loss"] for _, metrics in plain.logged if "loss" in metrics],
        "result": norm.result,
        "counts": [counted(data, rank, world_size) for data in (uri, few)],
    }


@dataclass(frozen=True)
class Together:
    alone: Record
    ids: list[list[int]]
    ranks: dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """28 samples: 4 steps of 7, which neither 2 nor 3 ranks divide."""
    return write_shard_set(tmp_path_factory.mktemp("ranks") / "set", train=(10, 9, 9), val=(7, 6))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fewer val images than ranks."""
    return write_shard_set(tmp_path_factory.mktemp("ranks") / "few", train=(1,), val=(1, 1))


@pytest.fixture(scope="module")
def together(uri: str, few: str, tmp_path_factory: pytest.TempPathFactory) -> Together:
    """The same training by one process here and by two and three over gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        without_dropout(patch.setattr)
        steps = seen_ids(patch.setattr)
        alone = fit(small_config(checkpoint_steps=3), uri, folder / "alone")
    ranks = run_ranks([3, 2], train_on_rank, folder, uri, few, folder, alone.folders[3])
    return Together(alone, steps, ranks)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_see_between_them_what_one_process_sees(together, world_size):
    ranks = together.ranks[world_size]
    for step, ids in enumerate(together.ids):
        parts = [rank["ids"][step] for rank in ranks]
        assert sorted(itertools.chain(*parts)) == sorted(ids), f"step {step}"
    for step, ids in enumerate(together.ids[3:]):
        parts = [rank["resumed_ids"][step] for rank in ranks]
        assert sorted(itertools.chain(*parts)) == sorted(ids), f"step {step} after resuming"
    assert all(len(rank["ids"]) == len(together.ids) == 8 for rank in ranks)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("number", [0, 1], ids=["whole", "resumed from one process"])
def test_ranks_learn_what_one_process_learns(together, world_size, number):
    """Weights after 8 steps of momentum. float32 sums in another order: 1e-6 is measured."""
    alone = load_file(together.alone.last / "model.safetensors")
    found = load_file(Path(together.ranks[world_size][0]["folders"][number]) / "model.safetensors")
    initial = build_model(small_config(), 4).state_dict()
    for name, value in alone.items():
        moved = (value - initial[name]).abs().max()
        difference = (found[name] - value).abs().max()
        assert difference < 2e-3 * moved, f"{name}: moved {moved:.2e}, differs {difference:.2e}"


@pytest.mark.parametrize("world_size", [2, 3])
def test_only_rank_zero_speaks_and_all_ranks_report(together, world_size):
    first, *others = together.ranks[world_size]
    assert first["logged"][0] == len(together.alone.logged)
    assert all(rank["logged"][0] == 0 for rank in others)
    for rank in others:
        assert [metrics for metrics, _ in rank["reported"]] == [m for m, _ in first["reported"]]
        assert {folder for _, folder in rank["reported"]} == {"None"}
        assert rank["folders"] == ["", "", ""]
    assert "None" not in {folder for _, folder in first["reported"]}
    alone = [metrics["loss"] for _, metrics in together.alone.logged if "loss" in metrics]
    assert first["losses"] == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_measured_is_what_is_saved_with_batch_norm_over_ranks(together, world_size, uri):
    """Running statistics differ by rank: all ranks must evaluate those of the checkpoint."""
    first, *others = together.ranks[world_size]
    assert all(rank["result"] == first["result"] for rank in others)
    found = evaluated(Path(first["folders"][2]), uri, "val", model_batch_norm=True)
    assert found.top1 == first["result"]["val_top1"]
    assert found.loss == pytest.approx(first["result"]["val_loss"], rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_count_every_image_once_also_where_there_are_fewer_than_ranks(
    together, world_size, uri, few
):
    alone = [counted(data) for data in (uri, few)]
    assert [found["images"] for found in alone] == [13, 2]
    for rank in together.ranks[world_size]:
        for found, expected in zip(rank["counts"], alone, strict=True):
            assert found == expected | {"loss": pytest.approx(expected["loss"], rel=1e-9)}
