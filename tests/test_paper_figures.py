"""Figures 3 and 4 of the paper show what the network says, computed here in another way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from shard_sets import write_shard_set
from small_training import fit, small_config
from torch.nn import functional as F

from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec
from pipelines.shards import Manifest, load_manifest
from training import figures, paper_figures
from training.figures import Neighbours, Panel
from training.loader import Loader
from training.network import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Shards, and the last checkpoint of a network that learned from them."""
    folder = tmp_path_factory.mktemp("paper")
    data = write_shard_set(folder / "set", train=(10, 9), val=(7, 6))
    return data, fit(small_config(), data, folder / "run").last


@pytest.fixture(scope="module")
def learned(run: tuple[str, Path]) -> tuple[AlexNet, InputSpec, Manifest, str]:
    data, checkpoint = run
    model = load_model(str(checkpoint))
    assert isinstance(model.network, AlexNet)
    return model.network, model.input_spec, load_manifest(data), data


def views(data: str, manifest: Manifest, split: str, spec: InputSpec) -> torch.Tensor:
    """All centre views of a split, by arithmetic of this test."""
    with Loader(data, manifest, split, threads=1, cache_gb=1) as loader:
        images = loader.read(np.arange(loader.num_samples)).images.double()
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (spec.mean, spec.std))
    return ((images - mean) / std).float()


def hidden_by_hand(network: AlexNet, x: torch.Tensor) -> torch.Tensor:
    """fc7 after its ReLU, from the layers' weights."""
    layers = dict(network.classifier.named_children())
    hidden = network.features(x).flatten(1)
    for name in ("fc6", "fc7"):
        hidden = F.linear(hidden, layers[name].weight, layers[name].bias).clamp(min=0)
    return hidden


@torch.inference_mode()
def test_panels_are_first_pictures_of_classes_with_the_five_likeliest(learned):
    network, spec, manifest, data = learned
    found = paper_figures.panels(*learned)
    # 13 pictures, sample i of class i % 4: the first of each class, then the second of each.
    assert [panel.key for panel in found] == [f"val_{i:04d}" for i in range(8)]
    assert [panel.true for panel in found] == [f"colour {i % 4}" for i in range(8)]
    probabilities = network(views(data, manifest, "val", spec)[:8]).softmax(1).numpy()
    for panel, row in zip(found, probabilities, strict=True):
        order = np.argsort(-row)
        assert [name for name, _ in panel.likeliest] == [f"colour {i}" for i in order]
        np.testing.assert_allclose([p for _, p in panel.likeliest], row[order], atol=1e-5)


@torch.inference_mode()
def test_neighbours_are_the_nearest_train_pictures_in_fc7(learned):
    network, spec, manifest, data = learned
    found, searched = paper_figures.neighbours(*learned, pictures=1000)
    assert (len(found), searched) == (5, 19)
    train = hidden_by_hand(network, views(data, manifest, "train", spec)).numpy()
    own = hidden_by_hand(network, views(data, manifest, "val", spec)[[0, 1, 2, 3, 4]]).numpy()
    with Loader(data, manifest, "train", threads=1, cache_gb=1) as loader:
        images = loader.read(np.arange(19)).images.clone()
    for row, query in zip(found, own, strict=True):
        distances = np.linalg.norm(train - query, axis=1)
        nearest = np.argsort(distances, kind="stable")[:6]
        np.testing.assert_allclose(row.distances, distances[nearest], rtol=1e-3)
        assert torch.equal(row.images, images[torch.from_numpy(nearest)])


def test_search_is_bounded_and_spread_over_the_train_split(learned):
    found, searched = paper_figures.neighbours(*learned, pictures=7)
    assert searched == 7 and all(len(row.images) == 6 for row in found)


@pytest.mark.parametrize(
    ("labels", "count", "chosen"),
    [
        ([2, 0, 1, 0, 2], 3, [1, 2, 0]),  # the first of each class, by class
        ([2, 0, 1, 0, 2], 4, [1, 2, 0, 3]),  # then the second ones
        ([0, 1, 2, 3, 4], 3, [0, 2, 4]),  # classes evenly spread
        ([-1, 1, -1, 1], 8, [1, 3]),  # without a label: never
    ],
)
def test_pictures_are_spread_over_the_classes(labels, count, chosen):
    found = paper_figures._spread_over_classes(np.array(labels), count)
    assert found.tolist() == chosen


def test_command_writes_the_three_pictures(run, tmp_path, capsys):
    data, checkpoint = run
    out = tmp_path / "new" / "figures"
    assert paper_figures.main([str(checkpoint), "--data", data, "--out", str(out)]) == 0
    told = capsys.readouterr().out.split()
    assert told == [str(out / name) for name in ("conv1.png", "top5.png", "neighbours.png")]
    for name in told:
        with Image.open(name) as image:
            assert image.format == "PNG" and min(image.size) > 50


def test_without_a_folder_the_pictures_lie_under_the_home_of_the_project(
    run, home, tmp_path, capsys, monkeypatch
):
    data, checkpoint = run
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    assert paper_figures.main([str(checkpoint), "--data", data]) == 0
    told = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(told) == 3 and all(path.is_file() for path in told)
    assert {path.parent.parent for path in told} == {home / "figures"}
    assert list((tmp_path / "checkout").iterdir()) == []


def test_command_tells_in_one_line_what_is_missing(run, tmp_path, capsys):
    data, checkpoint = run
    other = write_shard_set(tmp_path / "other", train=(8,), val=(5,), classes=3)
    for words, expected in [
        ([str(checkpoint)], "pass its shards with --data"),
        ([str(checkpoint), "--data", str(tmp_path)], "no finished shard set"),
        ([str(checkpoint), "--data", other], "does not fit"),
        ([str(checkpoint), "--data", data, "--pictures", "5"], "--pictures 5 is below 6"),
    ]:
        assert paper_figures.main(words) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1


def test_top5_panels_show_pictures_and_bars_with_the_true_class_in_red():
    images = torch.randint(0, 256, (5, 3, 227, 227), dtype=torch.uint8)
    rows = (("a $x$, synonym", 0.7), ("b", 0.2), ("c", 0.1))
    panels = [Panel(f"k{i}", images[i], "b" if i else "a $x$, synonym", rows) for i in range(5)]
    figure = figures.top5_panels(panels, "a $title")
    FigureCanvasAgg(figure).draw()
    assert len(figure.axes) == 10
    for number, panel in enumerate(panels):
        picture, bars = figure.axes[2 * number : 2 * number + 2]
        shown = np.asarray(picture.images[0].get_array())
        assert (shown == panel.image.permute(1, 2, 0).numpy()).all()
        assert picture.get_xlabel() == ("b" if number else "a $x$")
        assert [bar.get_width() for bar in bars.patches] == [0.7, 0.2, 0.1]
        red = [bar.get_facecolor()[0] > bar.get_facecolor()[2] for bar in bars.patches]
        assert red == ([False, True, False] if number else [True, False, False])
        words = [text.get_text() for text in bars.texts]
        assert words == ["a $x$", "70%", "b", "20%", "c", "10%"]


def test_neighbours_stand_beside_their_query_with_distances():
    images = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8)
    rows = [Neighbours(images[0], images[1:], tuple(map(float, range(6))))] * 2
    figure = figures.neighbours(rows, "a $title")
    FigureCanvasAgg(figure).draw()
    assert len(figure.axes) == 14
    for at, axes in enumerate(figure.axes):
        shown = np.asarray(axes.images[0].get_array())
        assert (shown == images[at % 7].permute(1, 2, 0).numpy()).all()
        assert axes.get_xlabel() == ("" if at % 7 == 0 else f"{at % 7 - 1:.1f}")
