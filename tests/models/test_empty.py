"""Models built from configurations alone, which may be strangers': built, or given up soon."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from shiradelta.models import empty
from shiradelta.models.empty import build_empty
from shiradelta.models.library import library_of
from tests.whole_sources import BERT

pytest.importorskip("transformers")


def built(folder: Path, config: dict[str, Any]) -> object:
    (folder / "config.json").write_text(json.dumps(config))
    return build_empty(folder, config)


def test_a_model_is_built_without_memory(tmp_path: Path):
    model = built(tmp_path, BERT | {"vocab_size": 100_000_000, "max_position_embeddings": 1 << 24})
    assert model.embeddings.word_embeddings.weight.shape == (100_000_000, 8)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": float("inf")},
        {"num_hidden_layers": -(10**9)},
        {"hidden_size": 10**18},
        {"vocab_size": 1 << 62},
        {"num_attention_heads": 0},
        {"num_attention_heads": "x"},
        {"hidden_size": None},
        {"hidden_act": "nothing"},
        {"model_type": "nothing"},
        {"model_type": "\ud800"},
        {"model_type": "../bert"},
        {"sub": {"config": [{"num_layers": 10**9}]}},
        {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "mine"},
    ],
    ids=repr,
)
def test_a_configuration_that_builds_nothing_is_given_up(tmp_path: Path, change: dict[str, Any]):
    began = time.perf_counter()
    assert built(tmp_path, BERT | change) is None
    assert library_of(tmp_path) is None
    assert time.perf_counter() - began < 10


def test_too_many_parts_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(empty, "_MOST_REGISTERED", 200)
    assert built(tmp_path, BERT) is not None
    assert built(tmp_path, BERT | {"num_hidden_layers": 9000}) is None
    assert built(tmp_path, BERT) is not None


@pytest.mark.parametrize(
    "names", [["pipeline"], ["PreTrainedConfig"], ["AutoModel"], [1], {"a": 1}, "BertModel", [], [[]]]
)
def test_what_is_no_model_of_transformers_is_not_called(tmp_path: Path, names: Any):
    """The library's own class for the type is taken then, as for a class that it does not know."""
    assert type(built(tmp_path, BERT | {"architectures": names})).__name__ == "BertModel"


def test_folders_with_the_same_configuration_build_one_model(tmp_path: Path):
    """Such as a base and its fine-tune; a configuration that changes is read anew."""
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(BERT))
    base = library_of(tmp_path / "base")
    assert base is not None
    assert library_of(tmp_path / "tuned") is base
    (tmp_path / "tuned" / "config.json").write_text(json.dumps({**BERT, "num_hidden_layers": 2}))
    other = library_of(tmp_path / "tuned")
    assert other is not None
    assert len(other.shapes) > len(base.shapes)
    (tmp_path / "tuned" / "config.json").unlink()
    assert library_of(tmp_path / "tuned") is None
