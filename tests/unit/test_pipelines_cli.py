"""python -m pipelines as a user meets it: words, exit codes, one line for each mistake."""

import io
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from drawn import ROOT, A, B, C, archives, jpeg, tar
from labelled_tars import numbered
from made import made_shards
from PIL import Image

from pipelines import cluster, plan, plan_files, shards, sources, storage
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


def test_plan_says_what_build_would_do_and_changes_nothing(raw, capsys):
    before = sorted(Path(raw).parent.rglob("*"))
    assert main(["plan", "--raw", raw, "--samples-per-shard", "4"]) == 0
    said = capsys.readouterr().out
    assert "ilsvrc2012, 6 train + 3 val images, 3 classes" in said
    assert "train: 6 images in shards 0 to 1 of 3" in said
    assert "val: 3 images in shards 2 to 2 of 3" in said
    assert "MB of shards; plan_id " in said
    assert sorted(Path(raw).parent.rglob("*")) == before


def test_a_plan_of_a_quarter_of_what_memory_holds_says_how_many_that_are(raw, capsys, monkeypatch):
    for images, told in ((35, True), (36, False)):
        memory = SimpleNamespace(total=400 * images)
        monkeypatch.setattr("psutil.virtual_memory", lambda memory=memory: memory)
        assert main(["plan", "--raw", raw]) == 0
        note = f"note: memory here is enough for the plans of {images} images at most\n"
        assert (note in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--qualty", "90"], "unrecognized arguments: --qualty 90; see `python -m pipelines"),
        (["--crop", "many"], "invalid int value: 'many'"),
        (["--crop", "100"], "--crop 100 with --resize 256"),
        (["--only", "0,7"], "there is no shard 7, only 0 to 1"),
        (["--only", "first"], "'first' is no shard"),
        (["--subset", "n99999999"], "n99999999"),
        (["--verify-md5"], "md5"),
        (["--max-rejected", "lots"], "--max-rejected lots"),
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (["--out", "gs://bucket/x"], "only local paths and s3://"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
        (["--raw", "/nowhere"], "no folder with files"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_2(raw, capsys, flags, named):
    assert named in refused(capsys, "build", "--raw", raw, *flags)


@pytest.mark.parametrize("flags", [("--workers", "2"), ("--address", "host:1"), ("--shared-fs",)])
def test_verify_takes_no_cluster_for_what_it_reads_by_itself(capsys, flags):
    assert "are for --full and --repair" in refused(capsys, "verify", "/nowhere", *flags)


def test_a_set_that_was_begun_in_the_order_of_its_sorted_source_goes_on_so(tmp_path, capsys):
    raw = str(numbered(tmp_path / "raw", {"train.tar": [0] * 12 + [1] * 12, "val.tar": [0, 1]}))
    made = plan.make(sources.scan(raw, ("train", "val")), Recipe(shuffle="source"))
    plan_files.begin(out := str(tmp_path / "out"), raw, made)

    def planned(*flags: str) -> str:
        assert main(["plan", "--raw", raw, "--json", *flags]) == 0
        return str(json.loads(capsys.readouterr().out)["plan_id"])

    assert planned("--out", out) == made.plan_id
    assert planned("--out", out, "--shuffle", "classes") == planned() != made.plan_id


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        # An unknown flag is told before what is missing without it.
        ("build --rw X", "unrecognized arguments: --rw X; see `python -m pipelines build"),
        ("build --rw=X", "--help` for --raw"),
        ("verify -repair", "verify --help` for --repair"),
        ("--vers build", "unrecognized arguments: --vers; see `python -m pipelines -"),
        ("inspect --what --json", "unrecognized arguments: --what; see"),
        *((argv, "--help") for argv in ("", "bild", "build", "inspect", "demo-raw")),
        ("verify /nowhere", "no finished shard set"),
        ("report /nowhere", "no finished shard set"),
        ("inspect train-000000", "python -m pipelines build"),
        ("status", "name the OUT that was given to build --out"),
        ("status '/no where'", "build --raw RAW --out '/no where'`"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(home, capsys, argv, told):
    assert told in refused(capsys, *shlex.split(argv))


def last_line(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The words of the command in the last line, as a shell reads them."""
    word, *words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert word == "next:"
    return words


def test_a_finished_set_is_left_alone_and_what_is_next_told(
    drawn_raw, copy, tmp_path, capsys, monkeypatch
):
    out = str(copy.rename(tmp_path / "my shards"))
    before = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")}
    monkeypatch.setattr(cluster, "is_known", lambda: False)
    argv = ["build", "--raw", drawn_raw, "--out", out, "--samples-per-shard"]
    assert main([*argv, "8"]) == 0
    assert last_line(capsys) == ["python", "training/run.py", "--data", out]
    monkeypatch.chdir(tmp_path)
    assert main([*argv, "8"]) == 0
    assert last_line(capsys) == ["python", f"{ROOT}/training/run.py", "--data", out]
    monkeypatch.setattr(cluster, "is_known", lambda: True)
    assert main([*argv, "8"]) == 0
    job = ["--", "python", "training/run.py", "--data", out]
    assert last_line(capsys) == ["ray", "job", "submit", "--working-dir", str(ROOT), *job]
    assert main([*argv, "8", "--address", "head:6379"]) == 0
    assert last_line(capsys)[:5] == ["ray", "job", "submit", "--address", "head:6379"]
    assert {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")} == before
    assert "samples_per_shard 8 → 9" in refused(capsys, *argv, "9")


def test_a_set_that_no_run_could_use_says_so_instead(drawn_raw, tmp_path, capsys):
    made_shards(drawn_raw, str(tmp_path / "val"), Recipe(splits=("val",)))
    argv = ["build", "--raw", drawn_raw, "--out", str(tmp_path / "val"), "--splits", "val"]
    assert main(argv) == 0
    assert "next: a run needs train and val; build with --splits" in capsys.readouterr().out


def test_status_is_of_the_newest_build_also_when_it_is_not_finished(drawn_raw, home, capsys):
    made_shards(drawn_raw, str(home / "shards" / "begun"), Recipe(samples_per_shard=8))
    (home / "shards" / "begun" / "manifest.json").unlink()
    assert main(["status"]) == 0
    assert "not complete" in capsys.readouterr().out


def test_paths_to_copy_are_quoted_for_a_shell(tmp_path, capsys):
    raw = str(tmp_path / "my raw")
    sizes = ["--classes", "2", "--per-class", "2", "--val-per-class", "1"]
    assert main(["demo-raw", raw, *sizes]) == 0
    assert last_line(capsys) == ["python", "-m", "pipelines", "build", "--raw", raw]


def test_a_build_with_too_many_rejected_fails_and_with_a_limit_keeps_them(tmp_path, capsys):
    inner = tar([(f"{A}_{n}.JPEG", data) for n, data in enumerate((jpeg(1), b"", b"<html>"))])
    raw, out = archives(tmp_path / "raw", train=tar([(f"{A}.tar", inner)])), tmp_path / "out"
    argv = ["build", "--raw", str(raw), "--out", str(out), "--splits", "train", "--partial"]
    assert main([*argv, "--max-rejected", "1"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("failed: 2 of 3 images (67%) are unusable, more than --max-rejected 1: ")
    assert f"{A}_1 (zero_bytes), {A}_2 (not_an_image)" in line
    assert not (out / "manifest.json").exists()

    assert main([*argv, "--max-rejected", "70%"]) == 0
    said = capsys.readouterr().out
    assert f"built {out}: 1 train samples in 1 shards" in said
    assert "rejected: 1 not_an_image, 1 zero_bytes" in said
    assert len(shards.load_quarantine(str(out), "train")) == 2


def test_json_is_all_that_programs_get(raw, tmp_path, capsys):
    out = str(tmp_path / "out")

    def said(*argv: str, code: int = 0) -> list[dict[str, Any]]:
        assert main([*argv, "--json"]) == code
        text = capsys.readouterr().out
        whole = text.startswith("{\n")
        return [json.loads(part) for part in ([text] if whole else text.splitlines())]

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


def test_shards_of_one_size_become_shards_of_another(drawn_raw, tmp_path, capsys):
    large, same, small = (str(tmp_path / name) for name in ("large", "same", "small"))
    made_shards(drawn_raw, large, Recipe(crop=256, samples_per_shard=8))
    argv = ["build", "--raw", large, "--samples-per-shard", "20", "--out"]
    assert main([*argv, same]) == 0
    assert main([*argv, small, "--crop", "227"]) == 0
    before, kept, cut = (
        {row["key"]: row for row in shards.load_index(out, "train").to_pylist()}
        for out in (large, same, small)
    )
    assert all(kept[key]["sha256"] == row["sha256"] for key, row in before.items())
    assert shards.load_manifest(same).crop == 256 and shards.load_manifest(small).crop == 227
    key, row = next(iter(cut.items()))
    assert row["label"] == before[key]["label"]

    def pixels(out: str, row: dict[str, Any]) -> np.ndarray:
        data = storage.read(f"{out}/{row['shard']}.tar", row["offset"], row["size"])
        return np.asarray(Image.open(io.BytesIO(data)), dtype=float)

    centre = pixels(large, before[key])[14:241, 14:241]
    assert np.abs(pixels(small, row) - centre).mean() < 3
    capsys.readouterr()
    enlarged = ["--resize", "300", "--crop", "260"]
    assert "needs more than these shards hold" in refused(capsys, *argv[:3], *enlarged)


def test_a_subset_is_ranked_by_its_own_classes(raw, capsys):
    argv = ["plan", "--raw", raw, "--subset", f"{C},{B}", "--per-class", "1", "--json"]
    assert main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["classes"] == 2
    assert document["splits"]["train"]["pictures"] == document["splits"]["val"]["pictures"] == 2
    assert document["identity"]["recipe"]["subset"] == [B, C]
