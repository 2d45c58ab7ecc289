"""Which weights change: exact top-k, and how many of each tensor."""
