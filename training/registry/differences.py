"""In what a training differs from Krizhevsky, Sutskever and Hinton (2012), read off its config."""

from pipelines.shards import Manifest
from training.config import AugmentConfig, ModelConfig, OptimConfig, TrainConfig


def differences(config: TrainConfig, manifest: Manifest) -> tuple[str, ...]:
    """One sentence each, without a full stop; numbers in parentheses are the paper's sections."""
    return (
        *_of_network(config.model),
        *_of_data(config, manifest),
        *_of_augmentation(config.augment, manifest),
        *_of_optimisation(config.optim),
        *_of_schedule(config.optim),
        *_of_arithmetic(config),
        "val accuracy here is of the centre view; the paper averages ten views (4.1)",
    )


def _of_network(model: ModelConfig) -> list[str]:
    ungrouped, source, he = model.variant == "ungrouped", model.init == "source", model.init == "he"
    return _true(
        (ungrouped, "no local response normalisation (3.3)"),
        (ungrouped, "no groups: conv2, conv4 and conv5 see all maps of the layer before (3.5)"),
        (
            not ungrouped,
            "local response normalisation divides alpha by its window of 5, as the released source "
            "does; the formula in the paper does not (3.3)",
        ),
        (
            model.width != 1,
            f"{model.width:g} times the paper's channels and hidden units: no longer AlexNet",
        ),
        (model.batch_norm, "batch normalisation after every convolution, younger than the paper"),
        (
            source,
            "conv3-5 begin with a standard deviation of 0.03, as in the released source; the paper "
            "says 0.01 (5)",
        ),
        (he, "He initialisation without biases of 1; the paper draws from N(0, 0.01²) (5)"),
    )


def _of_data(config: TrainConfig, manifest: Manifest) -> list[str]:
    return _true(
        (manifest.num_classes != 1000, f"{manifest.num_classes} classes; the paper has 1000 (2)"),
        (True, "views of 227×227, which give the paper's 55×55 maps; it prints 224×224 (3.5)"),
        (
            (manifest.resize, manifest.crop) != (256, 256),
            f"pictures stored as the middle {manifest.crop}×{manifest.crop} with a shorter side of "
            f"{manifest.resize}; both are 256 in the paper (2)",
        ),
        (True, "one mean colour is subtracted; the paper subtracts each pixel's mean (2)"),
        (config.normalise != "mean", "inputs are divided by their standard deviation"),
    )


def _of_augmentation(augment: AugmentConfig, manifest: Manifest) -> list[str]:
    crop = augment.crop
    if crop == "auto":
        crop = "random" if manifest.crop > 227 else "resized"
    return _true(
        (crop == "resized", "training views of random area and aspect; the paper only shifts them"),
        (crop == "centre", "only the centre view in training; the paper shifts it (4.1)"),
        (not augment.flip, "no mirrored pictures in training (4.1)"),
        (augment.colour_sigma == 0, "no colour noise (4.1)"),
        (
            augment.colour_sigma not in (0, 0.1),
            f"colour noise of {augment.colour_sigma:g} standard deviations; the paper has 0.1",
        ),
        (
            augment.colour_epochs is not None,
            f"no colour noise from epoch {augment.colour_epochs} on; the released source ended it "
            "at 67, the paper does not say",
        ),
    )


def _of_optimisation(optim: OptimConfig) -> list[str]:
    return _true(
        (optim.rule == "torch", "the learning rate is outside of the velocity, as torch has it"),
        (optim.rule == "lars", "LARS, a rate for each layer (You 2017)"),
        (optim.batch_size != 128, f"batches of {optim.batch_size}; the paper has 128 (5)"),
        (optim.momentum != 0.9, f"momentum {optim.momentum:g}; the paper has 0.9 (5)"),
        (
            optim.weight_decay != 5e-4,
            f"weight decay {optim.weight_decay:g}; the paper has 0.0005 (5)",
        ),
        (True, "biases do not decay, as in the released source; the paper does not say (5)"),
        (
            optim.bias_lr_factor != 1,
            f"biases learn at {optim.bias_lr_factor:g} times the rate; in the paper all are equal",
        ),
        (
            optim.bias_lr_constant,
            "the rate of biases never falls, as in the released source; in the paper all are equal",
        ),
        (optim.label_smoothing > 0, f"labels smoothed by {optim.label_smoothing:g}"),
        (optim.ema_decay > 0, f"weights averaged over steps, decay {optim.ema_decay:g}"),
    )


def _of_schedule(optim: OptimConfig) -> list[str]:
    milestones = ", ".join(map(str, optim.milestones)) or "none"
    return _true(
        (optim.epochs != 90, f"{optim.epochs} epochs at most; the paper has about 90 (5)"),
        (optim.lr != 0.01, f"the highest learning rate is {optim.lr:g}; the paper has 0.01 (5)"),
        (
            optim.schedule == "step",
            f"the rate falls to a tenth at fixed epochs ({milestones}); in the paper when the val "
            "error stops improving (5)",
        ),
        (
            optim.schedule == "cosine",
            f"the rate follows a cosine after {optim.warmup_epochs:g} epochs of warm-up; in the "
            "paper it falls to a tenth three times (5)",
        ),
        (
            optim.conv1_slow_epoch is not None,
            f"conv1 learns at a tenth from epoch {optim.conv1_slow_epoch}; in the source from 67",
        ),
        (
            optim.conv1_freeze_epoch is not None,
            f"conv1 is frozen from epoch {optim.conv1_freeze_epoch}; in the source from 72",
        ),
    )


def _of_arithmetic(config: TrainConfig) -> list[str]:
    return _true(
        (config.precision == "bf16", "forward and backward in bfloat16; the paper in float32"),
        (
            config.workers > 1,
            "each worker has the whole network; the paper splits it over two GPUs (3.2)",
        ),
    )


def _true(*said: tuple[bool, str]) -> list[str]:
    return [sentence for holds, sentence in said if holds]
