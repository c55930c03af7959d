"""What the network is: model, preprocessing, optimisation, prediction. Needs torch, never ray."""
