"""Models and tokenizers of strangers: what they name is loaded, what they bring along is not run."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import shiradelta as sd
from shiradelta.models.loading import load_model, load_tokenizer

transformers = pytest.importorskip("transformers")
CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import BertConfig, BertModel, BertTokenizer
class Mine(BertTokenizer): pass
class MyConfig(BertConfig): pass
class MyModel(BertModel): pass
"""
MAP = {"AutoTokenizer": ["code.Mine", None], "AutoConfig": "code.MyConfig", "AutoModel": "code.MyModel"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with code of its own, which leaves a file `ran`; whoever is asked says yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "model"
    home.mkdir()
    (home / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    (home / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Mine", "auto_map": MAP}))
    config: dict[str, Any] = {"model_type": "mine", "architectures": ["BertModel"], "auto_map": MAP}
    (home / "config.json").write_text(json.dumps(config))
    (home / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return home


def test_a_models_own_code_is_never_run_whatever_the_user_answers(folder: Path):
    with pytest.raises(sd.SourceError, match="contains custom code"):
        load_tokenizer(folder)
    with pytest.raises(sd.SourceError, match="contains custom code"):
        load_model(folder, folder, [torch.device("cpu")], torch.float32)
    assert not (folder.parent / "ran").exists()


def test_pickled_weights_are_not_read(tmp_path: Path):
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=7
    )
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path)
    torch.save(transformers.BertModel(config).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(sd.SourceError, match="safetensors"):
        load_model(tmp_path, tmp_path, [torch.device("cpu")], torch.float32)
