"""Hidden states between the blocks of a model, in memory or in mapped files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

#: Hidden states beyond this many bytes are kept in mapped files.
MEMORY = 1 << 30

#: Indices of the examples of one forward pass.
Part = tuple[int, ...]


class HiddenStates:
    """(state, part) -> hidden states that enter the next block, on the CPU.

    Args:
        folder: the folder of the files for everything beyond `MEMORY`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._bytes = folder, 0
        self._kept: dict[tuple[str, Part], Tensor] = {}

    def __getitem__(self, key: tuple[str, Part]) -> Tensor:
        return self._kept[key]

    def __setitem__(self, key: tuple[str, Part], hidden: Tensor) -> None:
        if key not in self._kept:
            self._bytes += hidden.nbytes
            if self._bytes <= MEMORY:
                self._kept[key] = torch.empty_like(hidden, device="cpu")
            else:
                file = str(self._folder / str(len(self._kept)))
                mapped = torch.from_file(file, True, hidden.numel(), dtype=hidden.dtype)
                self._kept[key] = mapped.view(hidden.shape)
        self._kept[key].copy_(hidden)
