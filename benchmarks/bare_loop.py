"""The loop that everybody writes, without Ray, MLflow, data, augmentation or log: what a training
step costs at least.

    python -m benchmarks.bare_loop '{"batch": …, "steps": …, "classes": …, "threads": …, …}'

Network, initialisation, batch, precision, memory format and optimizer are those of the recipe
`baseline`; the batch is one tensor that is there from the beginning.
"""

import json
import statistics
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F

from alexnet.model import AlexNet
from training.meter import training_flops


def train(request: dict[str, Any]) -> dict[str, float]:
    """seconds: the mean of a step, after two that warm up."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    model = AlexNet("ungrouped", num_classes=request["classes"], width=request["width"], init="he")
    with torch.device("meta"):
        shapes = AlexNet("ungrouped", num_classes=request["classes"], width=request["width"])
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True
    )
    x = torch.randn(request["batch"], 3, 227, 227).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(request["classes"], (request["batch"],))
    seconds = []
    for _ in range(request["steps"] + 2):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.fmean(seconds[2:]), "gflop": training_flops(shapes) / 1e9}


if __name__ == "__main__":
    print(json.dumps(train(json.loads(sys.argv[1]))))
