"""`python -m training.predict` on a registered model that knows its images by heart."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from registered import FOREIGN, GOOD, POOR, Built

from pipelines.shards import load_index
from training.predict import main
from training.registry.versions import load

# As shard_sets draws them: planes of these colours, with noise.
COLOURS = [(0, 0, 128), (85, 255, 128), (170, 0, 128), (255, 255, 128)]


@pytest.fixture(autouse=True)
def champion(registered_models: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    client = registered_models.enter_copy(tmp_path / "home", monkeypatch)
    client.set_registered_model_alias("alexnet", "champion", GOOD)


def draw(path: Path, colour: tuple[int, int, int], height: int, width: int) -> str:
    noise = np.random.default_rng(5).integers(-40, 40, (height, width, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return str(path)


def answers(out: str) -> list[tuple[str, list[tuple[str, float]]]]:
    """(image, [(class name, percent)]) as printed."""
    found: list[tuple[str, list[tuple[str, float]]]] = []
    for line in out.splitlines():
        if match := re.fullmatch(r"  +(\d+\.\d\d)%  (.+)", line):
            found[-1][1].append((match[2], float(match[1])))
        else:
            found.append((line, []))
    return found


def test_images_of_other_sizes_and_formats_get_their_class_names(tmp_path, capsys):
    sizes = [(300, 260), (227, 227), (240, 500), (90, 100)]
    kinds = ["jpg", "png", "jpg", "webp"]
    paths = [draw(tmp_path / f"{i}.{kinds[i]}", COLOURS[i], *sizes[i]) for i in range(4)]
    assert main(paths) == 0
    found = answers(capsys.readouterr().out)
    assert [path for path, _ in found] == paths
    assert [classes[0][0] for _, classes in found] == [f"colour {i}" for i in range(4)]
    for _, classes in found:
        percents = [percent for _, percent in classes]
        assert len(classes) == 4, "four classes, though five are asked for"
        assert percents == sorted(percents, reverse=True)
        assert sum(percents) == pytest.approx(100, abs=0.1)


def by_pillow(path: Path, resize: int) -> list[float]:
    """Percent of each class for the centre 227×227 of the image at `resize`."""
    model = load("models:/alexnet@champion")
    with Image.open(path) as image:
        width, height = (round(side * resize / min(image.size)) for side in image.size)
        left, top = (width - 227) // 2, (height - 227) // 2
        resized = image.resize((width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(resized.crop((left, top, left + 227, top + 227)), dtype=np.float32)
    x = (pixels - model.input_spec.mean) / model.input_spec.std
    with torch.inference_mode():
        logits = model.network(torch.from_numpy(x.transpose(2, 0, 1)[None]).float())
    return [100 * float(p) for p in logits.softmax(-1)[0]]


def test_percentages_are_those_of_the_models_own_geometry(tmp_path, capsys):
    paths = [tmp_path / f"{edge}.png" for edge in (140, 160, 200, 240)]
    for path in paths:  # an edge that lies elsewhere where the image is resized to more than 227
        pixels = np.full((300, 400, 3), COLOURS[0], dtype=np.uint8)
        pixels[: int(path.stem)] = COLOURS[3]
        Image.fromarray(pixels).save(path)
    expected = [by_pillow(path, 227) for path in paths]
    others = [by_pillow(path, 256) for path in paths]
    assert np.abs(np.subtract(others, expected)).max() > 0.4, "geometries cannot be told apart"
    assert main([str(path) for path in paths]) == 0
    found = [dict(classes) for _, classes in answers(capsys.readouterr().out)]
    percents = [[row[f"colour {i}"] for i in range(4)] for row in found]
    np.testing.assert_allclose(percents, expected, atol=0.1)


def test_top_and_model_choose(tmp_path, capsys):
    path = draw(tmp_path / "a.png", COLOURS[3], 250, 250)
    assert main([path, "--top", "1"]) == 0
    ((_, best),) = answers(capsys.readouterr().out)
    assert len(best) == 1 and best[0][0] == "colour 3"
    assert main([path, "--model", f"models:/alexnet/{POOR}", "--top", "1"]) == 0
    ((_, other),) = answers(capsys.readouterr().out)
    assert other != best, "the same model answered"


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_bad_file_is_told_in_one_line_and_the_others_are_predicted(tmp_path, capsys):
    good = [draw(tmp_path / f"{i}.png", COLOURS[i], 250, 250) for i in range(2)]
    (tmp_path / "text.jpg").write_text("not an image")
    missing, text = str(tmp_path / f"{'p' * 300}.jpg"), str(tmp_path / "text.jpg")
    assert main([good[0], missing, text, good[1], "--top", "1"]) == 1
    out, err = capsys.readouterr()
    assert [path for path, _ in answers(out)] == good
    assert [line.split(" ")[0] for line in err.splitlines()] == ["error:", "error:"]
    assert missing in err and text in err


def test_wrong_usage_and_models_that_do_not_fit_are_one_line_and_exit_code_2(
    registered_models, tmp_path, capsys
):
    path = draw(tmp_path / "a.png", COLOURS[0], 250, 250)
    assert "the 0 likeliest classes" in refusal([path, "--top", "0"], capsys)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    assert "holds no image (1 entries" in refusal([str(tmp_path / "empty")], capsys)
    for uri in ("models:/alexnet/77", "models:/nobody@champion", "x"):
        assert f"{uri} cannot be loaded" in refusal([path, "--model", uri], capsys)
    for impossible in ("1" * 300, f"a/{'b' * 300}", f"s3://{'b' * 300}/x"):
        refusal([path, "--model", impossible], capsys)
    for argv in ([], [path, "--data", "x", "--out", "y"], ["--data", "x"], [path, "--out", "y"]):
        refusal(argv, capsys)
    split = ["--data", registered_models.data, "--out", str(tmp_path / "out")]
    assert "does not fit" in refusal([*split, "--model", FOREIGN], capsys)
    assert not (tmp_path / "out").exists()


def test_folders_are_walked_and_what_is_no_image_is_counted(tmp_path, capsys):
    folder = tmp_path / "pictures"
    (folder / "b" / "deep").mkdir(parents=True)
    expected = [
        draw(folder / "Z.JPEG", COLOURS[1], 230, 230),
        draw(folder / "a.png", COLOURS[0], 230, 230),
        draw(folder / "b" / "deep" / "c.webp", COLOURS[2], 230, 230),
    ]
    (folder / "notes.txt").write_text("no image")
    (folder / "b" / ".hidden.jpg").write_text("no image")
    alone = draw(tmp_path / "alone.gif", COLOURS[3], 230, 230)
    assert main([str(folder), alone, "--top", "1", "--model", GOOD]) == 0
    out, err = capsys.readouterr()
    assert [path for path, _ in answers(out)] == [*expected, alone]
    assert [classes[0][0] for _, classes in answers(out)] == [f"colour {i}" for i in (1, 0, 2, 3)]
    assert err == "skipped 2 entries that are not images\n"


def test_json_is_a_line_for_each_image_with_names_wnids_and_errors(tmp_path, capsys):
    path = draw(tmp_path / "a.png", COLOURS[2], 250, 250)
    missing = str(tmp_path / "nowhere.png")
    assert main([path, missing, "--json", "--top", "2"]) == 1
    found, failed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found["path"] == path and failed["path"] == missing
    assert "No such file" in failed["error"]
    best, second = found["classes"]
    assert (best["name"], best["wnid"]) == ("colour 2", "n00000002")
    assert best["probability"] > second["probability"] > 0


def test_more_images_than_a_batch_are_the_same_one_by_one(tmp_path, monkeypatch, capsys):
    paths = [draw(tmp_path / f"{i}.png", COLOURS[i % 4], 230, 230) for i in range(5)]
    monkeypatch.setattr("training.predict.BATCH_SIZE", 2)
    assert main([*paths, "--top", "1"]) == 0
    found = answers(capsys.readouterr().out)
    assert [classes[0][0] for _, classes in found] == [f"colour {i % 4}" for i in range(5)]


def test_a_split_becomes_one_table_in_a_file_or_a_folder(registered_models, tmp_path, capsys):
    data = registered_models.data
    for out in (tmp_path / "a" / "table.parquet", tmp_path / "b"):
        assert main(["--data", data, "--split", "train", "--out", str(out)]) == 0
        file, _, line = capsys.readouterr().out.partition(": ")
        table = pd.read_parquet(out)
        index = load_index(data, "train").to_pandas()
        for column in ("key", "label", "wnid"):
            assert table[column].tolist() == index[column].tolist()
        assert f"{len(index)} images; top-1 {table['correct'].mean():.4f} " in line
        assert Path(file) in (out, out / "predictions.parquet")
