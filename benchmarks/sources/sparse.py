"""Sparse differences of SciPy and torch.sparse, and `.shd` files themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import scipy.sparse
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import shiradelta

from .case import Case, Made, weights
from .peft_types import small_model

Weights = dict[str, Tensor]


def changed(folder: Path) -> tuple[Weights, Weights]:
    """Saves a small model; (changes of a tenth of its matrices' elements, the weights with them)."""
    small_model().save_pretrained(folder / "base")
    before = load_file(folder / "base" / "model.safetensors")
    torch.manual_seed(1)
    found = {
        name: torch.randn(tensor.shape) * (torch.rand(tensor.shape) < 0.1)
        for name, tensor in before.items()
        if tensor.dim() == 2
    }
    return found, {name: before[name] + change for name, change in found.items()}


def of_scipy(folder: Path, layout: str) -> Made:
    changes, wanted = changed(folder)
    (folder / "diffs").mkdir()
    for name, change in changes.items():
        scipy.sparse.save_npz(folder / "diffs" / f"{name}.npz", scipy.sparse.coo_array(change.numpy()).asformat(layout))
    return Made(folder / "diffs", folder / "base", wanted)


def of_torch(folder: Path, layout: str) -> Made:
    changes, wanted = changed(folder)
    blocks: dict[str, Any] = {"blocksize": (2, 2)} if layout == "bsr" else {}
    kind = getattr(torch, f"sparse_{layout}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls these layouts beta
        torch.save({name: change.to_sparse(layout=kind, **blocks) for name, change in changes.items()}, folder / "x.pt")
    return Made(folder / "x.pt", folder / "base", wanted)


def positions(folder: Path) -> Made:
    """NAME.positions and NAME.values, in safetensors."""
    changes, wanted = changed(folder)
    file = Weights()
    for name, change in changes.items():
        at = change.flatten().nonzero()[:, 0]
        file |= {f"{name}.positions": at, f"{name}.values": change.flatten()[at]}
    save_file(file, folder / "x.safetensors")
    return Made(folder / "x.safetensors", folder / "base", wanted)


def of_shd(folder: Path, kind: str) -> Made:
    """A `.shd` file of a fine-tune, of which another is made."""
    changes, tuned = changed(folder)
    del changes
    save_file({**load_file(folder / "base" / "model.safetensors"), **tuned}, folder / "tuned.safetensors")
    values = "int8" if kind == "quantised" else "f32"
    base = folder / "base"
    shiradelta.convert(folder / "tuned.safetensors", folder / "old.shd", 1, base, values)
    shiradelta.apply(base, folder / "old.shd", out=folder / "applied")
    return Made(folder / "old.shd", base, weights(folder / "applied"))


def cases() -> Iterator[Case]:
    """A row a library and layout."""
    for layout in ("csr", "csc", "coo", "bsr", "dia"):
        yield Case("SciPy", f"{layout}, .npz", f"scipy {version('scipy')}", partial(of_scipy, layout=layout))
    for layout in ("coo", "csr", "csc", "bsr"):
        yield Case("torch.sparse", f"{layout}, .pt", f"torch {version('torch')}", partial(of_torch, layout=layout))
    yield Case("safetensors", "positions and values", "key tables", positions)
    for kind in ("added", "quantised"):
        yield Case(".shd", f"into another, {kind}", "shiradelta", partial(of_shd, kind=kind))
