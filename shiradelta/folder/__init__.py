"""Applying deltas to a model's folder: in place, journaled, taken out bit for bit."""
