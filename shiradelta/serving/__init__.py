"""HotSwap in serving engines, which have weights in a form of their own."""
