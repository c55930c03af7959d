"""pipelines/verify.py: every damage of a finished set is found and named, and what RAW tells of it
now."""

import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from drawn import A, archives, class_folders, jpeg, tar
from drawn_layouts import hugging_face
from labelled_tars import timm
from made import part_of

from alexnet.errors import UserError
from pipelines import entries, recount, shards, sources, storage, strict_read
from pipelines import verify as module
from pipelines.plan import Recipe
from pipelines.sources.ilsvrc import TRAIN_TAR
from pipelines.verify import Findings, verify

REJECTED = "quarantine/train/n09104412_19.bin"


def told(found: Findings) -> list[str]:
    return [f"{problem.file}: {problem.text}" for problem in found.problems]


def test_an_untouched_set_has_no_problems(drawn_shards, drawn_raw):
    assert told(verify(drawn_shards)) == []
    for raw in (None, drawn_raw):
        findings = verify(drawn_shards, full=True, raw=raw)
        assert told(findings) == [] and findings.notes == () and findings.bad_files == ()
        assert "43 images decoded" in findings.checked


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def spoil(path: Path) -> None:
    path.write_bytes(b"\0\xff{")


SMALL = ["manifest.json", "index/val.parquet", "shardindex-val.json", "quarantine/train.jsonl"]


@pytest.mark.parametrize("damage", [flip_byte, cut, spoil, Path.unlink])
@pytest.mark.parametrize("name", [*SMALL, "train-000001.idx"])
def test_damage_of_a_small_file_is_found_without_reading_shards(copy, name, damage):
    damage(copy / name)
    if (name, damage) == ("manifest.json", Path.unlink):
        with pytest.raises(UserError, match="no finished shard set"):
            verify(str(copy))
    else:
        assert verify(str(copy)).bad_files == (name,)


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        ("train-000002.tar", cut, r"its [\d,]+ bytes should be [\d,]+"),
        ("val-000001.tar", Path.unlink, "missing"),
        (REJECTED, Path.unlink, "missing"),
        (REJECTED, cut, r"its [\d,]+ bytes should be [\d,]+"),
        ("_meta/val-000000.parquet", Path.unlink, "missing"),
        ("_meta/val-000000.parquet", spoil, r"damaged \(.*\)"),
        ("_meta/plan.json", spoil, r"damaged \(.*\)"),
        ("SHA256SUMS", Path.unlink, "missing"),
    ],
)
def test_damage_of_other_files_is_found_and_named(copy, name, damage, text):
    damage(copy / name)
    for full in (False, True):
        (line,) = told(verify(str(copy), full=full))
        assert re.fullmatch(f"{name}: {text}", line)


@pytest.mark.parametrize("name", ["train-000002.tar", REJECTED])
def test_only_full_reads_what_is_large(copy, name):
    flip_byte(copy / name)
    assert told(verify(str(copy))) == []
    findings = verify(str(copy), full=True)
    assert findings.bad_files == (name,)
    assert "another sha256" in findings.problems[0].text


def test_a_file_that_nobody_lists_is_told_and_no_fault(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "report").mkdir()
    (copy / "report" / "index.html").write_text("made later")
    findings = verify(str(copy))
    assert told(findings) == []
    assert findings.notes == ("1 files that SHA256SUMS does not list: notes.txt",)


def test_random_damage_never_raises_and_is_found_in_every_listed_file(copy):
    rng = random.Random(5)
    (copy / "README.md").unlink()  # for people to change
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    for _ in range(60):
        path = rng.choice(files)
        data = path.read_bytes()
        damaged = bytearray(data or b"\0")
        for _ in range(rng.choice((1, 1, 4, 20))):
            place = rng.randrange(len(damaged) + 1)
            damaged[place : place + rng.randrange(30)] = rng.randbytes(rng.randrange(30))
        path.write_bytes(damaged)
        try:
            full = path.suffix in (".tar", ".bin") or path.name.startswith("plan")
            findings = verify(str(copy), full=full)
            assert findings.problems or "_meta" in path.parts or damaged == data, path
            assert all(problem.text.isprintable() for problem in findings.problems)
        except UserError as error:  # such as another format version
            assert path.name == "manifest.json" and "\n" not in str(error)
        path.write_bytes(data)


@pytest.mark.parametrize("names", [[], ["a", "a", "b"], ["b", "a", "b", "c", "a"]])
def test_rows_by_shard_are_those_that_a_look_for_each_shard_finds(names):
    table = pa.table({"shard": pa.array(names, pa.string()), "row": list(range(len(names)))})
    found = module._by_shard(table)
    assert found.keys() == set(names)
    assert all(rows == table.filter(pc.equal(table["shard"], name)) for name, rows in found.items())


# With RAW, and how it reads

# No WNIDs: nothing but the folder says what the class is. Every image is another one.
TRAIN = {f"train/{c}/{c}{i}.jpg": 10 * k + i for k, c in enumerate("ab") for i in range(4)}
VAL = {f"val/{c}/v{c}{i}.jpg": 50 + 10 * k + i for k, c in enumerate("ab") for i in range(2)}


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


def test_held_out_images_are_compared_with_the_same_ones_of_raw(tmp_path):
    raw = class_folders(
        tmp_path / "raw", {f"{c}/{n}.jpg": ord(c) + n for c in "ab" for n in range(5)}
    )
    out = part_of(raw, tmp_path / "held", Recipe(val_share=0.4))
    assert shards.load_manifest(out).document["totals"]["val"]["samples"] == 4
    findings = verify(out, full=True, raw=raw)
    assert told(findings) == [] and "10 images decoded" in findings.checked
    Path(raw, "c").mkdir()
    Path(raw, "a", "odd.jfif").write_bytes(jpeg(99))
    assert any("odd" in line for line in told(verify(out, full=True, raw=raw)))


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
    monkeypatch.setattr(strict_read, "_CHUNK", 3000)  # less than an image: members span chunks
    assert told(verify(out, full=True)) == []
    assert max(reads) == 3000
    assert sum(reads) == sum(path.stat().st_size for path in Path(out).glob("*.tar"))


def test_progress_is_told_while_shards_are_read(out, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(module, "_SAY_EVERY", 0.0)
    assert told(verify(out, full=True, say=lines.append)) == []
    line = r"verified {} of 3 files, 0 of 0 MB, [\d.,]+ MB/s, ETA (\?|\d:\d\d:\d\d)"
    for number, said in enumerate(lines, 1):
        assert re.fullmatch(line.format(number), said)
    assert len(lines) == 2


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
