"""The pictures of a run show the numbers and the pictures they were given."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.figures import Caption, contact_sheet, conv1_kernels, curves, short

HISTORY = {
    "loss": [(1, 2.0), (2, 1.5), (3, 1.0)],
    "val_loss": [(3, 1.2)],
    "top1": [(1, 0.1), (2, 0.2), (3, 0.4)],
    "val_top1": [(3, 0.3)],
}


def drawn_lines(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    lines = [line for axes in figure.axes for line in axes.lines]
    return {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in lines}


def test_curves_show_every_point_in_its_panel():
    figure = curves(HISTORY, "a title")
    assert drawn_lines(figure) == HISTORY
    left, right = figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("cross-entropy, nats", "top-1")
    assert {line.get_label() for line in left.lines} == {"loss", "val_loss"}
    assert figure.get_suptitle() == "a title"
    FigureCanvasAgg(figure).draw()


@pytest.mark.parametrize("history", [{}, {"loss": []}, {"val_top1": [(1, 0.5)]}])
def test_absent_curves_are_left_out(history):
    figure = curves(history, "a title")
    assert drawn_lines(figure) == {name: points for name, points in history.items() if points}
    FigureCanvasAgg(figure).draw()


@pytest.mark.parametrize(("count", "rows", "columns"), [(96, 6, 16), (4, 1, 4), (18, 2, 16)])
def test_kernels_lie_in_rows_of_sixteen_each_stretched_to_its_range(count, rows, columns):
    weight = torch.randn(count, 3, 11, 11, generator=torch.Generator().manual_seed(0))
    (image,) = conv1_kernels(weight).axes[0].images
    sheet = np.asarray(image.get_array())
    assert sheet.shape == (rows * 12 + 1, columns * 12 + 1, 3)
    for number in (0, 3, count - 1):
        top, left = number // columns * 12 + 1, number % columns * 12 + 1
        kernel = weight[number].numpy().transpose(1, 2, 0)
        expected = (kernel - kernel.min()) / (kernel.max() - kernel.min())
        np.testing.assert_allclose(sheet[top : top + 11, left : left + 11], expected, atol=1e-6)
    assert (sheet[0] == 1).all() and (sheet[:, 12] == 1).all(), "no gap between kernels"


def test_constant_kernel_is_drawn_without_dividing_by_zero():
    (image,) = conv1_kernels(torch.ones(2, 3, 11, 11)).axes[0].images
    assert np.isfinite(np.asarray(image.get_array())).all()


def test_contact_sheet_shows_every_picture_above_its_names():
    pictures = torch.randint(0, 256, (8, 3, 227, 227), dtype=torch.uint8)
    captions = [Caption(f"class {i}, synonym", f"other_{i} $x$", 1 - i / 100) for i in range(8)]
    figure = contact_sheet(pictures, captions, "a $title")
    FigureCanvasAgg(figure).draw()
    assert figure.get_suptitle() == "a $title" and len(figure.axes) == 8
    for number, axes in enumerate(figure.axes):
        (image,) = axes.images
        assert (np.asarray(image.get_array()) == pictures[number].permute(1, 2, 0).numpy()).all()
        (said,) = axes.texts
        assert axes.get_xlabel() == f"is: class {number}"
        assert said.get_text() == f"said: other_{number} $x$, {100 - number}.00%"
    boxes = [axes.get_position() for axes in figure.axes]
    assert [round(box.x0 * 6 - 0.04) for box in boxes] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert len({round(box.y0, 6) for box in boxes}) == 2 and boxes[6].y1 < boxes[0].y0
    whole = figure.bbox
    for axes in figure.axes:
        said = axes.texts[0].get_window_extent()
        assert whole.x0 <= said.x0 and said.x1 <= whole.x1 and whole.y0 <= said.y0


def test_contact_sheet_of_unlabelled_pictures_says_only_what_they_are_taken_for():
    captions = [Caption(None, "tench", 0.5), Caption("tench", "tench", 0.9)]
    figure = contact_sheet(torch.zeros(2, 3, 227, 227, dtype=torch.uint8), captions, "a title")
    FigureCanvasAgg(figure).draw()
    unlabelled, right = figure.axes
    assert unlabelled.get_xlabel() == "" and right.get_xlabel() == "is: tench"
    assert unlabelled.texts[0].get_text() == "said: tench, 50.00%"
    assert unlabelled.texts[0].get_color() == right.texts[0].get_color() == "black"


def test_a_sheet_without_mistakes_is_empty():
    figure = contact_sheet(torch.empty(0, dtype=torch.uint8), [], "none")
    FigureCanvasAgg(figure).draw()
    assert figure.axes == []


def test_names_are_cut_to_their_first_synonym_and_to_what_fits():
    assert short("tench, Tinca tinca") == "tench"
    long = short("West Highland white terrier")
    assert long == "West Highland white…" and len(long) == 20
