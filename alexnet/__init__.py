"""What the network is: model, preprocessing, optimisation, prediction. Needs torch, never ray."""

from typing import Literal

# Here, so that knowing them does not take torch.
NETWORK_SIDE = 227  # pixels of the input's sides
Variant = Literal["deck", "paper"]
Init = Literal["source", "text", "he"]
Rule = Literal["torch", "paper", "lars"]  # of updates
