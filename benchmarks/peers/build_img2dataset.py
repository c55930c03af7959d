"""img2dataset, as its manual shows it: a list of URLs to WebDataset tars, centre crop, JPEG."""

import json
import sys
from pathlib import Path

from img2dataset import download


def main():
    request = json.loads(sys.argv[1])
    out = Path(request["out"])
    out.mkdir(parents=True)
    urls = out / "urls.txt"
    files = sorted(Path(request["raw"]).glob("train/*/*"))
    urls.write_text("".join(f"file://{path}\n" for path in files))
    download(
        url_list=str(urls),
        input_format="txt",
        output_format="webdataset",
        output_folder=str(out / "tars"),
        image_size=request["side"],
        resize_mode="center_crop",
        encode_quality=request["quality"],
        processes_count=request["processes"],
        thread_count=8,
        number_sample_per_shard=request["per_shard"],
        compute_hash="sha256" if request["sums"] else None,
        enable_wandb=False,
    )
    print(json.dumps({"images": len(files)}))


if __name__ == "__main__":  # img2dataset spawns its processes, which import this file
    main()
