"""Models as named tensors: on disk, live, and as the checkpoint sees a live one."""
