"""HotSwap in vLLM beside vLLM's own path for sparse weight updates."""
