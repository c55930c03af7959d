"""mosaicml-streaming: MDS shards of JPEG bytes, StreamingDataset, DataLoader."""

import importlib.machinery
import sys
import types

import clock
import tars


def prepare(request):
    without_torchvision()
    from streaming import MDSWriter

    columns = {"jpg": "bytes", "label": "int"}
    with MDSWriter(out=f"{request['work']}/mds", columns=columns) as writer:
        for jpeg, label in tars.samples(request["tars"]):
            writer.write({"jpg": jpeg, "label": label})


def without_torchvision():
    """streaming imports two names of torchvision that it does not need here, and the published
    torchvision cannot be imported beside a torch for CPUs: empty modules stand in for it."""
    names = ("", ".datasets", ".transforms", ".transforms.functional")
    for name in (f"torchvision{rest}" for rest in names):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})
    sys.modules["torchvision.transforms.functional"].to_tensor = None


def batches(request):
    without_torchvision()
    import torch
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)

    class Images(StreamingDataset):
        def __getitem__(self, at):
            sample = super().__getitem__(at)
            return tars.image(sample["jpg"], request["decoder"]), sample["label"]

    dataset = Images(local=f"{request['work']}/mds", shuffle=True, batch_size=request["batch"])
    loader = DataLoader(
        dataset,
        batch_size=request["batch"],
        num_workers=request["threads"],
        collate_fn=tars.batched,
        persistent_workers=True,
    )
    for _ in range(request.get("epochs", 1)):
        yield from loader


if __name__ == "__main__":
    clock.main(batches, prepare)
