"""One step of the training: the loss of a global batch, its gradient over all ranks, the update."""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alexnet import optim
from alexnet.errors import UserError, reason
from alexnet.model import ResponseNorm
from alexnet.preprocess import Compute, view
from training import checkpoint
from training.config import TrainConfig
from training.meter import Clock, Mark, Step

logger = logging.getLogger("training")

Network = Callable[[Tensor], Tensor]
P = ParamSpec("P")

IGNORED = -100  # the label of what only fills a batch up


@dataclass(frozen=True)
class Place:
    """Where this process stands among its peers and what it may use."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    threads: int = 1


@contextlib.contextmanager
def algorithms(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Inside, torch takes algorithms that repeat their bits, or on GPUs the fastest it finds; and
    float32 products and convolutions of GPUs are exact (IEEE) unless TF32 is asked for."""
    repeat, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    # torch refuses a mixture of these two with its older `allow_tf32`.
    kinds: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    precisions = [kind.fp32_precision for kind in kinds]
    if config.deterministic:
        # cuBLAS repeats its bits only with a workspace of its own; read at its first use.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _repeat(config.deterministic)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not config.deterministic
    for kind in kinds:
        kind.fp32_precision = "tf32" if config.precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for kind, precision in zip(kinds, precisions, strict=True):
            kind.fp32_precision = precision
        _repeat(repeat)
        torch.backends.cudnn.benchmark = benchmark


def input_of(config: TrainConfig, device: torch.device) -> Compute:
    """`alexnet.preprocess.view`, as the network of this config takes its input: channels last, and
    on GPUs in the precision that its first layer would round to."""
    half = config.precision == "bf16" and device.type == "cuda"
    dtype = torch.bfloat16 if half else torch.float32

    def compute(images: Tensor, drawn: Tensor, std: Tensor, resized: bool) -> Tensor:
        x = view(images, drawn, std, resized)
        return x.to(dtype, memory_format=torch.channels_last)

    return fused(compute, device)


def learning_rates(
    config: TrainConfig, step: int, num_steps: int, val_errors: Sequence[float] = ()
) -> optim.Rates:
    """At a step (0-based) with `num_steps` in an epoch. val_errors: of the epochs before, which the
    plateau schedule follows."""
    recipe = config.optim
    if recipe.schedule == "step":
        weights = recipe.lr * optim.step_decay(step, num_steps, recipe.milestones)
    elif recipe.schedule == "plateau":
        weights = recipe.lr * _plateau(config, val_errors)[0]
    else:
        warmup = round(recipe.warmup_epochs * num_steps)
        weights = recipe.lr * optim.warmup_cosine(step, recipe.epochs * num_steps, warmup)
    biases = (recipe.lr if recipe.bias_lr_constant else weights) * recipe.bias_lr_factor
    epoch = step // num_steps
    slow = recipe.conv1_slow_epoch is not None and epoch >= recipe.conv1_slow_epoch
    frozen = recipe.conv1_freeze_epoch is not None and epoch >= recipe.conv1_freeze_epoch
    return optim.Rates(
        weights=weights,
        biases=biases,
        conv1_weights=0.0 if frozen else weights / 10 if slow else weights,
        conv1_biases=0.0 if frozen else biases,
    )


def ended_early(config: TrainConfig, val_errors: Sequence[float]) -> bool:
    """Whether the schedule has nothing more to give after the epochs with these errors."""
    return config.optim.schedule == "plateau" and _plateau(config, val_errors)[1]


def summed(values: list[int], device: torch.device, world_size: int) -> list[int]:
    """Each of `values` summed over all ranks, which must all ask for as many."""
    if world_size == 1:
        return values
    sums = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(sums)
    return [int(value) for value in sums.tolist()]


class Stepper:
    """State of what is learned: the weights, their momentum, their averages if there are any."""

    def __init__(self, config: TrainConfig, model: nn.Module, place: Place) -> None:
        self.config, self.place = config, place
        channels_last, recipe = torch.channels_last, config.optim
        self.model = model.to(place.device, memory_format=channels_last)  # type: ignore[call-overload]
        self._frozen = config.freeze == "features"
        if self._frozen:
            self.model.features.requires_grad_(False)
        self._to_train()
        self.optimizer = optim.sgd(
            self.model,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            rule=recipe.rule,
            trust=recipe.lars_trust,
        )
        self.ema = optim.Ema(self.model, recipe.ema_decay) if recipe.ema_decay else None
        self._clock = Clock(place.device)
        self._own_gradient: Mark | None = None
        for layer in self.model.modules():
            if isinstance(layer, ResponseNorm) and not config.compile:
                layer.forward = fused(layer.forward, place.device)  # type: ignore[method-assign]
        self._network = self._replica()

    def step(
        self, x: Tensor, labels: Tensor, *, number: int, rates: optim.Rates, global_size: int
    ) -> Step:
        """SGD on the mean loss of a global batch, of which x, float32 (B, 3, 227, 227), is this
        rank's part; images with the label IGNORED teach and count nothing. number: of the step,
        from 0.

        DDP averages gradients over ranks, so each rank's sum is scaled by W / global size: exact
        also where W does not divide the batch.
        """
        place = self.place
        # Dropout is seeded by position: a resumed run draws the masks the uninterrupted one drew.
        where = repr((self.config.seed, number, place.rank)).encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(where).digest()[:7]))
        with self.autocast():
            logits = self._network(x).float()
        loss_sum = nn.functional.cross_entropy(
            logits,
            labels,
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.config.optim.label_smoothing,
        )
        optim.set_rates(self.optimizer, rates)
        self.optimizer.zero_grad(set_to_none=True)
        (loss_sum * (place.world_size / global_size)).backward()  # type: ignore[no-untyped-call]
        communication = self._joined(len(x))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = _norm(gradients)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return Step(_sums(loss_sum.detach(), logits.detach(), labels, norm), communication)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the network computes in bfloat16 where that is the run's precision."""
        if self.config.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.place.device.type, torch.bfloat16)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint: "model" is what is evaluated. Where that is an average, "raw" is what
        the steps go on from."""
        raw = self.model.state_dict()
        momentum = checkpoint.momentum(self.model, self.optimizer)
        if self.ema is None:
            return {"model": raw, "optimizer": momentum}
        return {"model": self.ema.state, "raw": raw, "optimizer": momentum}

    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """Those there are; the others keep what they were drawn as. Before the first step."""
        self.model.load_state_dict({**self.model.state_dict(), **weights})
        if self.ema is not None:
            self.ema.load(self.model.state_dict(), updates=0)

    def restore(self, folder: Path, steps: int) -> None:
        """From a checkpoint of `tensors` after so many steps."""
        raw = "model" if self.ema is None else "raw"
        self.model.load_state_dict(checkpoint.load_tensors(folder, raw))
        if self.ema is not None:
            self.ema.load(checkpoint.load_tensors(folder, "model"), updates=steps)
        checkpoint.load_optimizer(folder, self.model, self.optimizer)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The network to measure: in evaluation mode, in the precision of the training, with the
        averaged weights where there are."""
        self.model.eval()
        averaged = contextlib.nullcontext() if self.ema is None else self.ema.applied()
        with averaged, self.autocast():
            yield self.model
        self._to_train()

    def _to_train(self) -> None:
        self.model.train()
        if self._frozen:  # batch norm's running statistics stand still too
            self.model.features.eval()

    def _replica(self) -> Network:
        network: nn.Module = self.model
        if self.place.world_size > 1:
            # DDP would copy rank 0's buffers to the others; `_joined` averages them instead, so
            # that batch norm's running statistics are those of every rank's samples.
            names = [name for name, _ in self.model.named_buffers()]
            ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(self.model, names)  # type: ignore[no-untyped-call]
            network = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
            if self.config.compress_gradients:
                network.register_comm_hook(self.place.world_size, _bfloat16_mean)
            # Backward ends with the first layer: what follows is waiting for the others.
            first = next(p for p in self.model.parameters() if p.requires_grad)
            first.register_post_accumulate_grad_hook(self._note_own_gradient)
        return _compiled(network) if self.config.compile else network

    def _note_own_gradient(self, _: Tensor) -> None:
        self._own_gradient = self._clock.mark()

    def _joined(self, images: int) -> tuple[Mark, Mark] | None:
        """Averages the buffers over the images of all ranks, of which this one had `images`; the
        exposed part of the communication of this step."""
        if self.place.world_size == 1:
            return None
        buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        if buffers:
            weight = torch.ones_like(buffers[0].flatten()[:1])
            together = torch.cat([buffer.flatten() for buffer in buffers] + [weight]) * images
            if not images:  # whatever a layer made of nothing
                together.zero_()
            dist.all_reduce(together)
            sizes = [buffer.numel() for buffer in buffers]
            means = torch.split(together[:-1] / together[-1], sizes)
            for buffer, mean in zip(buffers, means, strict=True):
                buffer.copy_(mean.view_as(buffer))
        assert self._own_gradient is not None
        return self._own_gradient, self._clock.mark()


def _repeat(wanted: bool) -> None:
    if torch.are_deterministic_algorithms_enabled() != wanted:
        torch.use_deterministic_algorithms(wanted)  # imports the compiler: seconds


def _plateau(config: TrainConfig, val_errors: Sequence[float]) -> tuple[float, bool]:
    recipe = config.optim
    return optim.plateau_factor(val_errors, recipe.plateau_epochs, recipe.plateau_drops)


def refuse_without_compiler(config: TrainConfig, use_gpu: bool) -> None:
    """Raises UserError where this machine lacks what --compile True takes here: Triton calls a C
    compiler, and on CPUs torch one of C++."""
    known = [os.environ.get("CC"), "gcc", "clang"] if use_gpu else [os.environ.get("CXX", "g++")]
    if config.compile and not any(name and shutil.which(name) for name in known):
        name = "C compiler (gcc)" if use_gpu else "C++ compiler (g++)"
        raise UserError(f"--compile True needs a {name}; install one, or pass --compile False")


def fused(function: Callable[P, Tensor], device: torch.device) -> Callable[P, Tensor]:
    """On GPUs the function as a compiler makes it, in one kernel if it can; the same function on
    CPUs, and where no compiler works, which a line says."""
    if device.type != "cuda":
        return function
    compiled: Callable[P, Tensor] | None = torch.compile(function, dynamic=False)

    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        nonlocal compiled
        if compiled is not None:
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                compiled = None
                name = getattr(function, "__qualname__", "a function")
                logger.info(f"{name} runs slower, uncompiled: {reason(error)}")
        return function(*args, **kwargs)

    return call


def _compiled(network: nn.Module) -> Network:
    """Raises UserError at the first call where torch finds no compiler for this machine."""
    # Batches differ by one sample: two static programs are faster than one for every size.
    compiled: Network = torch.compile(network, dynamic=False)

    def call(x: Tensor) -> Tensor:
        try:
            return compiled(x)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"--compile True fails here ({reason(error)}); pass --compile False, or install "
                "what torch.compile needs (a C++ compiler on CPUs, Triton and gcc on GPUs)"
            ) from error

    return call


def _bfloat16_mean(
    world_size: int,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """A communication hook of DDP: sends half the bytes. torch's own refuses to run on CPUs."""
    gradient: Tensor = bucket.buffer()
    sent = gradient.to(torch.bfloat16).div_(world_size)
    future = dist.all_reduce(sent, async_op=True).get_future()
    mean: torch.futures.Future[Tensor] = future.then(lambda done: gradient.copy_(done.value()[0]))
    return mean


def _norm(gradients: list[Tensor]) -> Tensor:
    """Of all together, as a scalar. On CPUs from dot products: torch's own norm takes twice as long
    there, and is 0.2 % off for the 62 million of `ungrouped` (float32, against float64)."""
    if gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients)
    flat = [gradient.flatten() for gradient in gradients]
    return torch.stack([torch.dot(values, values) for values in flat]).sum().sqrt()


def _sums(loss_sum: Tensor, logits: Tensor, labels: Tensor, grad_norm: Tensor) -> Tensor:
    """float64 (5,) for the meter. With fewer than five classes, top5 counts all of them."""
    correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    count = (labels != IGNORED).sum()
    parts = (loss_sum, correct[:, 0].sum(), correct.sum(), count, grad_norm)
    return torch.stack([part.double() for part in parts])
