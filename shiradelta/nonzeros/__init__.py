"""The nonzeros of a torch model as trainable values; fitting and training share it."""
