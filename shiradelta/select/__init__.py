"""Selects the weights that change: the largest elements of each tensor, and how many of them."""
