"""Sets that are repaired, and images that are taken in later: the undisturbed set in the end."""

import shutil
from pathlib import Path

import pytest
from drawn import A, B, encoded, image, imagefolder, jpeg
from made import contents, made_shards

from pipelines import shards
from pipelines.cli import main
from pipelines.plan import Recipe

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.mark.parametrize(
    "damaged",
    [
        ("train-000001.tar",),
        ("train-000003.idx", "val-000000.tar"),
        ("index/train.parquet", "shardindex-val.json"),
        ("quarantine/train.jsonl",),
        ("manifest.json",),
        ("SHA256SUMS",),
        ("_meta/train-000002.parquet",),
    ],
)
def test_what_is_damaged_is_rebuilt_and_nothing_else(
    drawn_shards: str, copy: Path, capsys: pytest.CaptureFixture[str], damaged: tuple[str, ...]
) -> None:
    for name in damaged:
        data = bytearray((copy / name).read_bytes())
        # In a page of a parquet file: their footers have no checksum of their own.
        data[min(200, len(data) // 2)] ^= 255
        (copy / name).write_bytes(data)
    again = {name.removeprefix("_meta/").split(".")[0] for name in damaged}  # shards of theirs
    kept = {path: path.stat().st_mtime_ns for path in copy.glob("*.tar") if path.stem not in again}
    assert main(["verify", str(copy), "--full"]) == 1
    assert main(["verify", str(copy), "--full", "--repair"]) == 0, capsys.readouterr()
    assert contents(str(copy)) == contents(drawn_shards)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_repair_from_other_images_is_reported_by_the_changed_identity(
    drawn_raw: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = shutil.copytree(drawn_raw, tmp_path / "raw")
    (copy / "train-000001.tar").write_bytes(b"cut")
    index = shards.load_index(str(copy), "train").to_pylist()
    row = next(row for row in index if row["shard"] == "train-000001")
    archive, start = bytearray((raw / row["source"]).read_bytes()), row["source_offset"]
    other = encoded(image(seed=99))[: row["source_size"]].ljust(row["source_size"], b"\0")
    archive[start : start + row["source_size"]] = other
    (raw / row["source"]).write_bytes(archive)
    assert main(["verify", str(copy), "--repair", "--raw", str(raw)]) == 1
    assert "but not the data set that it was" in capsys.readouterr().err


def test_mended_images_are_taken_in_and_the_set_is_that_of_the_mended_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {
        f"{split}/{wnid}/{wnid}_{split}{n}.JPEG": jpeg(n)
        for split in ("train", "val")
        for wnid in (A, B)
        for n in range(4)
    }
    cut = f"train/{A}/{A}_train2.JPEG"
    bad = {cut: good[cut][:400], f"val/{B}/{B}_val0.JPEG": b""}
    raw, out, fresh = (tmp_path / name for name in ("raw", "out", "fresh"))
    imagefolder(raw, good | bad)
    argv = ["build", "--raw", str(raw), "--out", str(out), "--samples-per-shard", "4"]
    assert main([*argv, "--max-rejected", "2"]) == 0
    kept = (out / "train-000000.tar").stat().st_mtime_ns  # the cut one lies in the other
    (raw / cut).write_bytes(good[cut])
    capsys.readouterr()
    assert main(argv) == 2
    assert "source.table_sha256" in capsys.readouterr().err
    assert main([*argv, "--max-rejected", "2", "--retry-quarantined"]) == 0
    made_shards(str(raw), str(fresh), Recipe(samples_per_shard=4))
    assert contents(str(out)) == contents(str(fresh))
    assert shards.load_manifest(str(out)).document["rejected"] == {"zero_bytes": 1}
    assert (out / "train-000000.tar").stat().st_mtime_ns == kept


def test_more_than_mended_images_needs_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"train/{A}/{A}_{n}.JPEG": jpeg(n) for n in range(8)}
    raw = imagefolder(tmp_path / "raw", files | {f"train/{A}/{A}_0.JPEG": b""})
    argv = ["build", "--raw", str(raw), "--out", str(tmp_path / "out"), "--samples-per-shard", "4"]
    argv += ["--splits", "train", "--max-rejected", "1"]
    assert main(argv) == 0
    before = contents(str(tmp_path / "out"))
    for n in (0, 7):
        imagefolder(raw, {f"train/{A}/{A}_{n}.JPEG": jpeg(50)})
    capsys.readouterr()
    assert main([*argv, "--retry-quarantined"]) == 2
    assert "more has changed than quarantined images" in capsys.readouterr().err
    assert contents(str(tmp_path / "out")) == before
