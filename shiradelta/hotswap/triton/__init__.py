"""The fused GPU backend: all tensors of a device in one launch."""
