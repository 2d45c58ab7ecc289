"""How token vectors become an embedding, as sentence-transformers' files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shiradelta.errors import ArgumentError, SourceError
from shiradelta.models.sentence import modules_not_run
from shiradelta.text.pooling import POOLING_MODES, find_pooling, pool


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
        ({"word_embedding_dimension": 8}, "mean"),
        ({"embedding_dimension": 8, "pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "lasttoken"),
        (None, None),
    ],
)
def test_pooling_is_what_sentence_transformers_wrote(
    config: dict[str, Any] | None, expected: str | None, tmp_path: Path
):
    if config is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert find_pooling(tmp_path / "nothing.safetensors", tmp_path) == expected


def test_the_pooling_module_is_where_modules_json_says(tmp_path: Path):
    kinds = {"": "Transformer", "1_WeightedLayerPooling": "WeightedLayerPooling", "2_Pooling": "Pooling"}
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "2_Pooling").mkdir()
    (tmp_path / "2_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "max"}))
    assert find_pooling(tmp_path) == "max"
    assert modules_not_run(tmp_path / "no.safetensors") == ["1_WeightedLayerPooling"]


@pytest.mark.parametrize("mode", ["median", ["mean", "max"], [], 3, [["mean"]], None])
def test_a_named_mode_that_cannot_be_used_is_refused(mode: object, tmp_path: Path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    with pytest.raises(
        SourceError, match=r"1_Pooling/config\.json: (pooling_mode .* is unknown|several pooling modes)"
    ):
        find_pooling(tmp_path)


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        (["mean_tokens", "max_tokens"], r"several pooling modes are set \(mean_tokens, max_tokens\)"),
        (["median_tokens"], "pooling_mode_median_tokens is unknown; one of mean_tokens, cls_token"),
    ],
)
def test_modes_that_cannot_be_used_are_refused_by_name(modes: list[str], message: str, tmp_path: Path):
    (tmp_path / "1_Pooling").mkdir()
    path = tmp_path / "1_Pooling" / "config.json"
    path.write_text(json.dumps({f"pooling_mode_{mode}": True for mode in modes}))
    with pytest.raises(SourceError, match=message) as refused:
        find_pooling(tmp_path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("name", POOLING_MODES)
def test_padding_is_left_out_and_the_mode_counts(name: str):
    hidden = torch.tensor([[[1.0, 0], [0, 2], [9, 9]], [[3, 1], [2, 5], [4, 2]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = {
        "mean": [[0.5, 1], [3, 8 / 3]],
        "cls": [[1, 0], [3, 1]],
        "max": [[1, 2], [4, 5]],
        "lasttoken": [[0, 2], [4, 2]],
        "weightedmean": [[1 / 3, 4 / 3], [19 / 6, 17 / 6]],
        "mean_sqrt_len_tokens": [[0.5, 1], [3, 8 / 3]],
    }[name]
    unit = torch.nn.functional.normalize(torch.tensor(expected, dtype=torch.float32), dim=-1)
    torch.testing.assert_close(pool(hidden, mask, name), unit)
    if name == "mean":
        assert torch.equal(pool(hidden, mask, None), pool(hidden, mask, name))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ArgumentError, match="pooling mode 'median' is unknown; take mean, cls"):
        pool(torch.zeros(1, 2, 3), torch.ones(1, 2), "median")
