"""The example service's model: a tiny BERT with a tokenizer of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import shiradelta as sd
from tests.swapping import adapter, random_delta


@pytest.mark.slow
def test_a_real_model(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    from examples.serve.limits import Limits
    from examples.serve.model import Embedder

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        vocab_size=7,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    embedder = Embedder(tmp_path)

    def embed(*texts: str) -> list[list[float]]:
        return embedder.compute(embedder.tokenize(texts))

    before = embed("a b", "b")
    assert [len(vector) for vector in before] == [8, 8]
    assert embed("b")[0] == pytest.approx(before[1], abs=1e-6)
    assert len(embedder.tokenize(["a " * 1000])[0]) == 16
    assert len(Embedder(tmp_path, limits=Limits(tokens=5)).tokenize(["a " * 1000])[0]) == 5
    assert embed("a " * 1000, "")
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(embedder.tokenize, [["a b"] * n for n in range(1, 65)]))
    assert [len(one) for one in found] == list(range(1, 65))
    swap = sd.HotSwap(embedder.model)
    swap.load("x", adapter({"encoder.layer.0.output.dense.weight": random_delta((8, 8), 20, 1, "float32")}))
    with swap.applied("x"):
        assert embed("a b", "b") != before
    assert embed("a b", "b") == before
