"""Garbage for what a raw set holds: archives, devkits, lists, parquet files, images, names."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from drawn import A, B, C, archives, encoded, image, jpeg, synsets, tar
from drawn_layouts import HEADER, hugging_face
from forged import absurd, ycck
from hypothesis import strategies as st
from mutations import mutated

VAL = [f"ILSVRC2012_val_{n:08d}" for n in (1, 2, 3)]


def packed(form: int) -> bytes:
    """Folders, long names and a pax record beside plain members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, kind, size in (
            ("folder", tarfile.DIRTYPE, 0),
            ("folder/n00000010_1.JPEG", tarfile.REGTYPE, 700),
            ("long/" * 30 + "ü.JPEG", tarfile.REGTYPE, 512),
            ("last.JPEG", tarfile.REGTYPE, 3),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mtime = kind, size, 1.5
            archive.addfile(info, io.BytesIO(b"x" * size))
    return buffer.getvalue()


TARS = [packed(form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
TARS += [tar([("a.JPEG", b"1"), ("b.JPEG", b"2" * 600)])]
NESTED = [tar([(f"{w}.tar", tar([(f"{w}_1.JPEG", b"x" * 9)])) for w in (A, B)])]
WEBDATASETS = [
    tar([(f"{A}_1.jpg", b"x"), (f"{A}_1.cls", b"0"), (f"{B}_1.jpg", b"x"), (f"{B}_1.cls", b"1")]),
    tar([("d/a.png", b"x" * 600), ("d/a.json", b'{"label": 0, "filename": "x.png"}')]),
    tar([("a.jpg", b"x"), ("a.cls", b"0"), ("b.jpg", b"x"), ("b.cls", b"1"), ("b.txt", b"x")]),
]
METAS = [
    b"MATLAB 5.0 MAT-file without a date".ljust(116) + made[116:]
    for made in (synsets([C, A, B], 2, "ILSVRC2012_ID"), synsets([A], 1, "ILSVRC2012_ID"))
]
TRUTH = ("data/ILSVRC2012_validation_ground_truth.txt", b"3\n1\n2\n")
KIT = tar([("data/meta.mat", METAS[0]), TRUTH])
SOLUTION = f"{HEADER}{VAL[2]},{A} 1 2 3 4 \n{VAL[0]},{C} 1 2 3 4 {C} 5 6 7 8 \n{VAL[1]},{B} 1 2 3 4"
MAPPING = f"{A} tench, Tinca tinca\n{B} jacamar\n{C} yurt\n".encode()
LIST = "".join(f"{key} {number}\n" for number, key in enumerate(VAL, start=1)).encode()
NAMES = [f"train/{w}/{w}_{n}.JPEG" for w in (A, B) for n in (1, 2)]
NAMES += [f"val/{A}/ILSVRC2012_val_00000001.JPEG", f"val/{B}/x.png"]


def images() -> list[bytes]:
    small = image(24, 40)
    animated = {"save_all": True, "append_images": [image(24, 40, seed=2)]}
    return [
        *(jpeg(1), encoded(small, progressive=True), encoded(small.convert("L"))),
        *(encoded(small.convert("CMYK")), ycck(small), encoded(small, "MPO", **animated)),
        *(encoded(small, subsampling=n, quality=80) for n in (0, 1, 2)),
        *(encoded(small, restart_marker_blocks=2), encoded(small, "PNG")),
        *(encoded(small.quantize(16), "PNG"), encoded(small.convert("RGBA"), "PNG")),
        *(encoded(small.quantize(16), "GIF"), encoded(small.quantize(16), "GIF", **animated)),
        *(encoded(small, "WEBP"), encoded(small, "WEBP", lossless=True)),
        *(
            encoded(small, "WEBP", **animated),
            encoded(small, "BMP"),
            gzip.compress(jpeg(2), mtime=0),
        ),
        *(encoded(small.quantize(16), "BMP"), encoded(small.convert("1"), "PNG")),
        *absurd().values(),
    ]


def parquets(folder: Path) -> list[bytes]:
    hugging_face(folder)
    return [(folder / "data" / "train-00001-of-00002.parquet").read_bytes()]


SEEDS = {
    "tar": TARS,
    "tar_summed": TARS,
    "tar_nested": NESTED,
    "webdataset_tar": WEBDATASETS,
    "devkit_packed": [gzip.compress(KIT, mtime=0)],
    "devkit_tar": [KIT],
    "devkit_meta": METAS,
    "devkit_truth": [b"3\n1\n2\n"],
    "kaggle_solution": [SOLUTION.encode()],
    "kaggle_mapping": [MAPPING],
    "kaggle_list": [LIST],
    "folders": ["\n".join(NAMES).encode()],
}


@pytest.mark.parametrize("target", SEEDS)
def test_archives_and_lists_are_read_right_or_refused_in_one_line(attack, target) -> None:
    attack(target, mutated(SEEDS[target]))


def test_parquet_files_are_read_right_or_refused_in_one_line(attack, tmp_path) -> None:
    attack("parquet", mutated(parquets(tmp_path)))


def test_damaged_index_of_an_archive_is_made_anew(attack, tmp_path, monkeypatch) -> None:
    from pipelines.sources import index

    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "home"))
    index.nested(str(archives(tmp_path / "raw") / "ILSVRC2012_img_train.tar"))
    (kept,) = (tmp_path / "home" / "index").iterdir()
    attack("kept_index", mutated([kept.read_bytes()]))


def test_images_become_the_pixels_that_pillow_decodes_or_are_rejected(attack) -> None:
    attack("image", st.one_of(mutated(images()), st.binary(max_size=200)))


def test_stored_images_are_kept_as_they_are_or_rejected(attack) -> None:
    sides = [encoded(image(227, 227, seed=n), subsampling=n) for n in (0, 2)]
    attack("kept_image", mutated(sides))
