"""NVIDIA DALI's pipeline for CPUs: its WebDataset reader, decoder and flip, uint8 batches."""

import clock


def batches(request):
    import numpy as np
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(
        batch_size=request["batch"], num_threads=request["threads"], device_id=None, seed=0
    )
    def pipeline():
        jpegs, labels = fn.readers.webdataset(
            paths=request["tars"],
            index_paths=[path.removesuffix(".tar") + ".idx" for path in request["tars"]],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=500,
            name="shards",
        )
        images = fn.decoders.image(jpegs, device="cpu", output_type=types.RGB)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    built = pipeline()
    built.build()
    samples = built.epoch_size("shards")
    assert samples % request["batch"] == 0, "DALI would fill the last batch of an epoch up"
    for _ in range(request.get("epochs", 1) * samples // request["batch"]):
        images, labels = built.run()
        # The batch as it lies in memory: as_array() would copy it.
        yield np.asarray(images.as_tensor()), [int(bytes(label)) for label in labels]


if __name__ == "__main__":
    clock.main(batches)
