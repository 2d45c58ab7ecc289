"""The loader for SGLang, called as SGLang calls it: `loader(model, [(name, tensor)])`, in each worker."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shiradelta.errors import ArgumentError, FormatError, ShiraDeltaError
from shiradelta.serving.sglang import LOADER, request_tensors
from tests.serving.test_engine import folder, model, state

__all__ = ["folder"]


def update(model: Any, named_tensors: Any, load_format: str = LOADER) -> None:
    """What SGLang does with `update_weights_from_tensor`: it imports the loader by its name."""
    module, _, name = load_format.rpartition(".")
    getattr(import_module(module), name)(model, named_tensors)


@pytest.fixture
def made(folder: Path) -> Any:
    made = model()
    made.config = SimpleNamespace(_name_or_path=str(folder))
    return made


def test_requests_by_path_and_by_bytes(made: Any, folder: Path):
    base = state(made)
    update(made, request_tensors({"load": {"a": str(folder / "a.shd")}, "active": {"a": 1.0}}))
    by_path = state(made)
    assert by_path["norm"] != base["norm"]
    update(made, request_tensors({"active": {}, "unload": ["a"]}))
    assert state(made) == base
    update(made, request_tensors({"active": {"a": 1.0}}, {"a": folder / "a.shd"}))
    assert state(made) == by_path
    update(made, request_tensors({"active": {"b": 0.5}, "unload": ["a"]}, {"b": folder / "b.shd"}))
    update(made, request_tensors({"active": {}}))
    assert state(made) == base


def test_the_checkpoint_is_the_request_s_or_the_model_s(folder: Path):
    made = model()
    with pytest.raises(ArgumentError, match="give the request's field 'checkpoint'"):
        update(made, request_tensors({}))
    with pytest.raises(ArgumentError, match="is no folder here"):
        update(made, request_tensors({"checkpoint": str(folder / "nowhere")}))
    update(made, request_tensors({"checkpoint": str(folder), "active": {"a": 1}}, {"a": folder / "a.shd"}))
    update(made, request_tensors({"active": {}, "unload": ["a"]}))


def good(folder: Path) -> list[tuple[str, torch.Tensor]]:
    return request_tensors({"active": {"b": 1.0}}, {"b": folder / "b.shd"})


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (lambda f: good(f)[1:], ArgumentError, "no tensor 'request' is there"),
        (lambda f: [*good(f), ("w", torch.zeros(2, 3))], ArgumentError, r"'w' is float32 \[2, 3\], not bytes"),
        (lambda f: [good(f)[0], ("b", good(f)[1][1][:-9])], FormatError, "truncated|size|end"),
        (lambda f: [("request", torch.zeros(3, dtype=torch.uint8))], ArgumentError, "is no JSON"),
        (lambda f: [*good(f), good(f)[1]], ArgumentError, "'b' is given twice"),
        (lambda f: request_tensors({"data": {"b": ""}}, {"b": f / "b.shd"}), ArgumentError, "'b' is given twice"),
        (lambda f: request_tensors({"data": "b"}, {"b": f / "b.shd"}), ArgumentError, "data is 'b'; give a mapping"),
        (lambda f: request_tensors({"active": {"c": 1.0}}), ShiraDeltaError, "'c' is not loaded"),
        (lambda f: request_tensors({}, {"a": f / "b.shd"}), ArgumentError, "'a' is loaded already"),
        (lambda f: request_tensors({"activate": {}}), ArgumentError, "fields activate, which is not known.* active"),
        (lambda f: request_tensors({}, {"request": f / "b.shd"}), ArgumentError, "take another name"),
    ],
)
def test_what_is_refused_changes_nothing(tensors: Any, error: type[Exception], message: str, made: Any, folder: Path):
    update(made, request_tensors({"active": {"a": 1.0}}, {"a": folder / "a.shd"}))
    before = state(made)
    with pytest.raises(error, match=message):
        update(made, tensors(folder))
    assert state(made) == before
    update(made, good(folder))  # the session goes on
    assert state(made) != before
