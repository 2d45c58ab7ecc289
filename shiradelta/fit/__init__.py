"""Fits the values (and the mask) of a delta, so that the model behaves like the fine-tune.  Texts need no labels.

This package imports neither torch nor transformers until a fit runs.
"""

from __future__ import annotations

from shiradelta.fit.choices import MASKS, METHODS
from shiradelta.fit.settings import Fit

__all__ = ["MASKS", "METHODS", "Fit"]
