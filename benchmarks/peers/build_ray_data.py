"""Ray Data as its documentation shows it: read_images, map a Pillow function, write_webdataset; but
with as many blocks as tars are wanted, where it would make 200 of any number of images.

With {"images": false} nothing but Ray's own start: a map over one empty row.
"""

import io
import json
import sys
from pathlib import Path

import ray
import ray.data
from PIL import Image


def stored(row, side, quality):
    image = Image.fromarray(row["image"])
    short = min(image.size)
    wide, high = ((2 * length * side + short) // (2 * short) for length in image.size)
    image = image.resize((wide, high), Image.Resampling.LANCZOS)
    left, top = (wide - side) // 2, (high - side) // 2
    buffer = io.BytesIO()
    image.crop((left, top, left + side, top + side)).save(buffer, "JPEG", quality=quality)
    path = Path(row["path"])
    return {"__key__": path.stem, "jpg": buffer.getvalue(), "cls": path.parent.name.encode()}


def main():
    request = json.loads(sys.argv[1])
    ray.init("local", num_cpus=request["processes"], include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not request["images"]:
        ray.data.range(1).map(lambda row: row).materialize()
        print(json.dumps({"images": 0}))
        return
    images = ray.data.read_images(
        f"{request['raw']}/train",
        file_extensions=["JPEG"],
        include_paths=True,
        mode="RGB",
        override_num_blocks=request["shards"],
    )
    arguments = {"side": request["side"], "quality": request["quality"]}
    # encoder=None: the default one would encode what is encoded already once more.
    images.map(stored, fn_kwargs=arguments).write_webdataset(request["out"], encoder=None)
    print(json.dumps({"images": images.count()}))


main()
