"""Figures show the numbers and the images they were given, and what a network says of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from shard_sets import write_shard_set
from small_training import fit, small_config

from pipelines.shards import load_manifest
from training.figures import confusion, conv1_kernels, curves, main, mistakes, read_images, top5
from training.network import load_model

HISTORY = {"loss": [(1, 2.0), (2, 1.5)], "val_loss": [(2, 1.2)], "top1": [(1, 0.1), (2, 0.2)]}


@pytest.mark.parametrize("history", [HISTORY, {"val_top1": [(1, 0.5)]}, {"loss": []}])
def test_curves_show_every_point_that_there_is(history):
    lines = [line for axes in curves(history, "a title").axes for line in axes.lines]
    shown = {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in lines}
    assert shown == {name: points for name, points in history.items() if points}


def test_each_kernel_is_stretched_to_its_own_range():
    weight = torch.randn(18, 3, 11, 11, generator=torch.Generator().manual_seed(0))
    weight[1] = 1  # a constant one is no division by zero
    (image,) = conv1_kernels(weight).axes[0].images
    sheet = np.asarray(image.get_array())
    for number, (top, left) in {0: (1, 1), 17: (13, 13)}.items():
        kernel = weight[number].numpy().transpose(1, 2, 0)
        expected = (kernel - kernel.min()) / (kernel.max() - kernel.min())
        np.testing.assert_allclose(sheet[top : top + 11, left : left + 11], expected, atol=1e-6)
    assert np.isfinite(sheet).all()


def test_mistakes_show_every_image_above_its_names():
    images = torch.randint(0, 256, (8, 3, 227, 227), dtype=torch.uint8)
    captions = [(f"class {i}, synonym", f"other_{i} $x$", 1 - i / 100) for i in range(8)]
    figure = mistakes(images, captions, "a $title")
    FigureCanvasAgg(figure).draw()
    for number, axes in enumerate(figure.axes):
        assert (axes.images[0].get_array() == images[number].permute(1, 2, 0).numpy()).all()
        names = f"is: class {number}\nsaid: other_{number} $x$, {100 - number}.00%"
        assert axes.get_xlabel() == names
    assert mistakes(torch.empty(0), [], "none").axes == []


@pytest.mark.parametrize("classes", [3, 50])
def test_confusion_shows_the_share_of_each_row_and_of_few_classes_the_numbers(classes):
    counts = np.zeros((classes, classes), dtype=np.int64)
    counts[0, 0], counts[0, 2], counts[1, 1] = 3, 1, 5  # and nothing of the others
    figure = confusion(counts, [f"name {i}, synonym" for i in range(classes)], "a $title")
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    shown = np.asarray(axes.images[0].get_array()) ** 2
    assert shown[0, :3].tolist() == pytest.approx([0.75, 0, 0.25])
    assert shown[1, 1] == 1 and shown[2:].sum() == 0
    texts = {(*text.get_position(), text.get_text()) for text in axes.texts}
    assert texts == ({(0, 0, "3"), (2, 0, "1"), (1, 1, "5")} if classes == 3 else set())
    if classes == 3:
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            "name 0",
            "name 1",
            "name 2",
        ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Shards, and the last checkpoint of a network that learned from them."""
    folder = tmp_path_factory.mktemp("figures")
    data = write_shard_set(folder / "set", train=(10, 9), val=(7, 6))
    return data, fit(small_config(), data, folder / "run").last


@torch.inference_mode()
def test_top5_shows_images_all_over_val_and_the_networks_probabilities(run):
    data, model, manifest = run[0], load_model(str(run[1])), load_manifest(run[0])
    ids = np.array([0, 2, 3, 5, 7, 9, 10, 12])  # of 13 images, sample i of class i % 4
    images = read_images(data, manifest, "val", ids)
    spec = model.input_spec
    mean, std = (np.array(values)[:, None, None] for values in (spec.mean, spec.std))
    x = torch.from_numpy((images.double().numpy() - mean) / std).float()
    figure = top5(model.network, spec, manifest, data, "a $title")
    FigureCanvasAgg(figure).draw()
    assert len(figure.axes) == 16
    for number, row in enumerate(model.network(x).softmax(1).numpy()):
        image, bars = figure.axes[2 * number : 2 * number + 2]
        shown = np.asarray(image.images[0].get_array())
        assert (shown == images[number].permute(1, 2, 0).numpy()).all()
        label, order = ids[number] % 4, np.argsort(-row)
        assert image.get_xlabel() == f"colour {label}"
        np.testing.assert_allclose([bar.get_width() for bar in bars.patches], row[order], atol=1e-5)
        assert [text.get_text() for text in bars.texts[::2]] == [f"colour {i}" for i in order]


def test_command_writes_both_figures_where_it_is_told_or_under_the_home(
    run, home, tmp_path, capsys, monkeypatch
):
    data, checkpoint = run
    monkeypatch.setattr("training.figures.top5", lambda *_: curves({}, "drawn above"))
    for out in (tmp_path / "new" / "figures", None):
        flags = [] if out is None else ["--out", str(out)]
        assert main([str(checkpoint), "--data", data, *flags]) == 0
        told = [Path(line) for line in capsys.readouterr().out.splitlines()]
        assert [path.name for path in told] == ["conv1.png", "top5.png"]
        assert told[0].parent == out or told[0].parent.parent == home / "figures"
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in told)
