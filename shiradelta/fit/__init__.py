"""Fitting: the values (and the mask) of a delta trained so that the model behaves like the fine-tune.

This package imports neither torch nor transformers until a fit runs.
"""

from __future__ import annotations

from shiradelta.fit.settings import MASKS, METHODS, Fit

__all__ = ["MASKS", "METHODS", "Fit"]
