"""What the network is: model, preprocessing, optimisation, prediction. Needs torch, never ray."""

from typing import Any, Literal

# Here, so that knowing them does not take torch.
NETWORK_SIDE = 227  # pixels of the input's sides
Variant = Literal["ungrouped", "paper"]
Init = Literal["source", "text", "he"]
Rule = Literal["torch", "paper", "lars"]  # of updates
# What earlier releases called them, in the files that they left.
FORMER_RECIPES = {"deck": "baseline"}
FORMER_VARIANTS = {"deck": "ungrouped"}

# What files with weights of a variant say of its dropout, where it has changed. Files of `paper`
# without it are of earlier releases.
DROPOUT = {"paper": "outputs"}


def former_network(variant: object, dropout: object) -> str | None:
    """The network of weights whose file says so, in words, where this release has it no more."""
    if variant != "paper" or dropout == DROPOUT["paper"]:
        return None
    return (
        "the former network `paper` (dropout before fc6 and fc7, not on their outputs; LRN across "
        "both halves of the maps)"
    )


def renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A stored config or description, nested or flat, with the present names: changed in place."""
    for holder, key, former in (
        (config, "recipe", FORMER_RECIPES),
        (config, "model.variant", FORMER_VARIANTS),
        (config.get("model"), "variant", FORMER_VARIANTS),
    ):
        if isinstance(holder, dict) and isinstance(name := holder.get(key), str):
            holder[key] = former.get(name, name)
    return config
