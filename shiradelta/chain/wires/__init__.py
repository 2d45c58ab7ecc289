"""Wires: steps as other projects write and read them, one file each; `WIRES` lists them.

A wire is read into a `.shd` file and written from one.  Both take the model before the step, since wires do not say
what they were made for, or say it in their own way.
"""

from __future__ import annotations

from shiradelta.chain.wires import fireworks, grail, huggingface, nemo, slime, verl, vllm  # noqa: F401 - they register themselves
from shiradelta.chain.wires.registry import WIRES, Wire, read_wire, write_wire

__all__ = ["WIRES", "Wire", "read_wire", "write_wire"]
