"""The builder's codecs and nothing else, in one pinned process for each CPU.

The calls are those of the libraries chosen: simplejpeg's decoder, torch's resize, Pillow's encoder,
`tarfile`; without a check or a label. With "sums" they also make what a set promises: SHA-256 of
source, JPEG and tar, MD5 of the tar, exact sums over the pixels.

    python -m benchmarks.parts '{"raw": …, "out": …, "side": …, "quality": …, "per_shard": …,
                                 "processes": …, "sums": …}'
"""

import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image

from alexnet.preprocess import resize_and_crop
from pipelines.write_shard import PixelSums


def pack(
    files: Iterable[Path],
    out: Path,
    *,
    resize: int,
    crop: int,
    quality: int,
    colours: Literal["RGB", "RGBX"] = "RGBX",
    sums: bool = False,
) -> None:
    """Stored images of `files` in one tar, on one thread. colours: how pixels lie on their way;
    RGBX, with an idle fourth byte, is Pillow's own layout and saves unpacking and packing."""
    torch.set_num_threads(1)
    pixel_sums = PixelSums()
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in files:
            raw = path.read_bytes()
            decoded = simplejpeg.decode_jpeg(raw, colorspace=colours)
            pixels = torch.from_numpy(decoded).permute(2, 0, 1)
            small = resize_and_crop(pixels, resize, crop).permute(1, 2, 0).contiguous().numpy()
            image = Image.frombuffer(colours, (crop, crop), small, "raw", colours, 0, 1)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
            member = tarfile.TarInfo(f"{path.stem}.jpg")
            if sums:
                hashlib.sha256(raw), hashlib.sha256(buffer.getbuffer())
                pixel_sums.add(np.ascontiguousarray(small[:, :, :3].transpose(2, 0, 1)))
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    if sums:
        whole = out.read_bytes()
        hashlib.sha256(whole), hashlib.md5(whole, usedforsecurity=False)


def _share(request: dict[str, object], number: int, cpu: int, processes: int) -> None:
    os.sched_setaffinity(0, [cpu])
    files = sorted(Path(str(request["raw"])).glob("train/*/*"))[number::processes]
    side, quality = int(str(request["side"])), int(str(request["quality"]))
    many = int(str(request["per_shard"]))
    for first in range(0, len(files), many):
        out = Path(str(request["out"])) / f"parts-{number:03d}-{first:06d}.tar"
        sums, chosen = bool(request.get("sums")), files[first : first + many]
        pack(chosen, out, resize=side, crop=side, quality=quality, sums=sums)


def main() -> None:
    request = json.loads(sys.argv[1])
    Path(request["out"]).mkdir(parents=True)
    usable = sorted(os.sched_getaffinity(0))[: request["processes"]]
    work = [(request, number, cpu, len(usable)) for number, cpu in enumerate(usable)]
    with get_context("fork").Pool(len(usable)) as pool:
        pool.starmap(_share, work, chunksize=1)
    print(json.dumps({"processes": len(usable)}))


if __name__ == "__main__":
    main()
