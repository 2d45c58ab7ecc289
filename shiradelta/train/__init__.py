"""Sparse High Rank Adapters trained in the loop that you have (Bhardwaj et al., arXiv:2406.13175).

from shiradelta import train
tuner = train.attach(model, sparsity=0.01, mask="snip", targets=["q_proj", "v_proj"], calibration=batches)
...                                        # any loop: model.parameters() trains the nonzeros only
tuner.save("task.shd")
tuner.detach()                             # the base is back, bit for bit
"""

from __future__ import annotations

from shiradelta.train.tuner import Tuner, attach

__all__ = ["Tuner", "attach"]
