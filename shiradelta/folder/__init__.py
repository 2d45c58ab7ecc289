"""Applies deltas to a model's folder in place, with a journal, and takes them out bit for bit."""
