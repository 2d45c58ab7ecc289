"""Applying deltas: to a model's folder on disk (directory.py), exactly and revertibly."""
