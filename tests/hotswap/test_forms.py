"""HotSwap where a checkpoint holds weights in another form than memory: fused, stacked, interleaved, transposed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import shiradelta as sd
from shiradelta import HotSwap
from shiradelta.errors import BaseMismatchError, TargetError
from tests import BRIEF
from tests.swapping import BACKENDS, BACKENDS_IN_TIME, DEVICE, GPU, adapter, bits, formula, random_delta

transformers = pytest.importorskip("transformers", minversion="5.0")
loading = pytest.importorskip("transformers.core_model_loading")

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), pytest.mark.slow]

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
DECODER = {**SMALL, "num_key_value_heads": 2}


def nomic() -> Any:
    """Queries, keys and values are one tensor on disk."""
    return transformers.NomicBertModel(transformers.NomicBertConfig(**SMALL))


def gte() -> Any:
    """Biases are fused, too."""
    return transformers.GteModel(transformers.GteConfig(**SMALL))


def dinov2() -> Any:
    """Both halves of a SwiGLU are one tensor on disk."""
    sizes = {name: size for name, size in SMALL.items() if name not in ("vocab_size", "intermediate_size")}
    config = transformers.Dinov2Config(**sizes, image_size=28, patch_size=14, use_swiglu_ffn=True)
    return transformers.Dinov2Model(config)


def mixtral() -> Any:
    """Experts are stacked in memory."""
    config = transformers.MixtralConfig(**{**DECODER, "num_hidden_layers": 1}, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


def llama(*conversions: Any) -> Any:
    """A model that transformers loads with these conversions."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, tie_word_embeddings=True))
    model._weight_conversions = list(conversions) or None
    return model


def rearranged() -> Any:
    """Elements lie in another order in memory; two weights are split along their columns on disk."""

    def converter(stored: Any, weights: Any, *operations: Any) -> Any:
        return loading.WeightConverter(source_patterns=stored, target_patterns=weights, operations=list(operations))

    return llama(
        converter(
            "mlp.w13.weight",
            ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            loading.Interleave(dim=0),
            loading.Chunk(dim=0),
        ),
        converter("attn.q.weight", "self_attn.q_proj.weight", loading.PermuteForRope()),
        converter("attn.o.weight", "self_attn.o_proj.weight", loading.Transpose(0, 1)),
        converter(["mlp.a.weight", "mlp.b.weight"], "mlp.down_proj.weight", loading.Concatenate(dim=1)),
        loading.WeightRenaming("attn.k.weight", "self_attn.k_proj.weight"),
    )


#: The forms are undone on loading, before any backend: Triton's interpreter, which is slow, takes the model with most
#: forms, and in CI one model of each kind.
MODELS = [
    pytest.param(make, *backend.values, marks=backend.marks)
    for make, backend in product((nomic, mixtral, rearranged, gte, dinov2, llama), BACKENDS)
    if backend.values != ("triton",) or GPU or make is rearranged or (make in (nomic, mixtral) and not BRIEF)
]


@pytest.fixture(autouse=True)
def the_same_weights() -> None:
    torch.manual_seed(0)


def placed(make: Callable[[], Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    return make().to(DEVICE, dtype)


def saved(model: Any, folder: Path) -> dict[str, np.ndarray]:
    """The bits of what transformers writes as the model's checkpoint."""
    model.save_pretrained(folder)
    return {name: bits(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}


class Case:
    """A model, its checkpoint, and deltas of all of the checkpoint's tensors."""

    def __init__(self, model: Any, folder: Path, dtype: str = "bfloat16") -> None:
        self.model, self.folder, self.dtype = model, folder, dtype
        self.base = saved(model, folder / "base")
        self.shapes = shapes(folder / "base")

    def delta(self, seed: int, values: str = "int8", op: str = "add") -> bytes:
        return adapter(dict(self._deltas(seed, op)), values)

    def _deltas(self, seed: int, op: str) -> Iterator[tuple[str, sd.TensorDelta]]:
        for i, (name, shape) in enumerate(self.shapes.items()):
            count = max(1, int(np.prod(shape)) // 10)
            made = random_delta(shape, count, 100 * seed + i, self.dtype, op)
            base = self.base[name][made.positions()]
            payload = made.bits() if op == "set" else made.values()
            yield name, sd.TensorDelta(shape, made.positions(), payload, self.dtype, op, base)

    def check(self, *active: tuple[bytes, float]) -> None:
        """The checkpoint is that of a folder with the deltas in it."""
        now = saved(self.model, self.folder / "now")
        for name, before in self.base.items():
            assert np.array_equal(now[name], formula(before, self.dtype, list(active), name)), name


@pytest.mark.parametrize(("make", "backend"), MODELS)
def test_a_model_gets_what_its_folder_would(make: Callable[[], Any], backend: str, tmp_path: Path):
    case = Case(placed(make), tmp_path)
    one, two = case.delta(1, "int8"), case.delta(2, "f16")
    swap = HotSwap(case.model, backend=backend)
    report = swap.load("one", one)
    assert report.matched.keys() == case.base.keys()
    assert (report.unmatched, report.unchecked) == ((), ())
    assert report.nonzeros == sd.open_delta(one).nnz
    swap.switch("one", 0.5)
    case.check((one, 0.5))
    assert swap.load("two", two).unchecked == ()  # the base is compared below what is active
    swap.switch({"one": 2.0, "two": -1.0})
    case.check((one, 2.0), (two, -1.0))
    swap.switch("two", 0.25)
    case.check((two, 0.25))
    swap.revert()
    case.check()
    assert swap.changed() == 0


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_elements_are_set_below_what_is_added(backend: str, tmp_path: Path):
    case = Case(placed(rearranged), tmp_path)
    files = {"set": case.delta(1, op="set"), "add": case.delta(2, "int4")}
    swap = HotSwap(case.model, backend=backend)
    for name, data in files.items():
        swap.load(name, data)
    swap.switch({"set": 1.0, "add": 0.5})
    case.check((files["set"], 1.0), (files["add"], 0.5))
    swap.revert()
    case.check()


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_one_weight_takes_two_operations_of_one_file(backend: str, tmp_path: Path):
    """Its halves are two tensors on disk: one is set, the other is added to."""
    case = Case(placed(rearranged), tmp_path)
    halves = [f"model.layers.0.mlp.{half}.weight" for half in "ab"]
    made = [dict(case._deltas(i, op))[name] for i, (name, op) in enumerate(zip(halves, ("set", "add"), strict=True))]
    data = adapter(dict(zip(halves, made, strict=True)))
    swap = HotSwap(case.model, backend=backend)
    assert swap.load("a", data).unchecked == ()
    swap.switch("a")
    case.check((data, 1.0))
    swap.revert()
    case.check()


@pytest.mark.parametrize(
    ("make", "backend"), [case for case in MODELS if case.values[0] is rearranged or case.values == (nomic, "numpy")]
)
def test_the_base_is_compared_in_the_checkpoints_order(make: Callable[[], Any], backend: str, tmp_path: Path):
    case = Case(placed(make), tmp_path)
    data = case.delta(1)
    HotSwap(case.model, backend=backend).load("a", data)
    swap = HotSwap(case.model, backend=backend)
    swap.load("a", data)
    swap.switch("a")
    with pytest.raises(BaseMismatchError, match="already holds the result"):
        HotSwap(case.model, backend=backend).load("b", data)
    swap.revert()
    for name, weight in case.model.named_parameters():
        if name.endswith(("1.self_attn.v_proj.weight", "1.mlp.up_proj.weight", "1.self_attn.o_proj.weight")):
            before = weight.detach().clone()
            with torch.no_grad():
                weight.copy_(before.flip(0))
            with pytest.raises(BaseMismatchError, match="is not the one that the delta was made against"):
                HotSwap(case.model, backend=backend).load("c", data)
            assert len(HotSwap(case.model, backend=backend).load("c", data, check=False).unchecked) == len(case.base)
            with torch.no_grad():
                weight.copy_(before)


def test_a_new_base_is_compared_in_the_checkpoints_order(tmp_path: Path):
    case = Case(placed(nomic), tmp_path)
    base = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    swap = HotSwap(case.model)
    swap.load("a", case.delta(1))
    swap.switch("a")
    patched = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    flipped = {name: tensor.flip(0) if name.endswith("v_proj.weight") else tensor for name, tensor in base.items()}
    for other, message in ((patched, "already holds the result"), (flipped, "is not the one that the delta was made")):
        case.model.load_state_dict(other)
        with pytest.raises(BaseMismatchError, match=message):
            swap.rebase()
    case.model.load_state_dict(base)
    assert swap.rebase().unchecked == {"a": ()}
    swap.switch("a")
    swap.revert()
    case.check()


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_successors_are_compared_in_the_checkpoints_order(backend: str, tmp_path: Path):
    case = Case(placed(rearranged), tmp_path)
    swap = HotSwap(case.model, backend=backend)
    states = [base := case.base]
    for step in range(3):
        data = case.delta(step)
        case.base = {name: formula(elements, case.dtype, [(data, 1.0)], name) for name, elements in states[-1].items()}
        states.append(case.base)
        report = swap.load(str(step), data)
        assert (report.beneath, report.unchecked) == (swap.active, ())
        swap.switch(str(step))
        case.check()
    for step in (0, 2, 1):
        swap.switch(str(step))
        case.base = states[step + 1]
        case.check()
    swap.revert()
    case.base = base
    case.check()


def test_names_of_the_checkpoint_and_of_memory_meet_in_one_weight(tmp_path: Path):
    case = Case(placed(nomic), tmp_path)
    data = case.delta(1, "f32")
    own = {n: tuple(w.shape) for n, w in case.model.named_parameters()}
    name = next(name for name in own if name.endswith("1.self_attn.k_proj.weight"))
    other = adapter({name: random_delta(own[name], 99, 5)})
    swap = HotSwap(case.model)
    swap.load("a", data)
    swap.load("b", other)
    assert swap.switch({"a": 1.0, "b": 1.0}).nonzeros == sd.open_delta(data).nnz + 99
    weight = dict(case.model.named_parameters())[name]
    both = bits(weight)
    swap.switch("a")
    first = bits(weight)
    assert 0 < np.count_nonzero(both != first) <= 99
    swap.revert()
    case.check()
    fused = next(n for n in case.shapes if n.endswith("layers.1.attn.Wqkv.weight"))
    clash = adapter({fused: random_delta(case.shapes[fused], 40, 1), name: random_delta(own[name], 9, 5)})
    with pytest.raises(BaseMismatchError, match=rf"'{fused}' changes the model's weight '{name}', as tensor '{name}'"):
        swap.load("c", clash)


def test_values_keep_their_codec_if_it_takes_them_one_by_one(tmp_path: Path):
    """Others would be rounded anew among new neighbours, so they are held as float32."""
    case = Case(placed(nomic), tmp_path)
    sizes = {}
    for values in ("f32", "f16", "int8"):
        swap = HotSwap(case.model, backend="numpy")
        data = adapter({n: d for n, d in case._deltas(1, "add") if "Wqkv" in n}, values)
        swap.load("a", data)
        sizes[values] = swap.nbytes
    assert sizes["f16"] < sizes["int8"] == sizes["f32"]


def test_a_pipeline_of_models(tmp_path: Path):
    case = Case(placed(nomic), tmp_path)
    data = adapter({f"encoder/{name}": delta for name, delta in case._deltas(1, "add")})
    swap = HotSwap({"encoder": case.model, "scheduler": object()})
    assert swap.load("a", data).unchecked == ()
    swap.switch("a")
    now = saved(case.model, tmp_path / "now")
    for name, before in case.base.items():
        assert np.array_equal(now[name], formula(before, "bfloat16", [(data, 1.0)], f"encoder/{name}")), name


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own, of transformers
def test_a_model_inside_peft(tmp_path: Path):
    peft = pytest.importorskip("peft")
    case = Case(placed(nomic), tmp_path)
    data = case.delta(1)
    inner = {name: weight for name, weight in case.model.named_parameters() if "self_attn" in name}
    before = {name: bits(weight) for name, weight in inner.items()}
    swap = HotSwap(case.model)
    swap.load("a", data)
    swap.switch("a")
    wanted = {name: bits(weight) for name, weight in inner.items()}
    swap.revert()
    wrapped = peft.get_peft_model(case.model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    swap = HotSwap(wrapped)
    assert swap.load("a", data).unmatched == ()
    swap.switch("a")
    assert all(np.array_equal(bits(weight), wanted[name]) for name, weight in inner.items())
    swap.revert()
    assert all(np.array_equal(bits(weight), before[name]) for name, weight in inner.items())


def test_parts_that_cannot_be_written_are_refused(tmp_path: Path):
    case = Case(placed(nomic), tmp_path)
    data = case.delta(1)
    layer = case.model.layers[1].self_attn
    keys = layer.k_proj.weight
    layer.k_proj.weight = torch.nn.Parameter(keys.detach().float())
    with pytest.raises(TargetError, match=r"Wqkv\.weight' consists of weights of different dtypes \(bfloat16, float32"):
        HotSwap(case.model).load("a", data)
    layer.k_proj.weight = torch.nn.Parameter(keys.detach().to("meta"))
    with pytest.raises(TargetError, match=r"Wqkv\.weight' is on the meta device"):
        HotSwap(case.model).load("a", data)


def test_a_part_that_is_moved_is_noticed(tmp_path: Path):
    case = Case(placed(nomic), tmp_path)
    swap = HotSwap(case.model)
    swap.load("a", case.delta(1))
    case.model.layers[0].self_attn.v_proj.weight = torch.nn.Parameter(
        case.model.layers[0].self_attn.v_proj.weight.detach().clone()
    )
    with pytest.raises(TargetError, match=r"v_proj\.weight' was moved or replaced"):
        swap.switch("a")


def test_weights_with_other_strides_are_the_checkpoints_all_the_same(tmp_path: Path):
    """channels_last, as vision models are run."""
    sizes = {name: size for name, size in SMALL.items() if name != "vocab_size"}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).bfloat16()
    case = Case(model.to(memory_format=torch.channels_last), tmp_path)
    data = case.delta(1)
    swap = HotSwap(case.model)
    swap.load("a", data)
    swap.switch("a")
    case.check((data, 1.0))
