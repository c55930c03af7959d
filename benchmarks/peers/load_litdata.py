"""litdata: chunks of JPEG bytes, StreamingDataset, StreamingDataLoader."""

import clock
import tars


def prepare(request):
    import litdata

    litdata.optimize(
        fn=packed,
        inputs=request["tars"],
        output_dir=f"{request['work']}/chunks",
        chunk_bytes="64MB",
        num_workers=1,
    )


def packed(path):
    for jpeg, label in tars.samples([path]):
        yield {"jpg": jpeg, "label": label}


def batches(request):
    import torch
    from litdata import StreamingDataLoader, StreamingDataset

    torch.set_num_threads(1)

    class Images(StreamingDataset):
        def __getitem__(self, at):
            sample = super().__getitem__(at)
            return tars.image(sample["jpg"], request["decoder"]), sample["label"]

    dataset = Images(f"{request['work']}/chunks", shuffle=True, drop_last=False)
    loader = StreamingDataLoader(
        dataset,
        batch_size=request["batch"],
        num_workers=request["threads"],
        drop_last=False,
        collate_fn=tars.batched,
        persistent_workers=True,
    )
    for _ in range(request.get("epochs", 1)):
        yield from loader


if __name__ == "__main__":
    clock.main(batches, prepare)
