"""Imports the source layouts, each of which registers itself."""

from . import (  # noqa: F401
    diff,
    full,
    gguf_lora,
    lora,
    matrices,
    mlx,
    nemo,
    peft_merge,
    rigsa,
    shd,
    sparse,
    symlora,
    torchtune,
)
