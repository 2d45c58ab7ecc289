"""The model in a pipeline of transformers or diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shiradelta.models.places import is_module


class Components(Mapping[str, Any]):
    """The components of a diffusers pipeline as it has them now, so that a replaced one is noticed."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._names = tuple(pipeline.components)

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return getattr(self._pipeline, name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def model_in(pipeline: Any) -> Any:
    """A pipeline's model, or its components by name; anything else as it is."""
    if isinstance(pipeline, Mapping) or is_module(pipeline):
        return pipeline
    if isinstance(getattr(pipeline, "components", None), Mapping):
        return Components(pipeline)
    model = getattr(pipeline, "model", None)
    return model if is_module(model) else pipeline
