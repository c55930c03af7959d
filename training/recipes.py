"""Recipes: each a function returning a full config, with its source, cost and what is measured.

Nothing here has been run on ImageNet by this project: an accuracy below is the cited source's, and
"unmeasured" is said where there is none. benchmarks/README.md holds what was measured.
"""

from collections.abc import Callable

from training.config import AugmentConfig, ModelConfig, OptimConfig, TrainConfig


def deck() -> TrainConfig:
    """The slides' network (ungrouped, no LRN, 62,378,344 parameters), trained so that it converges.

    The slides fix the network, not the training: He initialisation, inputs of unit variance,
    bfloat16 and one cosine, because the paper's N(0, 0.01) starts so small without LRN that the
    loss can stay flat. Cost: 90 epochs × 1.28 M images × 6.6 GFLOP = 0.76 EFLOP; time unmeasured.
    Accuracy on ImageNet: unmeasured (torchvision's other AlexNet reports 56.5 % top-1).
    """
    return TrainConfig(
        recipe="deck",
        model=ModelConfig(variant="deck", init="he"),
        optim=OptimConfig(batch_size=256, epochs=90, lr=0.02, schedule="cosine", warmup_epochs=2),
        precision="bf16",
    )


def paper() -> TrainConfig:
    """Krizhevsky 2012 (grouped, LRN, 60,965,224 parameters), as its released source trained it.

    Source: section 5 of the paper and layers-145 of the released code: batch 128, rate 0.01 (biases
    0.02, undecayed), momentum 0.9, decay 5e-4, a tenth at epochs 25, 51 and 79 of 91, std 0.03 in
    conv3-5, bias 1 in conv2/4/5 and the hidden layers, only the mean subtracted, 227 crops of 256,
    flips, colour noise 0.1. Known differences: the rate stays outside of the velocity (PyTorch's
    rule), conv1 is not frozen at epoch 72, one order per epoch instead of one for all.
    The source reports 59.3 / 81.8 % top-1/5 with ten crops on ILSVRC-2012 val; ours is unmeasured.
    Needs shards built with `--crop 256`: 227 leaves no room for the crops.
    """
    return TrainConfig(
        recipe="paper",
        model=ModelConfig(variant="paper", init="source"),
        optim=OptimConfig(
            batch_size=128,
            epochs=91,
            lr=0.01,
            bias_lr_factor=2.0,
            schedule="step",
            milestones=(25, 51, 79),
        ),
        augment=AugmentConfig(crop="random"),
        normalise="mean",
    )


def fast() -> TrainConfig:
    """The slides' network with batch normalisation and a modern recipe; not the slides' AlexNet.

    Batch 1024, warm-up and cosine over 40 epochs, label smoothing 0.1, bfloat16. Source of the
    idea: AlexNet-BN of You et al. 2017 (arXiv 1709.05011), who report 58.5 % top-1 in 100 epochs.
    Cost: 0.34 EFLOP; time and accuracy unmeasured.
    """
    return TrainConfig(
        recipe="fast",
        model=ModelConfig(variant="deck", batch_norm=True, init="he"),
        optim=OptimConfig(
            batch_size=1024,
            epochs=40,
            lr=0.1,
            weight_decay=1e-4,
            schedule="cosine",
            warmup_epochs=3,
            label_smoothing=0.1,
        ),
        precision="bf16",
    )


def smoke() -> TrainConfig:
    """A laptop minute on the drawn data set: a quarter-width deck network with batch norm.

    It shows that the road works, nothing about AlexNet. Measured figures: benchmarks/README.md.
    """
    return TrainConfig(
        recipe="smoke",
        model=ModelConfig(variant="deck", width=0.25, batch_norm=True, init="he"),
        optim=OptimConfig(batch_size=32, epochs=4, lr=0.005, schedule="cosine", warmup_epochs=0.5),
        augment=AugmentConfig(crop="centre", colour_sigma=0.0),
        flat_loss_steps=100,
        log_steps=10,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "deck": deck,
    "paper": paper,
    "fast": fast,
    "smoke": smoke,
}
