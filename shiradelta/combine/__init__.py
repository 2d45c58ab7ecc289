"""Fuses several deltas into one, and compares them."""
