"""The nonzeros of a torch model as trainable values, for fitting and for training."""
