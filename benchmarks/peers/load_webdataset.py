"""webdataset: shuffle, decode, WebLoader with workers. By Pillow it decodes as its README shows."""

import clock
import tars


def batches(request):
    import torch
    import webdataset

    torch.set_num_threads(1)
    urls, decoder = request["tars"], request["decoder"]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(500)
    if decoder == "Pillow":
        pairs = dataset.decode("pil").to_tuple("jpg", "cls").map_tuple(pixels, int)
    else:
        pairs = dataset.to_tuple("jpg", "cls").map_tuple(lambda j: tars.image(j, decoder), int)
    loader = webdataset.WebLoader(
        pairs.batched(request["batch"], collation_fn=tars.batched),
        batch_size=None,
        num_workers=request["threads"],
        persistent_workers=True,
    )
    for _ in range(request.get("epochs", 1)):
        yield from loader


def pixels(image):
    import numpy as np

    return np.asarray(image.convert("RGB"))


if __name__ == "__main__":
    clock.main(batches)
