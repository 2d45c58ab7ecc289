"""Which weights change: the largest elements of each tensor, and how many of them."""
