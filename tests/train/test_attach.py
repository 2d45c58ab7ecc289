"""Training of sparse adapters in a loop of one's own: gradients, weights, masks, files, states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import shiradelta
from shiradelta import train
from shiradelta.errors import DeltaError, ShiraDeltaError, TargetError
from shiradelta.train import masks

Loss = Callable[[nn.Module], Tensor]
IDS = torch.randint(0, 60, (4, 9), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60, "hidden_size": 32}


def llama(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(intermediate_size=48, **{**SIZES, **options})).to(dtype)


class Image(nn.Module):
    """What is no language model: convolution, norm, attention whose weights other modules read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Embedding(10, 8, padding_idx=0)
        self.out = nn.Linear(8, 5)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        x = self.norm(self.conv(image)).flatten(2).transpose(1, 2) + self.table(ids)
        return self.out(self.attention(x, x, x)[0]).square().mean()


def image_loss(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(2, 3, 4, 4, generator=generator)
    return model(image, torch.randint(0, 4, (2, 16), generator=generator))


def text_loss(model: nn.Module) -> Tensor:
    return model(**BATCH).loss


def make(kind: str) -> tuple[nn.Module, list[str], Loss]:
    torch.manual_seed(1)
    if kind == "llama":
        return llama(), ["q_proj", "down_proj", "embed_tokens", "norm"], text_loss
    if kind == "tied":
        return llama(tie_word_embeddings=True), ["embed_tokens", "v_proj"], text_loss
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=16)
        return GPT2LMHeadModel(config).eval(), ["c_attn", "c_fc", "c_fc.bias", "ln_1.weight", "wte"], text_loss
    if kind == "experts":
        config = MixtralConfig(intermediate_size=48, num_local_experts=4, num_key_value_heads=2, **SIZES)
        return MixtralForCausalLM(config), ["experts", "gate", "q_proj"], text_loss
    if kind == "image":
        return Image(), ["conv", "norm", "norm.bias", "out_proj", "in_proj_weight", "table", "out.bias"], image_loss
    raise AssertionError(kind)


KINDS = ("llama", "tied", "gpt2", "experts", "image")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shiradelta.nonzeros.weight.CHUNK", 500)


def train_dense(
    model: nn.Module, positions: dict[str, Tensor], loss: Callable[[nn.Module], Tensor], steps: int
) -> None:
    """The same by other means: all weights are parameters, gradients off the mask are set to zero."""
    weights = dict(model.named_parameters())
    optimizer = torch.optim.SGD([weights[name] for name in positions], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        for name, where in positions.items():
            gradient = weights[name].grad.view(-1)
            kept = gradient[where]
            gradient.zero_()[where] = kept
        optimizer.step()


def train_sparse(model: nn.Module, loss: Loss, steps: int, rate: float = 0.5) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        found = loss(model)
        found.backward()
        optimizer.step()
        losses.append(found.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_dense_training_with_masked_gradients(kind: str):
    model, targets, loss = make(kind)
    before = copy.deepcopy(model.state_dict())
    tuner = train.attach(model, 0.25, "rand", targets)
    dense = make(kind)[0]
    train_dense(dense, tuner.positions, loss, 3)
    train_sparse(model, loss, 3)
    found = dict(model.named_parameters())
    for name, expected in dense.named_parameters():
        if name in tuner.positions:
            torch.testing.assert_close(found[name].data, expected.data, rtol=1e-4, atol=1e-6)
            assert not torch.equal(expected.data, before[name])
    tuner.detach()
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(
        torch.equal(after[name], before[name]) for name in before if "running" not in name and "num_" not in name
    )
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_what_was_trained(kind: str, tmp_path: Path):
    model, targets, loss = make(kind)
    tuner = train.attach(model, 0.25, "wm", targets)
    train_sparse(model, loss, 2)
    trained = {name: p.data.clone() for name, p in model.named_parameters() if not name.endswith("_nonzeros")}
    tuner.save(tmp_path / "task.shd", values="f32")
    tuner.detach()
    swap = shiradelta.HotSwap(model)
    report = swap.load("task", tmp_path / "task.shd")
    assert not report.unchecked
    swap.switch("task")
    assert all(torch.equal(p.data, trained[name]) for name, p in model.named_parameters())
    with shiradelta.open_delta(tmp_path / "task.shd") as delta:
        assert delta.metadata["mask"] == "wm"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_folder_gets_the_bits_that_were_trained(dtype: torch.dtype, tmp_path: Path):
    """Those of zeros, too: a pruned model has negative ones, and rows of the embedding no gradient."""
    model = llama(dtype)
    for p in model.parameters():
        p.data[p.abs() < p.abs().median()] = -0.0
    model.save_pretrained(tmp_path / "model")
    tuner = train.attach(model, 0.3, "rand", ["q_proj", "down_proj", "embed_tokens"])
    train_sparse(model, text_loss, 3, rate=0.01)
    tuner.save(tmp_path / "task.shd", values="f32")
    shiradelta.apply(tmp_path / "model", tmp_path / "task.shd")
    weights = dict(model.named_parameters())
    for name, stored in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(stored.view(torch.int16), weights[name].data.view(torch.int16))


@pytest.mark.parametrize(
    "kind", ["llama", "experts", *(pytest.param(k, marks=pytest.mark.slow) for k in ("tied", "gpt2"))]
)
def test_the_file_is_applied_to_a_folder(kind: str, tmp_path: Path):
    model, targets, loss = make(kind)
    model.save_pretrained(tmp_path / "model")
    tuner = train.attach(model, 0.1, "wm", targets)
    train_sparse(model, loss, 2)
    expected = text_loss(model).item()
    tuner.save(tmp_path / "task.shd", values="f32")
    shiradelta.apply(tmp_path / "model", tmp_path / "task.shd")
    assert text_loss(type(model).from_pretrained(tmp_path / "model").eval()).item() == pytest.approx(expected, rel=1e-6)
    assert shiradelta.verify(tmp_path / "model").state == "patched"


@pytest.mark.parametrize("mask", list(masks.MASKS))
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_masks(mask: str, dtype: torch.dtype):
    model = llama(dtype)
    tuner = train.attach(model, 0.05, mask, ["q_proj", "down_proj"], [BATCH, BATCH])
    share = tuner.nnz / tuner.numel
    assert share == pytest.approx(0.05, rel={"rand": 0.2, "struct": 0.6}.get(mask, 0.01))
    first = text_loss(model).item()
    losses = train_sparse(model, text_loss, 5, rate=2.0)
    assert losses[0] == first
    assert losses[-1] < first
    assert {p.dtype for p in tuner.parameters()} == {torch.float32}
    assert all(not p.requires_grad or name.endswith("_nonzeros") for name, p in model.named_parameters())


def test_struct_keeps_the_rank_and_is_cheap():
    positions = masks.rows_and_diagonal((64, 64), 400)
    dense = np.zeros((64, 64))
    dense.reshape(-1)[positions] = np.random.default_rng(0).normal(size=positions.size)
    assert np.linalg.matrix_rank(dense) == 64
    assert abs(positions.size - 400) < 64
    stacked = masks.rows_and_diagonal((3, 8, 8), 3 * 16)
    assert np.array_equal(stacked[stacked < 64], masks.rows_and_diagonal((8, 8), 16))
    assert stacked.size == 3 * masks.rows_and_diagonal((8, 8), 16).size
    assert masks.rows_and_diagonal((50,), 5).size == 5


def test_rand_is_one_element_in_each_cell_of_equal_size():
    for numel, share in (10_000, 0.01), (1999, 0.1), (50, 0.7), (7, 1.0):
        drawn = masks.draw_of(numel, share, "a")
        assert drawn.cells == round(share * numel)
        positions = drawn.positions(numel)
        cells = np.arange(drawn.cells + 1) * numel // drawn.cells
        assert np.array_equal(np.searchsorted(positions, cells[1:]), np.arange(drawn.cells) + 1)
        assert drawn == masks.draw_of(numel, share, "a") != masks.draw_of(numel, share, "b")
    hits = np.bincount(np.concatenate([masks.draw_of(20, 0.5, f"{seed}").positions(20) for seed in range(2000)]))
    assert hits == pytest.approx(1000, abs=120)


def test_rand_avoids_without_drawing_fewer():
    model = llama()
    first = train.attach(model, 0.2, "rand", ["down_proj"])
    taken, count = first.positions, first.nnz
    first.detach()
    second = train.attach(model, 0.2, "rand", ["down_proj"], avoid=[taken], seed=1)
    for name, positions in second.positions.items():
        assert not torch.isin(positions, taken[name]).any()
    assert second.nnz == pytest.approx(count, rel=0.1)


def test_gradient_masks_are_their_definitions(monkeypatch: pytest.MonkeyPatch):
    """One weight at a time, and all at once: the same as from dense gradients."""
    model, other = llama(), {"input_ids": IDS.flip(0), "labels": IDS.flip(0)}
    summed: dict[str, Tensor] = {}
    for batch in (BATCH, other):
        model.zero_grad()
        model(**batch).loss.backward()
        for name, p in model.named_parameters():
            summed[name] = summed.get(name, 0) + p.grad.abs()
    # What a user has there is not counted, and not lost.
    kept = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = kept[name]
    for limit in (1, 1 << 30):
        monkeypatch.setattr("shiradelta.train.gradients.SUMS", limit)
        for mask in ("grad", "snip"):
            tuner = train.attach(model, 0.05, mask, ["k_proj", "up_proj"], [BATCH, other])
            for name, positions in tuner.positions.items():
                score = summed[name] if mask == "grad" else summed[name] * dict(model.named_parameters())[name].abs()
                assert torch.equal(positions, score.view(-1).topk(positions.numel()).indices.sort().values)
            tuner.detach()
    assert all(p.grad is kept[name] and p.requires_grad for name, p in model.named_parameters())
    assert all(bool((grad == 1).all()) for grad in kept.values())
    assert model.training


def test_a_share_of_the_whole_model():
    model = llama()
    tuner = train.attach(model, 0.05, "wm", ["k_proj", "up_proj"], scope="model")
    weights = dict(model.named_parameters())
    every = torch.cat([weights[name].detach().abs().view(-1) for name in tuner.positions])
    kept = torch.cat([weights[name].detach().abs().view(-1)[p] for name, p in tuner.positions.items()])
    assert tuner.nnz == round(0.05 * tuner.numel)
    # Magnitudes that differ by less than 0.8 % count as equal.
    assert kept.min() >= every.topk(tuner.nnz).values.min() * (1 - 2**-7)


@pytest.mark.parametrize("mask", ["rand", "wm", "snip"])
def test_n_of_m(mask: str):
    tuner = train.attach(llama(), "2:10", mask, ["down_proj"], [BATCH])
    for positions in tuner.positions.values():
        chosen = torch.zeros(32 * 48)
        chosen[positions] = 1
        groups = nn.functional.pad(chosen.view(32, 48), (0, 2)).view(32, 5, 10).sum(2)
        assert torch.all(groups == 2)


def test_convolutions_are_matrices_to_patterns():
    """Of [out, in x kernel], not of kernels three elements wide."""
    for layer, mask, sparsity in ((nn.Conv2d(16, 32, 3), "wm", "1:64"), (nn.Conv1d(64, 96, 3), "struct", 0.05)):
        model = nn.Sequential(layer)
        tuner = train.attach(model, sparsity, mask, ["0"])
        (positions,) = tuner.positions.values()
        columns = layer._parameters["weight"][0].numel()
        if mask == "wm":
            assert torch.equal(positions.div(columns, rounding_mode="floor").bincount(), torch.full((32,), 3))
        else:
            assert np.array_equal(positions, masks.rows_and_diagonal((96, 64 * 3), round(0.05 * 96 * 64 * 3)))


@pytest.mark.parametrize(
    "mask", [pytest.param(mask, marks=pytest.mark.slow if mask == "rigsa" else []) for mask in masks.MASKS]
)
def test_masks_apart_from_other_adapters(mask: str, tmp_path: Path):
    model = llama()
    tuner = train.attach(model, 0.1, mask, ["q_proj", "up_proj"], [BATCH])
    first = tuner.positions
    train_sparse(model, text_loss, 2)
    tuner.save(tmp_path / "first.shd")
    tuner.detach()
    for avoid in ([tmp_path / "first.shd"], [first]):
        tuner = train.attach(model, 0.1, mask, ["q_proj", "up_proj"], [BATCH], avoid=avoid)
        for name, positions in tuner.positions.items():
            assert not set(positions.tolist()) & set(first[name].tolist())
            assert len(positions) > 0.05 * 32 * 32
        tuner.detach()


def test_masks_apart_in_stacked_experts(tmp_path: Path):
    """The file names experts one by one, the model has them stacked."""
    model, _, loss = make("experts")
    tuner = train.attach(model, 0.1, "wm", ["experts"])
    first = tuner.positions
    train_sparse(model, loss, 2)
    trained = {name: p[v.detach() != 0] for (name, p), v in zip(first.items(), tuner.parameters(), strict=True)}
    tuner.save(tmp_path / "first.shd")
    with shiradelta.open_delta(tmp_path / "first.shd") as delta:
        assert any(".experts.3.w1.weight" in name for name in delta)
    tuner.detach()
    tuner = train.attach(model, 0.1, "wm", ["experts"], avoid=[tmp_path / "first.shd"])
    for name, positions in tuner.positions.items():
        assert trained[name].numel() > 100
        assert not set(positions.tolist()) & set(trained[name].tolist())


def test_own_masks():
    model = llama()
    weights = dict(model.named_parameters())
    name, other = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    chosen = weights[name] > 0.03
    tuner = train.attach(model, mask={name: chosen, other: [5, 3]}, targets=["q_proj"])
    assert torch.equal(tuner.positions[name], chosen.view(-1).nonzero().view(-1))
    assert tuner.positions[other].tolist() == [3, 5]
    tuner.detach()
    tuner = train.attach(model, mask={other: [7, 5, 3]}, targets=["q_proj"], avoid=[{other: [5]}])
    assert tuner.positions[other].tolist() == [3, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_porj"]}, r"'q_porj' is neither a layer.*q_proj"),
        ({"targets": ["q_proj", "attn.k_proj"]}, r"'attn.k_proj'.*self_attn.k_proj"),
        ({"targets": r".*\.nothing"}, "neither a layer nor a weight"),
        ({"targets": "*.q_proj"}, "not a regular expression"),
        ({"sparsity": 0.0001, "targets": ["norm"]}, "none of its 32 elements"),
        ({"sparsity": 1.5}, "not a share"),
        ({"sparsity": "3:2"}, "not a pattern"),
        ({"sparsity": None}, "give a share such as 0.01"),
        ({"targets": []}, "targets is empty"),
        ({"sparsity": "1:8", "scope": "model"}, "scope"),
        ({"mask": "magic"}, "unknown"),
        ({"mask": "struct", "scope": "model"}, "struct"),
        ({"mask": "snip"}, "calibration set is empty"),
        ({"mask": "grad", "calibration": [{"input_ids": IDS}]}, "no loss"),
        ({"mask": {"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3, dtype=torch.bool)}}, r"\[3, 3\].*\[48, 32\]"),
        ({"mask": {"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.bool)}}, "no element"),
        ({"mask": {"model.layers.0.mlp.up_proj.weight": [1, 1]}}, "twice"),
        ({"mask": {"model.layers.0.mlp.up_proj.weight": [10**6]}}, "outside"),
        ({"mask": {"model.layers.0.mlp.up_proj.weight": [0.5]}}, "integer"),
        ({"mask": {"up": [1]}}, "none of the targets"),
        ({"mask": {}}, "empty"),
        ({"mask": [1, 2]}, "give a mask's name, or a mapping"),
        ({"mask": "snip", "calibration": BATCH}, "one batch"),
        ({"avoid": [5]}, "avoid"),
        ({"avoid": ["a.shd"], "start": "b.shd"}, "give one of both"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DeltaError, match=message):
        train.attach(model, **{"mask": "rand", **options})
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "_shiradelta")


def test_bases_that_cannot_be_trained_in_place():
    class Packed(nn.Parameter):
        pass

    Packed.__module__ = "quantiser"
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = Packed(torch.zeros(48, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TargetError, match="quantised"):
        train.attach(model, mask="rand", targets=["up_proj"])
    train.attach(model, 0.1, mask="rand", targets=["q_proj"]).detach()
    del model.model.layers[0].self_attn.q_proj.weight  # as methods do that keep packed weights in buffers
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(DeltaError, match="the model is quantised"):
        train.attach(model, 0.1, mask="rand", targets=["layers.0.self_attn.q_proj"])
    model = llama().double()
    with pytest.raises(TargetError, match="float64"):
        train.attach(model, mask="rand")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=48, **SIZES))
    with pytest.raises(TargetError, match="meta"):
        train.attach(model, mask="rand")


def test_gradients_that_are_not_finite():
    model = llama()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ShiraDeltaError, match="NaN or infinity on the calibration set"):
        train.attach(model, 0.1, "snip", ["q_proj"], [BATCH])
    assert all(p.grad is None for p in model.parameters())
    model = llama()
    tuner = train.attach(model, 0.1, "wm", ["q_proj"])
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    tuner.parameters()[0].data.fill_(torch.nan)
    with pytest.raises(DeltaError, match="NaN or infinity"):
        tuner.save("nowhere.shd")
    tuner.detach()
    assert torch.equal(before, model.model.layers[0].self_attn.q_proj.weight)


def test_weights_without_a_part_in_the_loss():
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model[0](batch).sum()

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(ShiraDeltaError, match=r"'1.weight' has no part"):
        train.attach(model, 0.1, "snip", ["1"], [torch.ones(2, 16)], loss=loss)
    with train.attach(model, 0.1, "snip", calibration=[torch.ones(2, 16)], loss=loss) as tuner:
        assert list(tuner.positions) == ["0.weight"]


@pytest.mark.slow
def test_what_is_saved_is_how_far_from_what_was_trained(tmp_path: Path):
    model, targets, loss = make("experts")  # whose tensors lie otherwise in the file
    tuner = train.attach(model, 0.1, "wm", targets)
    train_sparse(model, loss, 2)
    missed = {values: tuner.save(tmp_path / f"{values}.shd", values) for values in ("f32", "int8", "int4", "sign")}
    assert missed["f32"] == 0 < missed["int8"] < 0.01 < missed["int4"] < 0.15 < missed["sign"] < 1
    assert tuner.save(tmp_path / "again.shd") == missed["int4"]
    model.bfloat16()
    with pytest.raises(DeltaError, match="cast the model first"):
        tuner.save(tmp_path / "cast.shd")
    assert not (tmp_path / "cast.shd").exists()


def test_values_are_float32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
        tuner = train.attach(model, np.float32(0.5), "rand", ["0", "1"])
        model(torch.arange(10)).square().sum().backward()
        model(torch.zeros(0, dtype=torch.long)).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {values.dtype for values in tuner.values.values()} == {torch.float32}
    assert all(values.grad is not None and values.grad.dtype == torch.float32 for values in tuner.values.values())


def test_own_masks_follow_the_models_order():
    """Gradients are clipped by sums in this order, which a resumed run has to keep."""
    model = llama()
    tuner = train.attach(model, 0.1, "rand", ["q_proj", "down_proj"])
    masks, order = tuner.positions, list(tuner.positions)
    tuner.detach()
    tuner = train.attach(model, mask={name: masks[name] for name in reversed(order)}, targets=["q_proj", "down_proj"])
    assert list(tuner.positions) == order


def test_one_tuner_at_a_time():
    model = llama()
    with train.attach(model.model, 0.1, "wm", ["q_proj"]), pytest.raises(TargetError, match="part of it"):
        train.attach(model, 0.1, "wm")
    with train.attach(model, 0.1, "wm", ["q_proj"]) as tuner:
        with pytest.raises(TargetError, match="part of it"):
            train.attach(model.model, 0.1, "wm")
        with pytest.raises(TargetError, match="already"):
            train.attach(model, 0.1, "wm")
        with pytest.raises(DeltaError, match="nothing was trained"):
            tuner.save("nowhere.shd")
        assert "192" in repr(tuner) or f"{tuner.nnz:,}" in repr(tuner)
    with train.attach(nn.Sequential(nn.Linear(8, 8))) as tuner:
        assert repr(tuner).endswith("in 1 tensor>")
    with pytest.raises(DeltaError, match="detached"):
        tuner.write()
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
