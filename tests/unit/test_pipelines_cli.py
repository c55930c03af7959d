"""python -m pipelines as a user meets it: words, exit codes, one line for each mistake."""

import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import ROOT, A, B, C, archives, devkit, imagefolder, jpeg, tar
from made import made_shards
from PIL import Image

from pipelines import cluster, shards, storage
from pipelines.cli import main
from pipelines.plan import Recipe

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture
def raw(tmp_path: Path) -> str:
    return str(archives(tmp_path / "raw"))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that exits with 2 and says nothing else."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_plan_says_what_build_would_do_and_changes_nothing(
    raw: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path(raw).parent.rglob("*"))
    assert main(["plan", "--raw", raw, "--samples-per-shard", "4"]) == 0
    said = capsys.readouterr().out
    assert "ilsvrc2012, 6 train + 3 val images, 3 classes" in said
    assert "train: 6 images in shards 0 to 1 of 3" in said
    assert "val: 3 images in shards 2 to 2 of 3" in said
    assert "train: 6 are announced" in said
    assert "MB of shards; plan_id " in said
    assert sorted(Path(raw).parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--qualty", "90"], "unrecognized arguments: --qualty 90; see `python -m pipelines"),
        (["--crop", "many"], "invalid int value: 'many'"),
        (["--crop", "100"], "--crop 100 with --resize 256"),
        (["--splits", "train,dev"], "choose from train,val,test"),
        (["--only", "0,7"], "there is no shard 7, only 0 to 1"),
        (["--only", "first"], "'first' is no shard"),
        (["--shuffle", "well"], "choose from classes, global, source"),
        (["--subset", "n99999999"], "n99999999"),
        (["--verify-md5"], "md5"),
        (["--max-rejected", "lots"], "--max-rejected lots"),
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (["--out", "gs://bucket/x"], "only local paths and s3://"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_2(
    raw: str, capsys: pytest.CaptureFixture[str], flags: list[str], named: str
) -> None:
    assert named in refused(capsys, "build", "--raw", raw, *flags)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["build", "--rw", "X"], "unrecognized arguments: --rw X; see `python -m pipelines build"),
        (["build", "--rw=X"], "--help` for --raw"),
        (["verify", "-repair"], "verify --help` for --repair"),
        (["--vers", "build"], "unrecognized arguments: --vers; see `python -m pipelines -"),
        (["inspect", "--what", "--json"], "unrecognized arguments: --what; see"),
    ],
)
def test_an_unknown_flag_is_told_before_what_is_missing_without_it(
    capsys: pytest.CaptureFixture[str], argv: list[str], told: str
) -> None:
    assert told in refused(capsys, *argv)


@pytest.mark.parametrize("argv", [(), ("bild",), ("build",), ("inspect",), ("demo-raw",)])
def test_a_wrong_command_line_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]
) -> None:
    assert "--help" in refused(capsys, *argv)


def test_bad_raw_folders_are_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = archives(tmp_path / "missing", devkit=None)
    short = archives(tmp_path / "short", devkit=devkit([C, A, B], 3, "3\n1\n2\n"))
    both = imagefolder(archives(tmp_path / "both"), {f"train/{A}/{A}_1.JPEG": jpeg()})
    for folder, named in (
        (tmp_path / "nothing", "no folder with files"),
        (missing, "needs ILSVRC2012_devkit_t12.tar.gz, not there"),
        (short, "has 2 train images, the devkit announces 3"),
        (both, "is ambiguous"),
    ):
        for command in ("plan", "build"):
            out = str(tmp_path / "out")
            assert named in refused(capsys, command, "--raw", str(folder), "--out", out)
    assert not (tmp_path / "out").exists()


def test_a_finished_set_is_told_and_left_alone(
    drawn_raw: str, drawn_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    shutil.copytree(drawn_shards, out)
    before = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")}
    flags = ["--raw", drawn_raw, "--out", out, "--samples-per-shard"]
    assert main(["build", *flags, "8"]) == 0
    said = capsys.readouterr().out
    assert "is finished already" in said and f"training/run.py --data {out}" in said
    assert {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")} == before
    assert "samples_per_shard 8 → 9" in refused(capsys, "build", *flags, "9")


def last_line(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The words of the command in the last line, as a shell reads them."""
    word, *words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert word == "next:"
    return words


def test_last_line_of_a_build_is_a_command_that_works_here(
    drawn_raw: str,
    drawn_shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = str(tmp_path / "my shards")
    shutil.copytree(drawn_shards, out)
    monkeypatch.setattr(cluster, "is_known", lambda: False)
    argv = ["build", "--raw", drawn_raw, "--out", out, "--samples-per-shard", "8"]
    assert main(argv) == 0
    assert last_line(capsys) == ["python", "training/run.py", "--data", out]

    monkeypatch.chdir(tmp_path)
    assert main(argv) == 0
    assert last_line(capsys) == ["python", f"{ROOT}/training/run.py", "--data", out]

    monkeypatch.setattr(cluster, "is_known", lambda: True)
    assert main(argv) == 0
    job = ["--", "python", "training/run.py", "--data", out]
    assert last_line(capsys) == ["ray", "job", "submit", "--working-dir", str(ROOT), *job]
    assert main([*argv, "--address", "head:6379"]) == 0
    assert last_line(capsys)[:5] == ["ray", "job", "submit", "--address", "head:6379"]


def test_a_set_that_no_run_could_use_says_so_instead(
    drawn_raw: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "val")
    made_shards(drawn_raw, out, Recipe(splits=("val",)))
    assert main(["build", "--raw", drawn_raw, "--out", out, "--splits", "val"]) == 0
    assert "next: a run needs train and val; build with --splits" in capsys.readouterr().out


def test_status_without_a_folder_is_of_the_newest_build_also_when_it_is_not_finished(
    drawn_raw: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "name the OUT that was given to build --out" in refused(capsys, "status")
    made_shards(drawn_raw, str(home / "shards" / "begun"), Recipe(samples_per_shard=8))
    (home / "shards" / "begun" / "manifest.json").unlink()
    assert main(["status"]) == 0
    assert "not complete" in capsys.readouterr().out


def test_paths_to_copy_are_quoted_for_a_shell(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = str(tmp_path / "my raw")
    assert (
        main(["demo-raw", raw, "--classes", "2", "--per-class", "2", "--val-per-class", "1"]) == 0
    )
    assert last_line(capsys) == ["python", "-m", "pipelines", "build", "--raw", raw]
    assert f"build --raw RAW --out '{raw}'`" in refused(capsys, "status", raw)


def test_the_other_commands_say_what_they_did(
    drawn_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(drawn_shards, out)
    assert main(["verify", str(out), "--full"]) == 0
    assert "43 images decoded; no problems" in capsys.readouterr().out
    assert main(["inspect", "val-000001", "--out", str(out)]) == 0
    assert "6 samples" in capsys.readouterr().out
    assert main(["report", str(out)]) == 0
    assert (out / "report" / "index.html").exists()
    capsys.readouterr()
    (out / "val-000001.tar").write_bytes(b"")
    assert main(["verify", str(out)]) == 1
    assert "val-000001.tar: its 0 bytes should be" in capsys.readouterr().out


def test_missing_shard_sets_are_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("verify", "report"):
        assert "no finished shard set" in refused(capsys, command, str(tmp_path))
    assert "python -m pipelines build" in refused(capsys, "inspect", "train-000000")


def test_a_build_with_too_many_rejected_exits_1_and_with_a_limit_keeps_them_in_quarantine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = {f"{A}_1": jpeg(1), f"{A}_2": b"", f"{A}_3": b"<html>"}
    inner = tar([(f"{key}.JPEG", data) for key, data in images.items()])
    raw, out = archives(tmp_path / "raw", train=tar([(f"{A}.tar", inner)])), tmp_path / "out"
    argv = ["build", "--raw", str(raw), "--out", str(out), "--splits", "train", "--partial"]
    assert main([*argv, "--max-rejected", "1"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("failed: 2 of 3 images (67%) are unusable, more than --max-rejected 1: ")
    assert f"{A}_2 (zero_bytes), {A}_3 (not_an_image)" in line
    assert not (out / "manifest.json").exists()

    assert main([*argv, "--max-rejected", "70%"]) == 0
    said = capsys.readouterr().out
    assert f"built {out}: 1 train samples in 1 shards" in said
    assert "rejected: 1 not_an_image, 1 zero_bytes" in said
    listed = shards.load_quarantine(str(out), "train")
    assert [(entry["key"], entry["reason"]) for entry in listed] == [
        (f"{A}_2", "zero_bytes"),
        (f"{A}_3", "not_an_image"),
    ]
    for entry in listed:
        kept = out / "quarantine" / "train" / f"{entry['key']}.bin"
        assert kept.read_bytes() == images[entry["key"]]


def test_json_is_all_that_programs_get(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = str(archives(tmp_path / "raw")), str(tmp_path / "out")

    def said(*argv: str, code: int = 0) -> list[dict[str, Any]]:
        assert main([*argv, "--json"]) == code
        text = capsys.readouterr().out
        return (
            [json.loads(text)] if text.startswith("{\n") else [*map(json.loads, text.splitlines())]
        )

    (plan,) = said("plan", "--raw", raw, "--out", out, "--samples-per-shard", "4")
    assert plan["splits"]["train"]["samples_per_shard"] == [3, 3]
    assert plan["splits"]["val"]["announced"] == 3
    lines = said("build", "--raw", raw, "--out", out, "--samples-per-shard", "4")
    assert lines[-1]["event"] == "built" and lines[-1]["plan_id"] == plan["plan_id"]
    assert lines[-1]["totals"]["train"]["samples"] == 6
    (status,) = said("status", out)
    assert status["plan_id"] == plan["plan_id"]
    (shard,) = said("inspect", "train-000000", "--out", out)
    assert "train-000000" in json.dumps(shard)
    (found,) = said("verify", out)
    assert found["problems"] == [] and found["repaired"] is False
    Path(out, "val-000000.tar").write_bytes(b"")
    (found,) = said("verify", out, code=1)
    assert found["problems"][0]["file"] == "val-000000.tar"
    *_, found = said("verify", out, "--repair")
    assert found["problems"] == [] and found["repaired"] is True


def test_shards_of_one_size_become_shards_of_another_and_of_other_lengths(
    drawn_raw: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large, same, small = (str(tmp_path / name) for name in ("large", "same", "small"))
    made_shards(drawn_raw, large, Recipe(crop=256, samples_per_shard=8))
    argv = ["build", "--raw", large, "--samples-per-shard", "20", "--out"]
    assert main([*argv, same]) == 0
    assert main([*argv, small, "--crop", "227"]) == 0
    before = {row["key"]: row for row in shards.load_index(large, "train").to_pylist()}
    kept = {row["key"]: row for row in shards.load_index(same, "train").to_pylist()}
    assert {key: row["sha256"] for key, row in kept.items()} == {
        key: row["sha256"] for key, row in before.items()
    }
    assert shards.load_manifest(same).crop == 256 and shards.load_manifest(small).crop == 227
    row = shards.load_index(small, "train").to_pylist()[0]
    assert row["label"] == before[row["key"]]["label"]

    def pixels(out: str, row: dict[str, Any]) -> np.ndarray:
        data = storage.read(f"{out}/{row['shard']}.tar", row["offset"], row["size"])
        return np.asarray(Image.open(io.BytesIO(data)), dtype=float)

    centre = pixels(large, before[row["key"]])[14:241, 14:241]
    assert np.abs(pixels(small, row) - centre).mean() < 3
    capsys.readouterr()
    enlarged = ["--resize", "300", "--crop", "260"]
    assert "needs more than these shards hold" in refused(capsys, *argv[:3], *enlarged)


def test_a_subset_is_ranked_by_its_own_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = str(archives(tmp_path / "raw"))
    argv = ["plan", "--raw", raw, "--subset", f"{C},{B}", "--per-class", "1", "--json"]
    assert main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["classes"] == 2
    assert document["splits"]["train"]["pictures"] == document["splits"]["val"]["pictures"] == 2
    assert document["identity"]["recipe"]["subset"] == [B, C]
