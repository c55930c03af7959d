"""What the log lines say of the last steps: loss, accuracy, rate, time spent waiting for data."""

import time

import torch


class Meter:
    """Sums since the last reading; on the device, so that a step does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.start()

    def start(self) -> None:
        self._sums.zero_()
        self.steps, self._wait_seconds = 0, 0.0
        self._started = self._mark = time.perf_counter()

    def data_arrived(self) -> None:
        self._wait_seconds += time.perf_counter() - self._mark

    def add(self, loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        correct = (logits.argmax(dim=1) == labels).sum()
        count = torch.tensor(len(labels), device=correct.device)
        self._sums += torch.stack([loss_sum.double(), correct.double(), count.double()])
        self.steps += 1
        self._mark = time.perf_counter()

    def read(self, world_size: int) -> dict[str, float]:
        """Means over all ranks since the last reading, and the rate of the whole group."""
        if world_size > 1:
            torch.distributed.all_reduce(self._sums)
        loss_sum, correct, images = self._sums.tolist()  # waits for the device
        seconds = time.perf_counter() - self._started
        metrics = {
            "loss": loss_sum / images,
            "top1": correct / images,
            "images_per_second": images / seconds,
            "data_wait": self._wait_seconds / seconds,
            "seconds": seconds,
            "steps": float(self.steps),
        }
        self.start()
        return metrics


def log_line(metrics: dict[str, float], step: int) -> str:
    """One line for people and grep: `step=1200 epoch=3.2 loss=5.31 …`."""
    if "val_top1" in metrics:
        return (
            f"step={step} epoch={metrics['epoch']:.0f} val_images={metrics['val_images']:.0f} "
            f"val_loss={metrics['val_loss']:.4f} val_top1={metrics['val_top1']:.4f} "
            f"val_top5={metrics['val_top5']:.4f}"
        )
    minutes, seconds = divmod(round(metrics["eta_seconds"]), 60)
    return (
        f"step={step} epoch={metrics['epoch']:.2f} loss={metrics['loss']:.4f} "
        f"top1={metrics['top1']:.3f} lr={metrics['lr']:.5f} "
        f"img/s={metrics['images_per_second']:.0f} wait={metrics['data_wait']:.0%} "
        f"eta={minutes}:{seconds:02d}"
    )
