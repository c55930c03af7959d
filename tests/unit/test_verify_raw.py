"""pipelines/verify.py: labels looked up in RAW again, unlabelled images, S3, large shards."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from drawn import A, archives, class_folders, jpeg, tar
from drawn_layouts import hugging_face
from labelled_tars import timm
from made import part_of
from waiting import wait_until

from alexnet.errors import UserError
from pipelines import entries, recount, shards, sources, storage
from pipelines import verify as module
from pipelines.plan import Recipe
from pipelines.sources.ilsvrc import TRAIN_TAR
from pipelines.verify import Findings, verify

# No WNIDs: nothing but the folder says what the class is. Every image is another one.
TRAIN = {f"train/{c}/{c}{i}.jpg": 10 * k + i for k, c in enumerate("ab") for i in range(4)}
VAL = {f"val/{c}/v{c}{i}.jpg": 50 + 10 * k + i for k, c in enumerate("ab") for i in range(2)}


def told(findings: Findings) -> list[str]:
    return [f"{problem.file}: {problem.text}" for problem in findings.problems]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    class_folders(tmp_path / "raw", TRAIN | VAL)
    return tmp_path / "raw"


@pytest.fixture
def out(raw: Path, tmp_path: Path) -> str:
    return part_of(str(raw), tmp_path / "out", Recipe(samples_per_shard=4, partial=True))


def test_labels_that_raw_gives_otherwise_now_are_told_with_both(raw, out):
    (raw / "train/a/a1.jpg").rename(raw / "train/b/a1.jpg")
    (raw / "train/a/a2.jpg").rename(raw / "train/b/a2.jpg")
    assert told(verify(out, full=True)) == []
    (line,) = told(verify(out, full=True, raw=str(raw)))
    start = "index/train.parquet: 2 samples with another class, first a"
    assert re.fullmatch(rf"{start}[12]: a here, b in {re.escape(str(raw))}", line)


def test_images_that_came_to_raw_or_went_are_counted(raw, out):
    (raw / "val/a/va0.jpg").unlink()
    class_folders(raw, {"val/a/vnew1.jpg": 90, "val/a/vnew2.jpg": 91})
    assert told(verify(out, full=True, raw=str(raw))) == [
        f"index/val.parquet: 2 images (first vnew1) in {raw}, but neither stored nor in quarantine",
        f"index/val.parquet: 1 image (first va0) stored, but not in {raw}",
    ]


def test_raw_that_cannot_be_read_is_the_users_to_mend(out, tmp_path):
    with pytest.raises(UserError, match="no folder with files"):
        verify(out, full=True, raw=str(tmp_path / "nothing"))


def test_a_subset_is_compared_with_the_same_subset_of_raw(raw, tmp_path):
    class_folders(raw, {"train/c/c0.jpg": 70, "val/c/vc0.jpg": 71})
    recipe = Recipe(subset=("a", "c"), per_class=2, partial=True)
    out = part_of(str(raw), tmp_path / "subset", recipe)
    findings = verify(out, full=True, raw=str(raw))
    assert told(findings) == [] and "6 images decoded" in findings.checked


def test_what_the_build_overlooks_is_found_by_a_count_of_its_own(raw, out, monkeypatch):
    found = entries.listing(str(raw))
    class_folders(raw, {"train/b/b9.jpg": 90, "train/b/odd.jfif": 91})
    (raw / "train/c").mkdir()
    class_folders(raw.parent / "elsewhere", {"d1.jpg": 92})
    (raw / "train/d").symlink_to(raw.parent / "elsewhere")
    (raw / "val/a/gone.jpg").symlink_to("nowhere")
    (raw / "val/a/notes.txt").write_text("no image")
    monkeypatch.setattr(entries, "listing", lambda uri: found)  # a listing that passes over them
    assert told(verify(out, full=True, raw=str(raw))) == [
        f"index/train.parquet: 4 entries without an account (first train/b/b9.jpg) in {raw}",
        f"index/val.parquet: 1 entries without an account (first val/a/gone.jpg) in {raw}",
    ]


def test_what_a_partial_set_left_out_by_name_is_no_problem(raw, tmp_path):
    (raw / "train/c").mkdir()
    (raw / "train/a/gone.jpg").symlink_to("nowhere")
    out = part_of(str(raw), tmp_path / "set", Recipe(partial=True))
    manifest = shards.load_manifest(out)
    assert manifest.wnids == ("a", "b", "c")
    assert manifest.document["entries"]["left_out"] == {
        "train/a/gone.jpg": "a link that leads nowhere",
        "train/c": "an empty class folder",
    }
    assert told(verify(out, full=True, raw=str(raw))) == []


@pytest.mark.parametrize("layout", ["ilsvrc", "huggingface", "webdataset", "shards"])
def test_archives_are_counted_again_by_other_readers(layout, drawn_raw, drawn_shards, tmp_path):
    raw = {"ilsvrc": drawn_raw, "shards": drawn_shards}.get(layout, "")
    raw = raw or str({"huggingface": hugging_face, "webdataset": timm}[layout](tmp_path))
    source = sources.scan(raw, ("train", "val"))
    assert list(recount.unaccounted(source, ("train", "val"), ())) == []
    fewer = replace(source, table=source.table.slice(1))
    found = list(recount.unaccounted(fewer, ("train", "val"), ()))
    count = source.count("train")
    assert found == [("train", f"{count} images counted, {count - 1} found")]


def test_litter_in_archives_is_no_image_to_either_reader(tmp_path):
    inner = tar([(f"{A}_1.JPEG", jpeg(1)), (f"._{A}_1.JPEG", b"x"), (".DS_Store", b"x")])
    train = tar([(f"{A}.tar", inner), (f"__MACOSX/._{A}.tar", b"x"), (f"._{A}.tar", b"x")])
    raw = str(archives(tmp_path, train=train, val=None, devkit=None))
    source = sources.scan(raw, ["train"], partial=True)
    assert source.count("train") == 1
    assert source.accounts.ignored_members == {TRAIN_TAR: 4}
    assert f"{TRAIN_TAR}: ignored 4 files that desktop systems leave behind" in source.notes[0]
    assert list(recount.unaccounted(source, ("train",), ())) == []


def test_test_images_may_be_unlabelled(raw, tmp_path):
    class_folders(raw, {"test/t0.jpg": 80, "test/t1.jpg": 81})
    recipe = Recipe(splits=("train", "val", "test"), partial=True)
    out = part_of(str(raw), tmp_path / "unlabelled", recipe)
    findings = verify(out, full=True, raw=str(raw))
    assert told(findings) == [] and "14 images decoded" in findings.checked


def test_a_shard_is_read_in_chunks_and_once(out, monkeypatch):
    reads: list[int] = []
    read = storage.read

    def counted(uri: str, *place: int) -> bytes:
        data = read(uri, *place)
        if uri.endswith(".tar"):
            reads.append(len(data))
        return data

    monkeypatch.setattr(storage, "read", counted)
    assert told(verify(out)) == [] and reads == []
    monkeypatch.setattr(module, "_CHUNK", 3000)  # less than an image: members span chunks
    assert told(verify(out, full=True)) == []
    assert max(reads) == 3000
    assert sum(reads) == sum(path.stat().st_size for path in Path(out).glob("*.tar"))


def test_progress_is_told_while_shards_are_read(out, monkeypatch):
    lines: list[str] = []
    read = storage.read

    def slow(uri: str, *place: int) -> bytes:
        if uri.endswith(".tar"):
            wait_until(lambda: lines)
        return read(uri, *place)

    monkeypatch.setattr(storage, "read", slow)
    monkeypatch.setattr(module, "_SAY_EVERY", 0.0)
    assert told(verify(out, full=True, say=lines.append)) == []
    assert lines[0] == "verified 0 of 3 files, 0 of 0 MB, 0.0 MB/s, ETA ?"
    line = r"verified \d of 3 files, 0 of 0 MB, [\d.,]+ MB/s, ETA (\?|\d:\d\d:\d\d)"
    assert all(re.fullmatch(line, said) for said in lines)


def test_a_store_that_fails_stops_every_thread_and_is_told(out, monkeypatch):
    read = storage.read

    def forbidden(uri: str, *place: int) -> bytes:
        if uri.endswith("train-000001.tar"):  # root may read every local file
            raise UserError(f"{uri}: Permission denied")
        return read(uri, *place)

    monkeypatch.setattr(storage, "read", forbidden)
    with pytest.raises(UserError, match=r"train-000001\.tar: Permission denied"):
        verify(out, full=True)


def test_a_set_whose_manifest_is_damaged_is_still_hashed(out):
    Path(out, "manifest.json").write_text('{"format": "alexnet-shards", "format_version": 1}')
    path = Path(out, "val-000000.tar")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert verify(out).bad_files == ("manifest.json",)
    assert verify(out, full=True).bad_files == ("manifest.json", "val-000000.tar")
    shutil.rmtree(Path(out, "index"))
    assert "index/val.parquet" in verify(out).bad_files
