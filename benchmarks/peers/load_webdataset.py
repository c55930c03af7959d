"""webdataset as its README shows it: shuffle, decode with Pillow, DataLoader with workers."""

import random

import clock


def batches(request):
    import torch
    import webdataset

    torch.set_num_threads(1)
    urls = request["tars"]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(500)
    pairs = dataset.decode("pil").to_tuple("jpg", "cls").map_tuple(mirrored, int)
    batched = pairs.batched(request["batch"])
    return webdataset.WebLoader(batched, batch_size=None, num_workers=request["threads"])


def mirrored(image):
    import numpy as np
    import torch

    pixels = np.asarray(image.convert("RGB"))
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


if __name__ == "__main__":
    clock.main(batches)
