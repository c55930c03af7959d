"""What the network is: model, preprocessing, optimisation, prediction. Needs torch, never ray."""

NETWORK_SIDE = 227  # pixels of the input's sides; here, so that knowing it does not take torch
