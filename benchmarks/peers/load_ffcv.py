"""FFCV: its own file with JPEGs, mirrored at random, or raw pixels, as they are; its compiled
pipeline, uint8 batches. For that file each JPEG is encoded once more, at the shards' quality."""

import itertools

import clock
import tars


def prepare(request):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {
        "image": RGBImageField(
            write_mode="raw" if request["decoder"].startswith("none") else "jpg",
            jpeg_quality=request["quality"],
        ),
        "label": IntField(),
    }
    writer = DatasetWriter(f"{request['work']}/images.beton", fields, num_workers=1)
    writer.from_indexed_dataset(Images(list(tars.samples(request["tars"]))))


class Images:
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, at):
        import io

        from PIL import Image

        jpeg, label = self.samples[at]
        return Image.open(io.BytesIO(jpeg)).convert("RGB"), label


def batches(request):
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    mirrored = [] if request["decoder"].startswith("none") else [RandomHorizontalFlip()]
    image = [
        SimpleRGBImageDecoder(),
        *mirrored,
        ToTensor(),
        ToTorchImage(convert_back_int16=False),
    ]
    loader = Loader(
        f"{request['work']}/images.beton",
        batch_size=request["batch"],
        num_workers=request["threads"],
        order=OrderOption.QUASI_RANDOM,
        os_cache=True,
        drop_last=False,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )
    return itertools.chain.from_iterable(itertools.repeat(loader, request.get("epochs", 1)))


if __name__ == "__main__":
    clock.main(batches, prepare)
