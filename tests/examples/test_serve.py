"""The example service: batches, switches, answers."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import shiradelta as sd
from examples.serve.batches import Batcher
from tests.swapping import adapter, random_delta


@pytest.fixture
def session() -> tuple[sd.HotSwap, torch.Tensor]:
    weight = torch.zeros(4, 3)
    swap = sd.HotSwap({"w": weight})
    for i in (1, 2):
        delta = sd.TensorDelta((4, 3), [0], [float(i)], "float32")
        swap.load(f"add{i}", adapter({"w": delta}, "f32"))
    return swap, weight


def test_requests_are_grouped_by_adapter(session: tuple[sd.HotSwap, torch.Tensor]):
    swap, weight = session
    sizes: list[int] = []

    def compute(texts: list[str]) -> list[list[float]]:
        sizes.append(len(texts))
        return [[float(weight[0, 0]), float(len(text))] for text in texts]

    batcher = Batcher(swap, compute, most=4)
    wanted = ["add1", "add2", None] * 6
    futures = [batcher.submit(["x" * i], name) for i, name in enumerate(wanted)]
    batcher.close()
    answers = [future.result() for future in futures]
    expected = {"add1": 1.0, "add2": 2.0, None: 0.0}
    assert [answer.vectors for answer in answers] == [[[expected[n], float(i)]] for i, n in enumerate(wanted)]
    assert max(sizes) <= 4
    assert len(sizes) < len(wanted)
    with pytest.raises(sd.ShiraDeltaError, match="'other' is not loaded"):
        batcher.submit(["x"], "other")


def test_a_request_that_was_given_up_does_not_stop_the_others(session: tuple[sd.HotSwap, torch.Tensor]):
    begun, go_on = threading.Event(), threading.Event()

    def compute(texts: list[str]) -> list[list[float]]:
        begun.set()
        go_on.wait(10)
        return [[1.0]] * len(texts)

    batcher = Batcher(session[0], compute)
    first = batcher.submit(["a"])
    begun.wait(10)
    given_up, last = batcher.submit(["b"]), batcher.submit(["c"])
    assert given_up.cancel()
    assert not first.cancel()
    go_on.set()
    assert last.result(10).batch == 1
    assert first.result(10).batch == 1
    batcher.close()


def test_a_failing_batch_fails_its_requests_alone(session: tuple[sd.HotSwap, torch.Tensor]):
    def compute(texts: list[str]) -> list[list[float]]:
        if texts == ["bad"]:
            raise ValueError("no")
        return [[1.0]]

    batcher = Batcher(session[0], compute)
    with pytest.raises(ValueError, match="no"):
        batcher.submit(["bad"]).result()
    assert batcher.submit(["good"], "add1").result().vectors == [[1.0]]
    batcher.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_service(session: tuple[sd.HotSwap, torch.Tensor]):
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    from examples.serve.app import make_app

    swap, weight = session
    with TestClient(make_app(swap, lambda texts: [[float(weight[0, 0])] for _ in texts])) as client:
        answer = client.post("/embed", json={"texts": ["a", "b"], "adapter": "add2"}).json()
        assert answer["vectors"] == [[2.0], [2.0]]
        assert answer["switch_ms"] > 0
        assert client.post("/embed", json={"texts": ["a"]}).json()["vectors"] == [[0.0]]
        assert client.post("/embed", json={"texts": ["a"], "adapter": "none"}).status_code == 404
        assert client.get("/adapters").json()["loaded"]["add1"]["nonzeros"] == 1


@pytest.mark.slow
def test_a_real_model(tmp_path: Path):
    """A tiny BERT with a tokenizer of its own."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("fastapi")
    from examples.serve.app import open_model

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=7
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    model, embed = open_model(tmp_path, "cpu")
    before = embed(["a b", "b"])
    assert [len(vector) for vector in before] == [8, 8]
    swap = sd.HotSwap(model)
    swap.load("x", adapter({"encoder.layer.0.output.dense.weight": random_delta((8, 8), 20, 1, "float32")}))
    with swap.applied("x"):
        assert embed(["a b", "b"]) != before
    assert embed(["a b", "b"]) == before
