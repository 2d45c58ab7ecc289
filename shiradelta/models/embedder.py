"""A transformers model with the modules that sentence-transformers runs after its pooling, as a torch module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.models.dtypes import to_torch
from shiradelta.models.sentence import HeadModule, folder_of, head_of


class Embedder(nn.Module):
    """An encoder and the modules after its pooling, under the names that a SentenceTransformer has for them.

    It runs as the encoder alone does, and has the encoder's attributes; `embedding` runs the modules.

    Args:
        encoder: the model.
        head: the modules.
    """

    def __init__(self, encoder: nn.Module, head: Mapping[str, nn.Module]) -> None:
        super().__init__()
        holder = nn.Module()
        holder.add_module("auto_model", encoder)
        self.add_module("0", holder)
        for number, module in head.items():
            self.add_module(number, module)
        self._head = tuple(head)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            holder = self.__dict__.get("_modules", {}).get("0")
            if holder is None:  # not made yet
                raise
            return getattr(holder.auto_model, name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """The encoder's result."""
        return self.get_submodule("0.auto_model")(*arguments, **keywords)

    def embedding(self, pooled: Tensor) -> Tensor:
        """[texts, size] -> the embeddings that the modules make of pooled vectors."""
        for number in self._head:
            pooled = self.get_submodule(number)(pooled)
        return pooled


class _Dense(nn.Module):
    """A linear layer with an activation, and what it is given added to it where the settings say so."""

    def __init__(self, weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.linear = _linear(weights, "linear")
        activation = str(settings.get("activation_function") or "Tanh").rpartition(".")[2]
        self.activation = getattr(nn, activation)()
        self.adds = bool(settings.get("use_residual"))
        self.residual = _linear(weights, "residual") if "residual.weight" in weights else nn.Identity()

    def forward(self, pooled: Tensor) -> Tensor:
        """[texts, size] -> [texts, size of the output]."""
        pooled = pooled.to(self.linear.weight.dtype)
        result: Tensor = self.activation(self.linear(pooled))
        return result + self.residual(pooled) if self.adds else result


class _Norm(nn.Module):
    """A layer norm."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(weights["norm.weight"].numel())
        self.norm.load_state_dict({"weight": weights["norm.weight"], "bias": weights["norm.bias"]})

    def forward(self, pooled: Tensor) -> Tensor:
        """[texts, size] -> [texts, size]."""
        result: Tensor = self.norm(pooled.to(self.norm.weight.dtype))
        return result


class _Normalize(nn.Module):
    def forward(self, pooled: Tensor) -> Tensor:
        """[texts, size] -> unit vectors."""
        return nn.functional.normalize(pooled, dim=-1)


def with_head(encoder: nn.Module, base: Path, tuned: Path) -> nn.Module:
    """The encoder, with the modules after its pooling if there are any that change a weight's part in the embedding.

    Args:
        encoder: the loaded model.
        base: a model's folder, or its weights' file.
        tuned: the fine-tune's folder or file; it has to have the same modules.

    Raises:
        SourceError: the weights of a module are missing, or the fine-tune has other modules.
    """
    base, tuned = folder_of(base), folder_of(tuned)
    head = head_of(base)
    if not head:
        return encoder
    theirs = head_of(tuned)
    if theirs and [(m.kind, m.settings) for m in theirs] != [(m.kind, m.settings) for m in head]:
        raise SourceError(f"{tuned}: its modules after the pooling are not those of {base}; convert without fitting")
    return Embedder(encoder, {module.number: _loaded(module, base) for module in head})


def _loaded(module: HeadModule, base: Path) -> nn.Module:
    if module.kind == "Normalize":
        return _Normalize()
    checkpoint = open_checkpoint(base / module.path)
    weights = {
        name: to_torch(checkpoint.bits(name), slot.dtype.name).view(slot.shape) for name, slot in checkpoint.items()
    }
    try:
        return _Norm(weights) if module.kind == "LayerNorm" else _Dense(weights, module.settings)
    except (KeyError, RuntimeError) as error:
        raise SourceError(f"{base / module.path}: lacks weights of {module.kind} ({error}); get it again") from None


def _linear(weights: Mapping[str, Tensor], name: str) -> nn.Linear:
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return linear
