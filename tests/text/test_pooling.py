"""How token vectors become an embedding, as sentence-transformers' files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shiradelta.text.pooling import find_pooling


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
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
