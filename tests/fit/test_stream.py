"""The closed form, layer by layer: to the byte what it gives with the whole model in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import shiradelta
from shiradelta.fit import Fit
from shiradelta.fit.refit import hidden_states, stream
from shiradelta.fit.refit.skeleton import CannotStreamError
from tests.fit.test_fit import build, texts, write_tokenizer

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
LAYERS = {**SIZES, "num_hidden_layers": 3, "max_position_embeddings": 32, "initializer_range": 0.2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
LLAMA = {**LAYERS, **TOKENS, "num_key_value_heads": 1}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=2, n_positions=32, **TOKENS)
    return transformers.GPT2LMHeadModel(config)


def gemma3() -> nn.Module:
    """Local and global attention: not all layers are called with the same mask."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(**LLAMA, head_dim=16, sliding_window=4, layer_types=kinds)
    return transformers.Gemma3ForCausalLM(config)


def opt(embedding: int) -> nn.Module:
    config = transformers.OPTConfig(**LAYERS, **TOKENS, ffn_dim=64, word_embed_proj_dim=embedding)
    return transformers.OPTForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: build("encoder"),
    "classifier": lambda: build("classifier"),
    "causal": lambda: build("causal"),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": gpt2,
    "gemma3": gemma3,
    "opt": lambda: opt(32),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, num_local_experts=2)),
    "nomic": lambda: transformers.NomicBertModel(transformers.NomicBertConfig(**LAYERS, pad_token_id=0)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=64, dim=32, n_layers=3, n_heads=2, hidden_dim=64)
    ),
}
#: Models that cannot be run so, and why.
WHOLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "albert": (
        lambda: transformers.AlbertModel(transformers.AlbertConfig(**LAYERS, embedding_size=16)),
        "it has no list of layers",
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_pair(model: nn.Module, root: Path, **options: Any) -> tuple[Path, Path]:
    """A base and a fine-tune of it, of which embeddings and norms changed, too."""
    model.save_pretrained(root / "base", **options)
    write_tokenizer(root / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += 0.04 * torch.randn(len(parameter), 2) @ torch.randn(2, parameter.shape[1])
            else:
                parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(root / "tuned", **options)
    return root / "base", root / "tuned"


#: Three batches, and one held out: the time goes by the number of batches.
SETTINGS = Fit(texts(), method="refit", batch=40, held_out=24, device="cpu")


def refit(pair: tuple[Path, Path], out: Path, **options: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    settings = replace(SETTINGS, log=said.append)
    report = shiradelta.convert(pair[1], out, **{"sparsity": 0.05, **options}, base=pair[0], fit=settings)
    return report, said


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def cannot(*arguments: object) -> None:
        raise CannotStreamError("the test wants it")

    return lambda: monkeypatch.setattr(stream, "stream", cannot)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("gemma3", "gpt2", "nomic") else name for name in MODELS],
)
def test_it_is_what_the_whole_model_gives(name: str, tmp_path: Path, whole: Callable[[], None]):
    torch.manual_seed(0)
    pair = write_pair(MODELS[name](), tmp_path)
    streamed, said = refit(pair, tmp_path / "a.shd")
    assert "one in memory at a time" in said[0]
    whole()
    loaded, said = refit(pair, tmp_path / "b.shd")
    assert "loaded as a whole, for the test wants it" in said[0]
    assert (tmp_path / "a.shd").read_bytes() == (tmp_path / "b.shd").read_bytes()
    assert streamed.fit.fitted < min(streamed.fit.topk, streamed.fit.base)
    for distance in ("base", "topk", "fitted"):
        assert getattr(streamed.fit, distance) == getattr(loaded.fit, distance)


def test_shards_mapped_files_and_a_pooled_mask(
    tmp_path: Path, whole: Callable[[], None], monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    pair = write_pair(MODELS["causal"](), tmp_path, max_shard_size="20KB")
    assert len(list(pair[0].glob("*.safetensors"))) > 3
    monkeypatch.setattr(hidden_states, "MEMORY", 0)
    before = set(tmp_path.iterdir())
    refit(pair, tmp_path / "a.shd", scope="model", values="int8")
    assert set(tmp_path.iterdir()) == before | {tmp_path / "a.shd"}
    monkeypatch.setattr(hidden_states, "MEMORY", 1 << 30)
    refit(pair, tmp_path / "b.shd", scope="model", values="int8")
    assert (tmp_path / "a.shd").read_bytes() == (tmp_path / "b.shd").read_bytes()


@pytest.mark.parametrize("name", WHOLE)
def test_others_are_loaded_as_a_whole(name: str, tmp_path: Path):
    torch.manual_seed(0)
    model, why = WHOLE[name]
    pair = write_pair(model(), tmp_path)
    report, said = refit(pair, tmp_path / "a.shd")
    assert "loaded as a whole" in said[0]
    assert why in said[0]
    assert report.fit.fitted < report.fit.base


@pytest.mark.parametrize("model", [MODELS["encoder"], lambda: opt(16)], ids=["encoder", "linear layer at the start"])
def test_the_file_gives_the_distance_that_was_measured(model: Callable[[], nn.Module], tmp_path: Path):
    torch.manual_seed(0)
    base, tuned = write_pair(model(), tmp_path)
    report, _ = refit((base, tuned), tmp_path / "a.shd")
    shiradelta.apply(base, tmp_path / "a.shd", out=tmp_path / "patched")
    again = shiradelta.convert(
        tuned, tmp_path / "b.shd", 0.05, tmp_path / "patched", fit=replace(SETTINGS, method="refit")
    )
    assert again.fit.base == pytest.approx(report.fit.fitted, rel=1e-5)


def test_a_head_that_only_the_fine_tune_has(tmp_path: Path, whole: Callable[[], None]):
    """It is added whole, for the student as for its teacher."""
    torch.manual_seed(0)
    pair = write_pair(MODELS["classifier"](), tmp_path)
    shutil.rmtree(pair[0])
    torch.manual_seed(0)
    MODELS["encoder"]().save_pretrained(pair[0])
    write_tokenizer(pair[0])
    report, said = refit(pair, tmp_path / "a.shd")
    assert "one in memory" in said[0]
    assert {t.name for t in report.tensors if t.op == "new"} == {"classifier.weight", "classifier.bias"}
    whole()
    refit(pair, tmp_path / "b.shd")
    assert (tmp_path / "a.shd").read_bytes() == (tmp_path / "b.shd").read_bytes()


def test_one_layer_has_weights_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    pair = write_pair(MODELS["gemma3"](), tmp_path)
    filled: list[int] = []
    run = stream._Stream._run

    def counted(self: Any, index: int, part: Any) -> torch.Tensor:
        blocks = [all(not p.is_meta for p in block.parameters()) for block in self._blocks]
        filled.append(sum(blocks))
        assert blocks[index]
        return run(self, index, part)

    monkeypatch.setattr(stream._Stream, "_run", counted)
    refit(pair, tmp_path / "a.shd")
    assert set(filled) == {1}


def test_calls_are_the_same_only_if_nothing_in_them_differs():
    cache = object()
    call = ((torch.ones(2), None), {"flag": True, "scale": 0.5, "mode": "a", "dtype": torch.float16, "cache": cache})
    again = ((torch.ones(2), None), {"flag": True, "scale": 0.5, "mode": "a", "dtype": torch.float16, "cache": cache})
    assert stream._same(call, again)
    changes = {"flag": False, "scale": 1, "mode": "b", "dtype": torch.bfloat16, "cache": object()}
    for name, value in changes.items():
        assert not stream._same(call, (call[0], {**call[1], name: value})), name
    for arguments in ((torch.zeros(2), None), (torch.ones(2), 1), (torch.ones(2),), [torch.ones(2), None]):
        assert not stream._same(call, (arguments, call[1]))
