"""Garbage for every parser: read right, or refused in one line."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from drawn import A, B, C, encoded, image, jpeg, synsets, tar
from drawn_layouts import HEADER, hugging_face
from forged import absurd, ycck
from hypothesis import strategies as st
from mutations import mutated, mutated_json


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
METAS = [
    b"MATLAB 5.0 MAT-file without a date".ljust(116) + made[116:]
    for made in (synsets([C, A, B], 2, "ILSVRC2012_ID"), synsets([A], 1, "ILSVRC2012_ID"))
]
TRUTH = ("data/ILSVRC2012_validation_ground_truth.txt", b"3\n1\n2\n")
KIT = tar([("data/meta.mat", METAS[0]), TRUTH])
VAL = [f"ILSVRC2012_val_{n:08d}" for n in (1, 2, 3)]
SOLUTION = f"{HEADER}{VAL[2]},{A} 1 2 3 4 \n{VAL[0]},{C} 1 2 3 4 {C} 5 6 7 8 \n{VAL[1]},{B} 1 2 3 4"


def images() -> list[bytes]:
    small = image(24, 40)
    animated = {"save_all": True, "append_images": [image(24, 40, seed=2)]}
    few, grey = small.quantize(16), small.convert("L")
    return [
        *(jpeg(1), encoded(small, progressive=True), encoded(grey), ycck(small)),
        *(encoded(small.convert("CMYK")), encoded(small, "MPO", **animated)),
        *(encoded(small, subsampling=n, quality=80) for n in (0, 1, 2)),
        *(encoded(small, restart_marker_blocks=2), gzip.compress(jpeg(2), mtime=0)),
        *(encoded(form, "PNG") for form in (small, few, small.convert("RGBA"), small.convert("1"))),
        *(encoded(few, "GIF"), encoded(few, "GIF", **animated)),
        *(encoded(small, "WEBP", **how) for how in ({}, {"lossless": True}, animated)),
        *(encoded(small, "BMP"), encoded(few, "BMP")),
        *absurd().values(),
    ]


RAW = {
    "tar": TARS,
    "tar_summed": TARS,
    "tar_nested": [tar([(f"{w}.tar", tar([(f"{w}_1.JPEG", b"x" * 9)])) for w in (A, B)])],
    "webdataset_tar": [
        tar([(f"{w}_1.{k}", data) for w in (A, B) for k, data in (("jpg", b"x"), ("cls", b"0"))]),
        tar([("d/a.png", b"x" * 600), ("d/a.json", b'{"label": 0, "filename": "x.png"}')]),
        tar(
            [(f"{key}.{k}", b"01"[n : n + 1]) for n, key in enumerate("ab") for k in ("jpg", "cls")]
        ),
    ],
    "devkit_packed": [gzip.compress(KIT, mtime=0)],
    "devkit_tar": [KIT],
    "devkit_meta": METAS,
    "devkit_truth": [b"3\n1\n2\n"],
    "kaggle_solution": [SOLUTION.encode()],
    "kept_image": [encoded(image(227, 227, seed=n), subsampling=n) for n in (0, 2)],
}


@pytest.mark.parametrize("target", RAW)
def test_raw_files_are_read_right_or_refused_in_one_line(attack, target: str) -> None:
    attack(target, mutated(RAW[target]))


def test_images_become_the_pixels_that_pillow_decodes_or_are_rejected(attack) -> None:
    attack("image", st.one_of(mutated(images()), st.binary(max_size=200)))


def test_parquet_files_are_read_right_or_refused_in_one_line(attack, tmp_path: Path) -> None:
    hugging_face(tmp_path)
    file = tmp_path / "data" / "train-00001-of-00002.parquet"
    attack("parquet", mutated([file.read_bytes()]))


KEPT = {
    "sample_index": "set/index/train.parquet",
    "sidecar": "set/_meta/train-000000.parquet",
    "plan_rows": "set/_meta/plan.parquet",
    "manifest": "set/manifest.json",
    "plan_json": "set/_meta/plan.json",
    "checkpoint_tensors": "checkpoint/model.safetensors",
    "checkpoint_hashes": "checkpoint/hashes.json",
    "checkpoint_state": "checkpoint/state.json",
    "registered_json": "model/artifacts/alexnet.json",
}


@pytest.mark.parametrize("target", KEPT)
def test_kept_files_are_those_written_or_well_formed_or_refused(attack, good, target: str) -> None:
    data = (good / KEPT[target]).read_bytes()
    is_json = KEPT[target].endswith(".json")
    attack(target, mutated_json(json.loads(data)) if is_json else mutated([data]))
