"""AlexNet as the slides draw it, and as Krizhevsky, Sutskever and Hinton (2012) describe it.

Feature maps for a 227×227×3 input, the same in both variants (rows × columns × channels):

    layer                          output        ungrouped    paper
    input                          227×227×3
    conv1  96 @ 11×11 stride 4     55×55×96
    relu1, lrn1                    55×55×96      no LRN       LRN
    pool1  3×3 stride 2            27×27×96
    conv2  256 @ 5×5 pad 2         27×27×256     ungrouped    2 groups
    relu2, lrn2                    27×27×256     no LRN       LRN
    pool2  3×3 stride 2            13×13×256
    conv3  384 @ 3×3 pad 1         13×13×384     ungrouped    ungrouped
    conv4  384 @ 3×3 pad 1         13×13×384     ungrouped    2 groups
    conv5  256 @ 3×3 pad 1         13×13×256     ungrouped    2 groups
    pool5  3×3 stride 2            6×6×256
    dropout6                       6×6×256       dropout      -
    fc6, relu6                     4096
    dropout6, dropout7             4096          dropout7     dropout6
    fc7, relu7                     4096
    dropout7                       4096          -            dropout7
    fc8                            num_classes
    parameters, 1000 classes                     62,378,344   60,965,224

A ReLU follows every convolution, fc6 and fc7.

Dropout. `ungrouped` has the slides': on the inputs of fc6 and fc7, what is kept times 2 while
training. `paper` has that of section 4.2 and of the released source: on the outputs of fc6 and fc7,
nothing scaled while training, everything halved in evaluation. The two are not the same training:
with the same weights and rate, scaling by 2 doubles the signal behind each dropout.

Local response normalisation. PyTorch divides alpha by the window of 5 channels, and so does the
2012 source that made the published numbers; alpha is therefore 1e-4 here. The formula printed in
the paper has no such division: read literally, it would be alpha 5e-4 in PyTorch's terms. The
window ends at the edge of each half of the maps, as in the source, where each half is on a GPU of
its own. The paper applies it after the ReLU, and so does this file. The source puts it on the
linear output of conv1 (the ReLU comes after the pooling there), which is not the same function.

The paper says the input is 224×224, which does not give 55×55; 227×227 without padding does.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from alexnet import Init, Variant
from alexnet.errors import UserError

MIN_WIDTH, MAX_WIDTH = 1 / 32, 4.0
CONV_CHANNELS = (96, 256, 384, 384, 256)
HIDDEN_UNITS = 4096
POOLED_SIDE = 6

# Paper, section 5: "neuron biases in the second, fourth, and fifth convolutional layers, as well as
# in the fully-connected hidden layers, with the constant 1"; 0 elsewhere.
BIAS_ONE = frozenset({"conv2", "conv4", "conv5", "fc6", "fc7"})
# The released layer definition of the published net (layers-145) has 0.03 for these; the paper's
# text says 0.01 for every layer.
SOURCE_WIDER_STD = frozenset({"conv3", "conv4", "conv5"})


class AlexNet(nn.Module):
    """x: float32 (B, 3, 227, 227), normalised → logits float32 (B, num_classes).

    `width` multiplies the channels of every convolution and the units of fc6 and fc7; each is then
    rounded to an even number, so that two groups remain possible.

    `batch_norm` puts batch normalisation between each convolution and its ReLU. The convolution's
    bias goes, because the normalisation would subtract it again and has a shift of its own; nothing
    else changes. It is offered for `ungrouped` only: nobody uses LRN after batch normalisation.
    While training, groups of about `norm_group` images are normalised by themselves, however large
    the batch; with 0, all images of the batch together. Evaluation does not depend on it.

    `init` (None means "source"):
      text    section 5 of the paper: weights N(0, 0.01²), bias 1 in conv2, conv4, conv5, fc6, fc7
      source  the same, but std 0.03 in conv3, conv4, conv5, as the released 2012 source has it
      he      He et al. 2015, normal, for ReLU; all biases 0; fc8 N(0, 0.001²), so that the first
              loss is that of guessing, ln(num_classes), within a tenth
    The first two are the published numbers at any width: they were chosen for the full net, and a
    much narrower one hardly learns from them. Take "he" there.

    Raises UserError for a value outside these choices.
    """

    def __init__(
        self,
        variant: Variant = "ungrouped",
        num_classes: int = 1000,
        width: float = 1.0,
        batch_norm: bool = False,
        norm_group: int = 64,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        init = "source" if init is None else init
        _check(variant, num_classes, width, batch_norm, norm_group, init)
        channels = [_scaled(count, width) for count in CONV_CHANNELS]
        hidden = _scaled(HIDDEN_UNITS, width)
        self.features = _features(channels, variant == "paper", norm_group if batch_norm else None)
        self.classifier = _classifier(
            POOLED_SIDE**2 * channels[-1], hidden, num_classes, variant == "paper"
        )
        _initialise(self, init)

    @property
    def conv1(self) -> nn.Conv2d:
        """The first convolution; its weight is (96 × width, 3, 11, 11), the kernels people draw."""
        layer = self.features.conv1
        assert isinstance(layer, nn.Conv2d)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def _check(
    variant: str, num_classes: int, width: float, batch_norm: bool, norm_group: int, init: str
) -> None:
    for name, value, choices in (("variant", variant, Variant), ("init", init, Init)):
        if value not in (known := get_args(choices)):
            names = ", ".join(map(repr, known))
            raise UserError(f"{name} {value!r} is unknown; choose one of {names}")
    if type(num_classes) is not int or num_classes < 1:
        raise UserError(f"num_classes {num_classes!r} must be a whole number from 1 up")
    if not (math.isfinite(width) and MIN_WIDTH <= width <= MAX_WIDTH):
        raise UserError(f"width {width} must lie between {MIN_WIDTH} and {MAX_WIDTH:g}")
    if type(norm_group) is not int or norm_group < 0:
        raise UserError(
            f"norm_group {norm_group!r} must be a whole number of images; 0 takes the whole batch"
        )
    if batch_norm and variant == "paper":
        raise UserError(
            "batch_norm does not go with variant 'paper', which normalises by LRN; "
            "use variant 'ungrouped' or leave batch_norm off"
        )


def _scaled(count: int, width: float) -> int:
    return max(2, 2 * round(count * width / 2))


def _features(channels: list[int], paper: bool, norm_group: int | None) -> nn.Sequential:
    """(B, 3, 227, 227) → (B, channels[-1], 6, 6), modules named as in the table above; without
    batch normalisation for a `norm_group` of None."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    sizes = ((11, 4, 0, 1), (5, 1, 2, 2), (3, 1, 1, 1), (3, 1, 1, 2), (3, 1, 1, 2))
    before = 3
    for i, (after, (kernel, stride, padding, groups)) in enumerate(
        zip(channels, sizes, strict=True), start=1
    ):
        layers[f"conv{i}"] = (Conv1 if i == 1 else nn.Conv2d)(
            before, after, kernel, stride, padding, 1, groups if paper else 1, norm_group is None
        )
        if norm_group is not None:
            layers[f"bn{i}"] = (
                GroupedBatchNorm2d(after, norm_group) if norm_group else nn.BatchNorm2d(after)
            )
        layers[f"relu{i}"] = nn.ReLU(inplace=True)
        if paper and i in (1, 2):
            layers[f"lrn{i}"] = ResponseNorm(5, alpha=1e-4, k=2, groups=2)
        if i in (1, 2, 5):
            layers[f"pool{i}"] = nn.MaxPool2d(3, 2)
        before = after
    return nn.Sequential(layers)


def _classifier(inputs: int, hidden: int, num_classes: int, paper: bool) -> nn.Sequential:
    """(B, inputs) → (B, num_classes), modules named as in the table above."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, before in ((6, inputs), (7, hidden)):
        if not paper:
            layers[f"dropout{i}"] = nn.Dropout(0.5)
        layers[f"fc{i}"] = nn.Linear(before, hidden)
        layers[f"relu{i}"] = nn.ReLU(inplace=True)
        if paper:
            layers[f"dropout{i}"] = UnscaledDropout(0.5)
    layers["fc8"] = nn.Linear(hidden, num_classes)
    return nn.Sequential(layers)


def _initialise(model: AlexNet, init: Init) -> None:
    for name, layer in [*model.features.named_children(), *model.classifier.named_children()]:
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if init == "he" and name != "fc8":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            wider = init == "source" and name in SOURCE_WIDER_STD
            nn.init.normal_(layer.weight, std=0.001 if init == "he" else 0.03 if wider else 0.01)
        if layer.bias is not None:
            nn.init.constant_(layer.bias, float(init != "he" and name in BIAS_ONE))


class Conv1(nn.Conv2d):
    """The first convolution, stride 4, which GPUs compute as `blocked_convolution`: cuDNN takes
    5.9 ms for 512 images, forward and backward in bfloat16 on an H200, and 1.3 ms in blocks."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        if torch.is_autocast_enabled("cuda"):  # before the copy into blocks, not after it
            x = x.to(torch.get_autocast_dtype("cuda"))
        return blocked_convolution(x, self.weight, self.bias)


def blocked_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of stride 4 of x (B, 3, 227, 227) with weight (C, 3, 11, 11): the same
    products, summed in another order.

    Both are padded with zeros at the right and below and cut into blocks of 4×4 pixels, whose 48
    values become channels: a convolution of (B, 48, 57, 57) with (C, 48, 3, 3) of stride 1.
    """
    return nn.functional.conv2d(_blocks(x), _blocks(weight), bias)


def _blocks(x: Tensor) -> Tensor:
    """(N, C, H, W) → (N, 16·C, ⌈H/4⌉, ⌈W/4⌉), channels last in memory."""
    padded = nn.functional.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
    count, channels, height, width = padded.shape
    rows = padded.reshape(count, channels, height // 4, 4, width // 4, 4)
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).permute(0, 3, 1, 2)


class UnscaledDropout(nn.Dropout):
    """Dropout as the released 2012 source has it: y = mask·x while training, y = (1 − p)·x in
    evaluation. torch's own divides by 1 − p while training; a p of 0.5 undoes that exactly."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 - self.p)


class ResponseNorm(nn.LocalResponseNorm):
    """As torch's, within a rounding of float32, for a beta of 0.75 and in each of `groups` equal
    groups of channels by itself. torch's own averages over a fifth dimension: seven passes in
    another memory layout, and a backward pass that no GPU repeats bit for bit. This one is sums of
    shifted squares, which a compiler makes one kernel of."""

    def __init__(self, size: int, *, alpha: float, k: float, groups: int = 1) -> None:
        super().__init__(size, alpha, 0.75, k)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        a = self.alpha / self.size
        # torch gives `apply` no types.
        normalised = [
            _Normalised.apply(group, self.size, a, self.k)  # type: ignore[no-untyped-call]
            for group in wide.chunk(self.groups, 1)
        ]
        return torch.cat(normalised, 1).to(x.dtype)


class _Normalised(torch.autograd.Function):
    """y = x·s^-0.75 with s = k + a·Σx² over `size` channels around each; its gradient is
    g·s^-0.75 − 1.5·a·x·Σ(g·x·s^-1.75)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, a: float, k: float) -> Tensor:
        root = torch.rsqrt(_around(x.square(), size).mul_(a).add_(k))
        ctx.save_for_backward(x, root)
        ctx.size, ctx.a = size, a
        return x * root * root.sqrt()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, root = ctx.saved_tensors
        own = gradient * root * root.sqrt()
        return own - 1.5 * ctx.a * x * _around(own * x * root.square(), ctx.size), None, None, None


def _around(values: Tensor, size: int) -> Tensor:
    """(B, C, H, W): sums over `size` channels, of which each is the middle one."""
    channels = values.shape[1]
    padded = nn.functional.pad(values, (0, 0, 0, 0, size // 2, (size - 1) // 2))
    total = padded[:, :channels] + padded[:, 1 : channels + 1]
    for first in range(2, size):
        total += padded[:, first : first + channels]
    return total


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """x: (B, C, H, W) → the same, normalised in training by each group of about `group` images in a
    row.

    Statistics of groups of one size ("ghost" batches): with plain batch normalisation, what is
    learned depends on how many images a worker sees at once, so on the number of workers. Source
    of the idea: Hoffer, Hubara and Soudry 2017, arXiv 1705.08741.

    B images make B / `group` groups, rounded, at least one. Their sizes differ by one image at most
    and are three to five quarters of `group` where there are two or more. The
    running statistics move once per batch, towards the mean over its images of their groups' means
    and variances; not at all for a batch without images. The mean of several ranks' buffers, each
    weighted by its images, is thus what one process leaves that saw the same groups.

    In evaluation, in an export and in its state dict it is a BatchNorm2d.
    """

    def __init__(self, channels: int, group: int) -> None:
        super().__init__(channels)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:  # first: an export for any batch must not meet the arithmetic below
            return super().forward(x)
        count = max(1, (2 * len(x) + self.group) // (2 * self.group))  # rounded, halves up
        if count == 1 and len(x):
            return super().forward(x)
        if not len(x):  # torch would move the running statistics, to nothing
            return x * self.weight[:, None, None] + self.bias[:, None, None]
        size, larger = divmod(len(x), count)
        edge = larger * (size + 1)
        parts = [(x[:edge], size + 1)] if larger else []
        parts.append((x[edge:], size))
        normalised = self._fusible if torch.compiler.is_compiling() else self._each
        groups, means, variances = zip(*(normalised(*part) for part in parts), strict=True)
        shares = [len(part) / len(x) for part, _ in parts]
        self._move(shares, means, variances)
        return torch.cat(groups)

    def _each(self, x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Groups of `size` images normalised; the means over groups of their means and variances,
        each (C,)."""
        assert self.running_mean is not None
        # Rows are groups. With a momentum of 1, batch_norm leaves a group's own statistics there.
        means = self.running_mean.new_zeros(len(x) // size, self.num_features)
        variances = torch.zeros_like(means)
        groups = [
            nn.functional.batch_norm(
                part, mean, variance, self.weight, self.bias, True, 1.0, self.eps
            )
            for part, mean, variance in zip(torch.split(x, size), means, variances, strict=True)
        ]
        return torch.cat(groups), means.mean(0), variances.mean(0)

    def _fusible(self, x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same in operations on all groups at once, which a compiler fuses; a kernel for each
        group would make its graph grow with the batch. Uncompiled it is several times slower."""
        part = torch.unflatten(x, 0, (-1, size))  # (groups, images, C, H, W)
        wide = part.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, (1, 3, 4), correction=0, keepdim=True)
        scale = self.weight[:, None, None] * torch.rsqrt(variance + self.eps)
        shifted = (wide - mean) * scale + self.bias[:, None, None]
        pixels = part[0, :, 0].numel()
        unbiased = variance.flatten(1).mean(0) * (pixels / (pixels - 1))
        return shifted.to(x.dtype).flatten(0, 1), mean.flatten(1).mean(0), unbiased

    @torch.no_grad()
    def _move(
        self, shares: Sequence[float], means: Sequence[Tensor], variances: Sequence[Tensor]
    ) -> None:
        """shares: of the batch's images, of which these are the statistics."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        for running, found in ((self.running_mean, means), (self.running_var, variances)):
            parts = [share * part for share, part in zip(shares, found, strict=True)]
            running.lerp_(torch.stack(parts).sum(0), self.momentum)
        self.num_batches_tracked.add_(1)
