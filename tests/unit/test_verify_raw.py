"""pipelines/verify.py: labels looked up in RAW again, unlabelled images, S3, large shards."""

import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from built import build_set, write_folders
from drawn import A, archives, jpeg, tar
from drawn_layouts import hugging_face

from alexnet.errors import UserError
from pipelines import entries, recount, shards, sources, storage
from pipelines import verify as module
from pipelines.plan import Recipe
from pipelines.verify import Findings, verify

# No WNIDs: nothing but the folder says what the class is. Every image is another one.
TRAIN = {f"train/{c}/{c}{i}.jpg": 10 * k + i for k, c in enumerate("ab") for i in range(4)}
VAL = {f"val/{c}/v{c}{i}.jpg": 50 + 10 * k + i for k, c in enumerate("ab") for i in range(2)}


def told(findings: Findings) -> list[str]:
    return [f"{problem.file}: {problem.text}" for problem in findings.problems]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_folders(tmp_path / "raw", TRAIN | VAL)
    return tmp_path / "raw"


@pytest.fixture
def out(raw: Path, tmp_path: Path) -> str:
    return build_set(str(raw), tmp_path / "out", Recipe(samples_per_shard=4, partial=True))


def test_labels_that_raw_gives_otherwise_now_are_told_with_both(raw: Path, out: str) -> None:
    (raw / "train/a/a1.jpg").rename(raw / "train/b/a1.jpg")
    (raw / "train/a/a2.jpg").rename(raw / "train/b/a2.jpg")
    assert told(verify(out, full=True)) == []
    (line,) = told(verify(out, full=True, raw=str(raw)))
    start = "index/train.parquet: 2 samples with another class, first "
    assert re.fullmatch(rf"{start}a[12]: a here, b in {re.escape(str(raw))}", line)


def test_images_that_came_to_raw_or_went_are_counted(raw: Path, out: str) -> None:
    (raw / "val/a/va0.jpg").unlink()
    write_folders(raw, {"val/a/vnew1.jpg": 90, "val/a/vnew2.jpg": 91})
    assert told(verify(out, full=True, raw=str(raw))) == [
        f"index/val.parquet: 2 images (first vnew1) in {raw}, but neither stored nor in quarantine",
        f"index/val.parquet: 1 image (first va0) stored, but not in {raw}",
    ]


def test_raw_that_cannot_be_read_is_the_users_to_mend(out: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder with files"):
        verify(out, full=True, raw=str(tmp_path / "nothing"))


def test_a_subset_is_compared_with_the_same_subset_of_raw(raw: Path, tmp_path: Path) -> None:
    write_folders(raw, {"train/c/c0.jpg": 70, "val/c/vc0.jpg": 71})
    recipe = Recipe(subset=("a", "c"), per_class=2, partial=True)
    out = build_set(str(raw), tmp_path / "subset", recipe)
    findings = verify(out, full=True, raw=str(raw))
    assert told(findings) == [] and "6 images decoded" in findings.checked


def test_what_the_build_overlooks_is_found_by_a_count_of_its_own(
    raw: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = entries.listing(str(raw))
    write_folders(raw, {"train/b/b9.jpg": 90, "train/b/odd.jfif": 91})
    (raw / "train/c").mkdir()
    write_folders(raw.parent / "elsewhere", {"d1.jpg": 92})
    (raw / "train/d").symlink_to(raw.parent / "elsewhere")
    (raw / "val/a/gone.jpg").symlink_to("nowhere")
    (raw / "val/a/notes.txt").write_text("no image")
    monkeypatch.setattr(entries, "listing", lambda uri: found)  # a listing that passes over them
    assert told(verify(out, full=True, raw=str(raw))) == [
        f"index/train.parquet: 4 entries without an account (first train/b/b9.jpg) in {raw}",
        f"index/val.parquet: 1 entries without an account (first val/a/gone.jpg) in {raw}",
    ]


def test_what_a_partial_set_left_out_by_name_is_no_problem(raw: Path, tmp_path: Path) -> None:
    (raw / "train/c").mkdir()
    (raw / "train/a/gone.jpg").symlink_to("nowhere")
    out = build_set(str(raw), tmp_path / "set", Recipe(partial=True))
    manifest = shards.load_manifest(out)
    assert manifest.wnids == ("a", "b", "c")
    assert manifest.document["entries"]["left_out"] == {
        "train/a/gone.jpg": "a link that leads nowhere",
        "train/c": "an empty class folder",
    }
    assert told(verify(out, full=True, raw=str(raw))) == []


@pytest.mark.parametrize("layout", ["ilsvrc", "huggingface", "shards"])
def test_archives_are_counted_again_by_other_readers(
    layout: str, drawn_raw: str, drawn_shards: str, tmp_path: Path
) -> None:
    raw = {"ilsvrc": drawn_raw, "shards": drawn_shards, "huggingface": str(tmp_path)}[layout]
    if layout == "huggingface":
        hugging_face(tmp_path)
    source = sources.scan(raw, ("train", "val"))
    assert list(recount.unaccounted(source, ("train", "val"), ())) == []
    fewer = replace(source, table=source.table.slice(1))
    ((split, text),) = recount.unaccounted(fewer, ("train", "val"), ())
    count = source.count("train")
    assert (split, text) == ("train", f"{count} images counted, {count - 1} found")


def test_litter_in_archives_is_no_image_to_either_reader(tmp_path: Path) -> None:
    inner = tar([(f"{A}_1.JPEG", jpeg(1)), (f"._{A}_1.JPEG", b"x"), (".DS_Store", b"x")])
    train = tar([(f"{A}.tar", inner), (f"__MACOSX/._{A}.tar", b"x"), (f"._{A}.tar", b"x")])
    raw = str(archives(tmp_path, train=train, val=None, devkit=None))
    source = sources.scan(raw, ["train"], partial=True)
    assert source.count("train") == 1
    assert list(recount.unaccounted(source, ("train",), ())) == []


def test_test_images_may_be_unlabelled(raw: Path, tmp_path: Path) -> None:
    write_folders(raw, {"test/t0.jpg": 80, "test/t1.jpg": 81})
    out = build_set(
        str(raw), tmp_path / "unlabelled", Recipe(splits=("train", "val", "test"), partial=True)
    )
    findings = verify(out, full=True, raw=str(raw))
    assert told(findings) == [] and "14 images decoded" in findings.checked


def test_a_shard_is_read_in_chunks_and_once(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    read = storage.read

    def counted(uri: str, offset: int = 0, length: int | None = None) -> bytes:
        data = read(uri, offset, length)
        if uri.endswith(".tar"):
            reads.append((offset, len(data)))
        return data

    monkeypatch.setattr(storage, "read", counted)
    assert told(verify(out)) == [] and reads == []
    monkeypatch.setattr(module, "_CHUNK", 3000)  # less than an image: members span chunks
    assert told(verify(out, full=True)) == []
    assert max(size for _, size in reads) == 3000
    tars = [path.stat().st_size for path in Path(out).glob("*.tar")]
    assert sum(size for _, size in reads) == sum(tars)


def test_progress_is_told_while_shards_are_read(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    said = threading.Event()
    read = storage.read

    def slow(uri: str, offset: int = 0, length: int | None = None) -> bytes:
        assert not uri.endswith(".tar") or said.wait(120)
        return read(uri, offset, length)

    def say(line: str) -> None:
        lines.append(line)
        said.set()

    monkeypatch.setattr(storage, "read", slow)
    monkeypatch.setattr(module, "_SAY_EVERY", 0.0)
    assert told(verify(out, full=True, say=say)) == []
    assert lines[0] == "verified 0 of 3 files, 0 of 0 MB, 0.0 MB/s, ETA ?"
    line = r"verified \d of 3 files, 0 of 0 MB, [\d.,]+ MB/s, ETA (\?|\d:\d\d:\d\d)"
    assert all(re.fullmatch(line, said) for said in lines)


def test_a_store_that_fails_stops_every_thread_and_is_told(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = storage.read

    def forbidden(uri: str, offset: int = 0, length: int | None = None) -> bytes:
        if uri.endswith("train-000001.tar"):  # root may read every local file
            raise UserError(f"{uri}: Permission denied")
        return read(uri, offset, length)

    monkeypatch.setattr(storage, "read", forbidden)
    with pytest.raises(UserError, match=r"train-000001\.tar: Permission denied"):
        verify(out, full=True)


def test_a_set_whose_manifest_is_damaged_is_still_hashed(out: str) -> None:
    Path(out, "manifest.json").write_text('{"format": "alexnet-shards", "format_version": 1}')
    path = Path(out, "val-000000.tar")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert verify(out).bad_files == ("manifest.json",)
    assert verify(out, full=True).bad_files == ("manifest.json", "val-000000.tar")
    shutil.rmtree(Path(out, "index"))
    assert "index/val.parquet" in verify(out).bad_files


def test_a_set_of_real_images_is_whole(data_folder: Path, tmp_path: Path) -> None:
    raw = str(data_folder / "tiny20" / "imagefolder")
    out = build_set(raw, tmp_path / "real", Recipe(samples_per_shard=50, partial=True))
    findings = verify(out, full=True, raw=raw)
    assert told(findings) == [] and findings.notes == ()
