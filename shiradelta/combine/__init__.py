"""Several deltas: fused into one, and compared."""
