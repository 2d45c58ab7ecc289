"""A real fine-tune to convert, small enough to keep here: its task, its training, its weights."""

from shiradelta.util.threads import share_processors

share_processors()  # the demo's modules import torch
