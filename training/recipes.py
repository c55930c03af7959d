"""Recipes: each a function returning a full config, with its source, cost and what is measured.

Nothing here has been run on ImageNet by this project: an accuracy below is the cited source's, and
"unmeasured" is said where there is none. benchmarks/README.md holds what was measured.
"""

from collections.abc import Callable

from training.config import AugmentConfig, ModelConfig, OptimConfig, TrainConfig

# Of a batch for each GPU: with fewer, launching kernels and summing gradients take longer than a
# GPU computes (estimated, not measured).
_FEWEST_IMAGES = 128


def baseline() -> TrainConfig:
    """The slides' network (ungrouped, no LRN, 62,378,344 parameters), trained so that it converges.

    - Source: the slides fix the network, not the training: He initialisation, inputs of unit
      variance, bfloat16 and one cosine, because the paper's N(0, 0.01) starts so small without LRN
      that the loss can stay flat.
    - Command: `python training/run.py baseline`. On eight GPUs 32 images are few for each: add
      `--workers 8 --optim.batch-size 2048 --optim.lr 0.16 --compress-gradients True`, batch and
      rate times eight (Goyal et al. 2017); docs/scaling.md has other numbers. Unmeasured.
    - Computing: 0.76 EFLOP.
    - Top-1 on ImageNet: unmeasured (torchvision's other AlexNet reports 56.5 % of the centre view).
      Measured with a batch of 64, rate 0.01 and resized crops on the ten classes of Imagenette:
      0.811 [0.798..0.823] after 28 epochs (one seed), at a quarter of the width 0.760, 0.759 and
      0.763 (three seeds); unchanged, on 256 px shards of them, 0.798 after its 90 epochs in 113 s
      of one H200, before fc8 began at a std of 0.001.
    """
    return TrainConfig(
        recipe="baseline",
        model=ModelConfig(variant="ungrouped", init="he"),
        optim=OptimConfig(batch_size=256, epochs=90, lr=0.02, schedule="cosine", warmup_epochs=2.0),
        precision="bf16",
    )


def paper() -> TrainConfig:
    """Krizhevsky 2012 (grouped, LRN, 60,965,224 parameters), as its released source trained it.

    - Source: the paper, sections 3 to 5, and layers-145 of the released code, the paper's "1 CNN":
      batch 128, rate 0.01 inside the velocity, momentum 0.9, decay 5e-4, biases at 0.02 to the end
      and without decay, weights at a tenth from epochs 24, 50 and 78, conv1 at another tenth from
      66 and standing still from 71, std 0.03 in conv3-5, bias 1 in conv2/4/5 and the hidden layers,
      dropout on the outputs of fc6 and fc7, LRN within each half of the maps, only the mean
      subtracted, flips, colour noise 0.1 until epoch 66, ten-crop test.
    - Epochs count from 0 here and from 1 in cuda-convnet (its model begins with epoch 1, and prints
      that number), whose log has the changes in 25, 51, 67, 72 and 79, and the end in 91.
    - Known differences: Each change of rate comes between two epochs, where the source was stopped
      by hand within one, nobody knows at which batch. The LRN of conv1 follows the ReLU, as the
      paper's text has it; the source's sees the linear output. There is no second normalisation
      within each map of conv2, which the paper does not have either. Views are 227 px, all of whose
      windows lie inside, at 30 × 30 places of the stored image; the source's are 224 px at 33 × 33
      places, and its last windows hang over the edge: the same 55×55 maps. One mean colour is
      subtracted, not a mean image, which fits one crop only. Each image has its own crop and flip,
      where the source gave 32 the same to save time; each epoch has its own order, where the source
      read its files in one, so that no two epochs repeat a batch. Images with colour noise are not
      divided by 1.1, which the paper does not do and no test image knows. Batches of an epoch
      differ by one image at most, so that none is small. How the source's JPEG files were made is
      not released: ours are resized by antialiased Lanczos. Random numbers are others.
    - Command: `python training/run.py paper`. As the paper's text has it, a tenth when the val
      error stops improving and one rate for all: `--optim.schedule plateau --optim.bias-lr-factor 1
      --optim.bias-lr-constant False --optim.conv1-slow-epoch None --optim.conv1-freeze-epoch None
      --augment.colour-epochs None`.
    - Computing: 0.48 EFLOP. Batches of 128 fill no eight GPUs.
    - Top-1/5 on ImageNet val: the source reports 59.3 / 81.8 % with ten crops; ours is unmeasured.
      Measured at half the width, with resized crops in bfloat16, on the ten classes of Imagenette:
      0.813 [0.800..0.825] after 30 epochs (one seed), six of them at the second rate.
    - Needs shards built with `--crop 256`: 227 leaves no room for the crops.
    """
    return TrainConfig(
        recipe="paper",
        model=ModelConfig(variant="paper", init="source"),
        optim=OptimConfig(
            batch_size=128,
            epochs=90,
            lr=0.01,
            rule="paper",
            momentum=0.9,
            weight_decay=5e-4,
            bias_lr_factor=2.0,
            bias_lr_constant=True,
            conv1_slow_epoch=66,
            conv1_freeze_epoch=71,
            schedule="step",
            milestones=(24, 50, 78),
        ),
        augment=AugmentConfig(crop="random", flip=True, colour_sigma=0.1, colour_epochs=66),
        normalise="mean",
        precision="fp32",
    )


def fast() -> TrainConfig:
    """The slides' network with batch normalisation and a modern recipe; not the slides' AlexNet.

    - Source of the idea: AlexNet-BN of You et al. 2017 (arXiv 1709.05011 and LARS, 1708.03888), who
      report 58.5 % top-1 after 100 epochs in batches of 32,768. Here: 40 epochs in batches of
      4,096, LARS, warm-up and cosine, label smoothing 0.1, averaged weights, bfloat16, compiled.
    - Command: `python training/run.py fast`; for sets of about ten thousand images add
      `--optim.batch-size 256`, and on a CPU `--compile False`.
    - Computing: 0.34 EFLOP.
    - Top-1 on ImageNet: unmeasured. Measured at a quarter of the width, batch 256, resized crops,
      on the ten classes of Imagenette at 256 px: 0.810, 0.809 and 0.807 after 16 epochs (three
      seeds); one seed each: at half the width 0.851 [0.839..0.862] after 24, 0.884 [0.873..0.893]
      after 48, at full width 0.841 [0.830..0.852] after 20.
      Weight decay and dropout were chosen there, on a held-out part of the train split.
    """
    return TrainConfig(
        recipe="fast",
        model=ModelConfig(variant="ungrouped", batch_norm=True, norm_group=64, init="he"),
        optim=OptimConfig(
            batch_size=4096,
            epochs=40,
            lr=8.0,
            rule="lars",
            weight_decay=5e-4,
            # LARS does not scale the rate of biases, and at the weights' they learn too fast: this
            # is what plain SGD would give them.
            bias_lr_factor=0.02,
            schedule="cosine",
            warmup_epochs=3.0,
            label_smoothing=0.1,
            dropout=0.2,
            ema_decay=0.999,
        ),
        precision="bf16",
        compile=True,
    )


def smoke() -> TrainConfig:
    """A laptop minute on the drawn data set: a quarter-width ungrouped network with batch norm.

    - Command: `python training/run.py smoke`
    - It shows that the road works, nothing about AlexNet.
    - Measured: val top-1 1.00 in 39 s on two cores; see benchmarks/README.md.
    """
    return TrainConfig(
        recipe="smoke",
        model=ModelConfig(variant="ungrouped", width=0.25, batch_norm=True, init="he"),
        optim=OptimConfig(batch_size=32, epochs=4, lr=0.005, schedule="cosine", warmup_epochs=0.5),
        augment=AugmentConfig(crop="centre", colour_sigma=0.0),
        flat_loss_steps=100,
        log_steps=10,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "baseline": baseline,
    "paper": paper,
    "fast": fast,
    "smoke": smoke,
}


def known_differences(recipe: str) -> str | None:
    """Where a recipe departs from its source, in its own words, on one line."""
    text = " ".join(str(RECIPES[recipe].__doc__).split())
    _, found, rest = text.partition(" - Known differences: ")
    return rest.partition(" - ")[0] if found else None


def small_parts(config: TrainConfig) -> str | None:
    """What to pass where the parts of a batch are too small for GPUs; None where they are not.

    By the linear rule of Goyal et al. 2017 (arXiv 1706.02677), which was shown with a warm-up and
    for plain SGD with momentum: k times the batch at k times the rate.
    """
    recipe, workers = config.optim, config.workers
    each = recipe.batch_size / workers
    if each >= _FEWEST_IMAGES:
        return None
    remedy = "pass a larger --optim.batch-size, or fewer --workers"
    if recipe.rule == "torch" and recipe.schedule == "cosine" and recipe.warmup_epochs:
        larger = 2 * _FEWEST_IMAGES * workers
        remedy = f"pass --optim.batch-size {larger}"
        remedy += f" --optim.lr {recipe.lr * larger / recipe.batch_size:.3g}"
        remedy += " --compress-gradients True" if workers > 1 else ""
    return f"{each:g} images a step are few for a GPU: {remedy}"
