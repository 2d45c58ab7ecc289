"""Examples on disk, and batches of them: one reader for fitting and training."""
