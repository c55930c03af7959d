"""Batch normalisation whose statistics are of groups of fixed size ("ghost" batches).

With plain batch normalisation, what is learned depends on how many images a worker sees at once,
so on the number of workers. Source of the idea: Hoffer, Hubara and Soudry 2017, arXiv 1705.08741.
"""

import torch
from torch import Tensor, nn


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """x: (B, C, H, W) → the same, normalised in training by each group of `group` images in a row.

    The last group also takes what is left over, so it has between `group` and 2·group - 1 images; a
    batch of fewer is one group. The running statistics move once per batch, towards the mean of
    its groups' means and variances. They are thus linear in the groups: averaging the buffers of
    ranks with equally many groups gives what one process that saw all of the groups has.

    In evaluation, in an export and in its state dict it is a BatchNorm2d.
    """

    def __init__(self, channels: int, group: int) -> None:
        super().__init__(channels)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) < 2 * self.group:
            return super().forward(x)
        if torch.compiler.is_compiling():
            return self._fusible(x)
        count = len(x) // self.group
        sizes = [self.group] * (count - 1) + [len(x) - self.group * (count - 1)]
        # Rows are groups. With a momentum of 1, batch_norm leaves a group's own statistics there.
        means = torch.zeros(count, self.num_features, device=x.device)
        variances = torch.zeros_like(means)
        groups = [
            nn.functional.batch_norm(
                part, mean, variance, self.weight, self.bias, True, 1.0, self.eps
            )
            for part, mean, variance in zip(torch.split(x, sizes), means, variances, strict=True)
        ]
        self._move(means.mean(0), variances.mean(0))
        return torch.cat(groups)

    def _fusible(self, x: Tensor) -> Tensor:
        """The same in operations on all groups at once, which a compiler fuses; a kernel for each
        group would make its graph grow with the batch. Uncompiled it is several times slower."""
        edge = self.group * (len(x) // self.group - 1)
        parts = (torch.unflatten(x[:edge], 0, (-1, self.group)), x[edge:].unsqueeze(0))
        normalised, means, variances = [], [], []
        for part in parts:  # (groups, images, C, H, W)
            part32 = part.float()
            variance, mean = torch.var_mean(part32, (1, 3, 4), correction=0, keepdim=True)
            scale = self.weight[:, None, None] * torch.rsqrt(variance + self.eps)
            shifted = (part32 - mean) * scale + self.bias[:, None, None]
            normalised.append(shifted.to(x.dtype).flatten(0, 1))
            pixels = part[0, :, 0].numel()
            means.append(mean.flatten(1))
            variances.append(variance.flatten(1) * (pixels / (pixels - 1)))
        self._move(torch.cat(means).mean(0), torch.cat(variances).mean(0))
        return torch.cat(normalised)

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        running = (self.running_mean, self.running_var, self.num_batches_tracked)
        running_mean, running_var, batches = running
        assert running_mean is not None and running_var is not None and batches is not None
        assert self.momentum is not None
        running_mean.lerp_(mean, self.momentum)
        running_var.lerp_(variance, self.momentum)
        batches.add_(1)
