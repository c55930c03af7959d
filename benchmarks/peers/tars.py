"""The samples of shards, one after another, for peers that bring a format of their own."""

import tarfile


def samples(paths):
    """(JPEG bytes, label) of each."""
    for path in paths:
        with tarfile.open(path) as tar:
            label = -1
            for member in tar:
                if member.name.endswith(".cls"):  # stands before the image
                    label = int(tar.extractfile(member).read())
                elif member.name.endswith(".jpg"):
                    yield tar.extractfile(member).read(), label


def image(jpeg, decoder):
    """uint8 (H, W, 3) of NumPy; decoder: "Pillow" or "simplejpeg"."""
    if decoder == "simplejpeg":
        import simplejpeg

        return simplejpeg.decode_jpeg(jpeg, "RGB")
    import io

    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def batched(samples):
    """Of (image, label): uint8 (B, 3, H, W) in channels-last memory, mirrored, and labels."""
    import numpy as np
    import torch

    images = torch.from_numpy(np.stack([image for image, _ in samples])).permute(0, 3, 1, 2)
    mirror(images)
    return images, torch.tensor([label for _, label in samples])


def mirror(images):
    """Each with probability 1/2, in place: one after another, since torch's flip is vectorised and
    its indexing by rows is not."""
    import torch

    for row in (torch.rand(len(images)) < 0.5).nonzero()[:, 0].tolist():
        image = images[row : row + 1]
        image.copy_(image.flip(-1))
