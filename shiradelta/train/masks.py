"""Masks, which choose the weights to train.  One registry, one row per mask (docs/extend/mask.md).

The built-in ones are those of Sparse High Rank Adapters (Bhardwaj et al., arXiv:2406.13175, section 3.1), and RIGSA's
(arXiv:2511.01794).  Importing this module does not import torch, so that the command line can list the masks quickly.
"""

from __future__ import annotations

from shiradelta.train.builtin_masks import draw_of, rows_and_diagonal  # registers the built-in masks
from shiradelta.train.mask_registry import MASKS, Chosen, Mask, MaskInput, Ticket, can_be_larger, find_mask, mask

__all__ = [
    "MASKS",
    "Chosen",
    "Mask",
    "MaskInput",
    "Ticket",
    "can_be_larger",
    "draw_of",
    "find_mask",
    "mask",
    "rows_and_diagonal",
]
