"""`export`: each layout is loaded by the library that it is meant for, and gives the same weights or outputs."""

from __future__ import annotations

import copy
import json
import shutil
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import shiradelta as sd
from benchmarks.sources.peft_types import small_model
from shiradelta.cli import main
from shiradelta.errors import ArgumentError, BaseMismatchError, DeltaError, LimitError, SourceError, TargetError
from shiradelta.exports import EXPORTS
from shiradelta.exports.low_rank import factors_of
from shiradelta.exports.peft_supertuning import count_of, sparsity_of
from shiradelta.format.arithmetic import add
from shiradelta.format.delta import TensorDelta
from tests.conftest import read
from tests.scenes import contents

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model().eval()


@pytest.fixture(scope="module")
def root(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, a Llama; linear.shd, a delta of its linear layers; all.shd, one of all tensors."""
    root = tmp_path_factory.mktemp("exports")
    model.save_pretrained(root / "base")
    tuned, every = copy.deepcopy(model), copy.deepcopy(model)
    for name, weight in tuned.named_parameters():
        if "proj" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    for weight in every.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    for name, some in (("linear", tuned), ("all", every)):
        some.save_pretrained(root / name)
        sd.convert(root / name, root / f"{name}.shd", 0.02, root / "base", "f32")
    return root


def tokens() -> torch.Tensor:
    return torch.arange(12)[None]


def loaded(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(model), adapter)


def need(layout: str) -> None:
    """Skips a test of an adapter that the installed PEFT does not know."""
    from peft import PeftType

    if not hasattr(PeftType, layout.removeprefix("peft-").upper()):
        pytest.skip("this PEFT does not have it")


def merged_model(root: Path, delta: Path, out: Path) -> Any:
    import transformers

    sd.apply(root / "base", delta, out=out)
    return transformers.LlamaForCausalLM.from_pretrained(out).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("layout", ["peft-shira", "peft-supertuning"])
def test_peft_loads_a_sparse_adapter_that_gives_the_same_weights(
    root: Path, model: Any, tmp_path: Path, layout: str, with_model: bool
):
    need(layout)
    report = sd.export(root / "linear.shd", layout, tmp_path / "out", model=root / "base" if with_model else None)
    assert (report.tensors, report.energy_kept, report.warnings) == (14, None, ())
    right = merged_model(root, root / "linear.shd", tmp_path / "right")
    adapted = loaded(model, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens()).logits, right(tokens()).logits, rtol=1e-4, atol=1e-5)
    found = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in right.state_dict().items())
    assert not torch.equal(found[DOWN], model.state_dict()[DOWN])
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == (str(root / "base") if with_model else "base")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["peft-shira", "peft-supertuning"])
def test_in_16_bits_the_weights_are_the_same_or_a_warning_says_otherwise(
    layout: str, dtype: torch.dtype, tmp_path: Path
):
    need(layout)
    name, torch_model = str(dtype).removeprefix("torch."), torch.nn.Sequential(torch.nn.Linear(64, 48)).to(dtype)
    bits = torch_model[0].weight.detach().view(torch.int16).numpy().view("u2").reshape(-1)
    positions = np.arange(0, 3072, 10)
    values = np.random.default_rng(0).standard_normal(positions.size).astype(np.float32) * np.float32(0.01)
    sd.save_delta(tmp_path / "x.shd", {"0.weight": TensorDelta((48, 64), positions, values, name)}, values="f32")
    report = sd.export(tmp_path / "x.shd", layout, tmp_path / "out")
    right = bits.copy()
    right[positions] = add(bits[positions], name, values)
    found = loaded(torch_model, tmp_path / "out").merge_and_unload()[0].weight.data
    same = np.array_equal(found.view(torch.int16).numpy().view("u2").reshape(-1), right)
    assert same == (not report.warnings) == (layout == "peft-shira")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_a_lora_that_keeps_what_the_report_says(root: Path, model: Any, tmp_path: Path):
    with sd.open_delta(root / "linear.shd") as delta:
        dense = {name.removesuffix(".weight"): tensor.to_dense() for name, tensor in delta.items()}
    total = sum(float(np.square(one, dtype="f8").sum()) for one in dense.values())
    for options, least in (({"rank": 2}, 0.1), ({"energy": 0.8}, 0.8), ({"energy": 1}, 0.999999), ({}, 0.5)):
        report = sd.export(root / "linear.shd", "peft-lora", tmp_path / "out", **options)  # type: ignore[arg-type]
        adapted = loaded(model, tmp_path / "out").base_model.model
        missed = 0.0
        for layer, one in dense.items():
            module = adapted.get_submodule(layer)
            assert module.r["default"] == report.ranks[layer] == options.get("rank", report.ranks[layer])
            missed += float(np.square(one - module.get_delta_weight("default").detach().numpy(), dtype="f8").sum())
        assert report.energy_kept == pytest.approx(1 - missed / total, abs=1e-5)
        assert report.energy_kept >= least
        assert bool(report.warnings) == (report.energy_kept < 0.9)
    assert set(report.ranks.values()) == {16}


def test_ranks_follow_from_the_energy():
    matrix = np.diag(np.float32([4, 3, 2, 1, 0]))
    delta = TensorDelta(matrix.shape, np.flatnonzero(matrix), matrix[matrix != 0])
    for energy, rank in ((0.5, 1), (0.6, 2), (25 / 30, 2), (0.9, 3), (1, 4)):
        assert factors_of(delta, None, energy)[0].shape == (5, rank)
    left, right, kept = factors_of(delta, 2, None)
    assert kept == pytest.approx(25)
    assert np.allclose(left @ right, np.diag([4, 3, 0, 0, 0]), atol=1e-6)


@pytest.mark.parametrize("shape", [(600, 700), (700, 600)])
def test_leading_factors_of_a_large_matrix_are_those_of_its_singular_values(shape: tuple[int, int]):
    generator = np.random.default_rng(0)
    positions = np.sort(generator.choice(shape[0] * shape[1], 4000, replace=False))
    delta = TensorDelta(shape, positions, generator.standard_normal(4000))
    left, right, kept = factors_of(delta, 4, None)
    squares = np.linalg.svd(delta.to_dense().astype("f8"), compute_uv=False)[:4] ** 2
    assert kept == pytest.approx(squares.sum(), rel=1e-4)
    missed = np.square(delta.to_dense() - left @ right, dtype="f8").sum()
    assert missed == pytest.approx(np.square(delta.values(), dtype="f8").sum() - squares.sum(), rel=1e-4)


def test_sparse_new_values_are_the_base_with_the_delta(made: Path, tmp_path: Path):
    out = tmp_path / "new.safetensors"
    sd.export(made / "a.shd", "sparse", out, model=made / "bf16")
    weights, new = load_file(made / "bf16" / "model.safetensors"), load_file(out)
    sd.apply(made / "bf16", made / "a.shd", out=tmp_path / "right")
    with sd.open_delta(made / "a.shd") as delta:
        assert {name.rpartition(".")[0] for name in new} == set(delta)
    for name, weight in weights.items():
        assert new[f"{name}.indices"].dtype == torch.int32
        weight.view(-1)[new[f"{name}.indices"].long()] = new[f"{name}.values"]
        assert np.array_equal(weight.view(torch.int16).numpy().view("u2").reshape(-1), read(tmp_path / "right", name))


def test_sparse_old_values_undo_new_ones(made: Path, tmp_path: Path):
    """By hand, as an engine's own loader does it, and as a delta."""
    new, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    sd.export(made / "a.shd", "sparse", new, model=made / "bf16")
    sd.export(made / "a.shd", "sparse-undo", old, model=made / "bf16")
    weights = load_file(made / "bf16" / "model.safetensors")
    for file in (new, old):
        held = load_file(file)
        before = {name: weight.clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.view(-1)[held[f"{name}.indices"].long()] = held[f"{name}.values"]
            assert not torch.equal(weight, before[name])
    for name, weight in load_file(made / "bf16" / "model.safetensors").items():
        assert torch.equal(weights[name].view(torch.int16), weight.view(torch.int16))
    sd.apply(made / "bf16", made / "a.shd", out=tmp_path / "tuned")
    sd.convert(old, tmp_path / "undo.shd", base=tmp_path / "tuned")
    sd.apply(tmp_path / "tuned", tmp_path / "undo.shd", out=tmp_path / "base")
    assert contents(tmp_path / "base" / "model.safetensors") == contents(made / "bf16" / "model.safetensors")


@pytest.mark.parametrize("layout", ["sparse", "sparse-undo"])
def test_the_model_that_is_read_is_not_replaced(made: Path, tmp_path: Path, layout: str):
    shutil.copytree(made / "bf16", folder := tmp_path / "model")
    before = contents(folder)
    with pytest.raises(TargetError, match="of the model that is read"):
        sd.export(made / "a.shd", layout, folder / "model.safetensors", model=folder)
    assert contents(folder) == before
    sd.export(made / "a.shd", layout, tmp_path / "x.safetensors", model=folder)
    sd.export(made / "a.shd", layout, tmp_path / "x.safetensors", model=folder)  # its own file is replaced


@pytest.mark.parametrize("base", [True, False])
def test_sparse_new_values_are_converted_back(made: Path, tmp_path: Path, base: bool):
    out, back = tmp_path / "new.safetensors", tmp_path / "back.shd"
    sd.export(made / "a.shd", "sparse", out, model=made / "bf16")
    sd.convert(out, back, base=made / "bf16" if base else None)
    for name, delta in (("right", made / "a.shd"), ("back", back)):
        sd.apply(made / "bf16", delta, out=tmp_path / name)
    assert contents(tmp_path / "back" / "model.safetensors") == contents(tmp_path / "right" / "model.safetensors")
    with sd.open_delta(back) as held:
        assert {tensor.op for tensor in held.values()} == {"set"}
        assert all((tensor.base_fingerprint is not None) == base for tensor in held.values())
    sd.export(back, "sparse", tmp_path / "again.safetensors")  # whole values need no model
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()


def test_dense_differences_added_to_the_base_give_the_merged_model(made: Path, tmp_path: Path):
    out = tmp_path / "diff.safetensors"
    sd.export(made / "a.shd", "dense", out)
    sd.export(made / "a.shd", "merged", tmp_path / "right", model=made / "bf16")
    held = load_file(out)
    for name, weight in load_file(made / "bf16" / "model.safetensors").items():
        found = (weight.float() + held[name]).bfloat16()
        assert np.array_equal(found.view(torch.int16).numpy().view("u2").reshape(-1), read(tmp_path / "right", name))
    sd.convert(out, tmp_path / "back.shd", 1, made / "bf16", "f32", kind="diff")
    with sd.open_delta(tmp_path / "back.shd") as back, sd.open_delta(made / "a.shd") as delta:
        assert all(np.array_equal(back[name].to_dense(), tensor.to_dense()) for name, tensor in delta.items())


def test_a_merged_model_is_what_apply_writes_and_is_reverted(made: Path, tmp_path: Path):
    sd.export(made / "a.shd", "merged", tmp_path / "out", model=made / "bf16", strength=0.5)
    sd.apply(made / "bf16", made / "a.shd", out=tmp_path / "right", strength=0.5)
    weights = "model.safetensors"
    assert contents(tmp_path / "out" / weights) == contents(tmp_path / "right" / weights)
    sd.revert(tmp_path / "out")
    assert contents(tmp_path / "out" / weights) == contents(made / "bf16" / weights)


def test_tensors_of_torch_sparse(made: Path):
    with sd.open_delta(made / "a.shd") as delta:
        found = delta.to_torch_sparse()
        assert list(found) == list(delta)
        for name, tensor in delta.items():
            assert found[name].is_coalesced()
            assert np.array_equal(found[name].to_dense().numpy(), tensor.to_dense())
            checked = torch.sparse_coo_tensor(
                found[name].indices(), found[name].values(), tensor.shape, check_invariants=True
            )
            assert torch.equal(checked.to_dense(), found[name].to_dense())
    scalar = TensorDelta((), [0], [2.5]).to_torch_sparse()
    assert scalar.to_dense().item() == 2.5


ONE = np.ones(1, np.float32)
REFUSED = {
    "set": TensorDelta((4, 4), [1], ONE, "float32", "set"),
    "new": TensorDelta((4, 4), None, np.ones(16, np.float32), "float32", "new"),
    "drop": TensorDelta((4, 4), None, None, op="drop"),
    "replace": TensorDelta((4, 4), None, np.ones(16, np.float32), "float32", "replace"),
    "add": TensorDelta((4,), [1], ONE, "float32"),
}


@pytest.mark.parametrize("op", REFUSED)
@pytest.mark.parametrize("layout", [name for name, row in EXPORTS.items() if not row.needs_model])
def test_what_a_layout_cannot_hold_is_refused_by_name(layout: str, op: str, tmp_path: Path):
    """Additions to vectors are dense differences; whole values are sparse new values; nothing else is held."""
    out = tmp_path / "out"
    sd.save_delta(tmp_path / "x.shd", {"layer.weight": REFUSED[op]}, values="f32")
    if (layout, op) in (("dense", "add"), ("sparse", "set")):
        assert sd.export(tmp_path / "x.shd", layout, out).nonzeros == 1
        return
    with pytest.raises(DeltaError, match=f"'layer.weight' is {op}.*(merged|--model)"):
        sd.export(tmp_path / "x.shd", layout, out)
    assert not out.exists()


@pytest.mark.parametrize("op", ["set", "new", "drop", "replace"])
def test_only_additions_are_sparse_tensors_of_torch(op: str, tmp_path: Path):
    sd.save_delta(tmp_path / "x.shd", {"layer.weight": REFUSED[op]}, values="f32")
    with sd.open_delta(tmp_path / "x.shd") as delta, pytest.raises(DeltaError, match=rf"'layer\.weight' is {op}"):
        delta.to_torch_sparse()


@pytest.mark.parametrize("layout", ["peft-shira", "peft-supertuning", "peft-lora"])
def test_with_the_model_only_its_linear_layers_are_taken(root: Path, layout: str, tmp_path: Path):
    with sd.open_delta(root / "all.shd") as delta:
        matrices = {name: tensor for name, tensor in delta.items() if len(tensor.shape) == 2}
        sd.save_delta(tmp_path / "matrices.shd", matrices, values="f32")
    with pytest.raises(DeltaError, match=r"'model\.embed_tokens\.weight' is not the weight of one linear layer"):
        sd.export(tmp_path / "matrices.shd", layout, tmp_path / "out", model=root / "base")
    assert not (tmp_path / "out").exists()


def test_layers_have_their_names_in_the_model(root: Path, tmp_path: Path):
    """A delta of the bare decoder, as its own checkpoint calls the tensors."""
    with sd.open_delta(root / "linear.shd") as delta:
        bare = {name.removeprefix("model."): tensor for name, tensor in delta.items()}
        sd.save_delta(tmp_path / "bare.shd", bare, values="f32")
    sd.export(tmp_path / "bare.shd", "peft-shira", tmp_path / "out", model=root / "base")
    sd.export(root / "linear.shd", "peft-shira", tmp_path / "right", model=root / "base")
    assert contents(tmp_path / "out") == contents(tmp_path / "right")


@pytest.mark.parametrize("op", ["new", "drop", "replace"])
def test_only_changed_elements_are_undone(made: Path, op: str, tmp_path: Path):
    sd.save_delta(tmp_path / "x.shd", {"layer.weight": REFUSED[op]}, values="f32")
    with pytest.raises(DeltaError, match=f"'layer.weight' is {op}.*merged"):
        sd.export(tmp_path / "x.shd", "sparse-undo", tmp_path / "out", model=made / "bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["peft-shira", "sparse", "sparse-undo", "merged"])
def test_another_base_is_refused(root: Path, layout: str, tmp_path: Path):
    small_model(tied=True).save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    weights = {name: weight + 1 for name, weight in load_file(file).items()}
    from safetensors.torch import save_file

    save_file(weights, file)
    with pytest.raises(BaseMismatchError, match="is not the one that the delta was made against"):
        sd.export(root / "linear.shd", layout, tmp_path / "out", model=tmp_path / "other")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("nothing", {}, "export layout 'nothing' is unknown; take dense"),
        ("dense", {"rank": 4}, "rank is an option of peft-lora, not of dense"),
        ("peft-shira", {"strength": 0.5}, "strength is an option of merged"),
        ("merged", {}, "merged needs the base model's files; give --model MODEL"),
        ("sparse-undo", {}, "sparse-undo needs the base model's files; give --model MODEL"),
        ("peft-lora", {"rank": 4, "energy": 0.5}, "rank and energy exclude each other"),
        ("peft-lora", {"rank": 0}, "rank 0 is less than 1"),
        ("peft-lora", {"energy": 0.0}, "energy 0 is no share"),
    ],
)
def test_wrong_options_are_refused(made: Path, tmp_path: Path, layout: str, options: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message):
        sd.export(made / "a.shd", layout, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


class Breaking(Mapping[str, TensorDelta]):
    """Deltas of which the last cannot be read once writing has begun."""

    def __init__(self) -> None:
        self.read = 0

    def __getitem__(self, name: str) -> TensorDelta:
        delta = TensorDelta((8, 8), [1, 2], [1.0, 2.0])
        if name == "b.weight":

            def fail() -> Any:
                raise DeltaError("damaged")

            delta.values = delta.to_dense = fail  # type: ignore[method-assign]
        return delta

    def __iter__(self) -> Iterator[str]:
        return iter(("a.weight", "b.weight"))

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("layout", ["dense", "peft-lora", "peft-shira", "peft-supertuning"])
def test_an_error_leaves_nothing_or_what_was_there(layout: str, tmp_path: Path):
    out, row = tmp_path / "out", EXPORTS.find(layout)
    with pytest.raises(DeltaError, match="damaged"):
        row.write(out, Breaking(), "")
    assert list(tmp_path.iterdir()) == []
    row.write(out, {"a.weight": Breaking()["a.weight"]}, "")
    before = contents(tmp_path)
    with pytest.raises(DeltaError, match="damaged"):
        row.write(out, Breaking(), "")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_a_file_of_another_kind_is_not_replaced(made: Path, tmp_path: Path, layout: str):
    (tmp_path / "notes.txt").write_text("notes")
    options = {"model": made / "bf16"} if layout == "sparse" else {}
    with pytest.raises(TargetError, match="is there and is not a safetensors file"):
        sd.export(made / "a.shd", layout, tmp_path / "notes.txt", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["dense", "peft-shira", "peft-supertuning"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, layout: str):
    size = 256
    one = TensorDelta((size, size), np.arange(0, size * size, 7), np.ones(-(-size * size // 7)))
    sd.save_delta(tmp_path / "x.shd", {f"{number}.weight": one for number in range(16)}, values="f32")
    peaks = []
    for count in (1, 16):
        with sd.open_delta(tmp_path / "x.shd") as delta:
            some = {name: delta[name] for name in list(delta)[:count]}
            tracemalloc.start()
            EXPORTS.find(layout).write(tmp_path / f"out{count}", some, "")
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize("layout", ["dense", "peft-lora", "peft-shira", "peft-supertuning"])
def test_a_shape_does_not_decide_what_memory_is_taken(tmp_path: Path, layout: str):
    huge = TensorDelta((1 << 27, 1 << 27), [5, 99], [1.0, 2.0])
    sd.save_delta(tmp_path / "x.shd", {"a.weight": huge}, values="f32")
    with pytest.raises((LimitError, DeltaError), match=r"takes .* of memory|32-bit"):
        sd.export(tmp_path / "x.shd", layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sparsity_gives_room_by_pefts_own_arithmetic():
    generator = np.random.default_rng(0)
    for _ in range(200):
        numel = int(generator.integers(1, 1 << 20))
        nnz = int(generator.integers(1, min(numel, 300) + 1))
        sparse = {"x": TensorDelta((1, numel), np.arange(nnz), np.ones(nnz))}
        assert nnz <= count_of(numel, sparsity_of(sparse)) <= nnz + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight.indices": None}, "'a.weight.indices' is lacking"),
        ({"a.weight.indices": torch.tensor([1.0, 2.0])}, "its indices are float32"),
        ({"a.weight.indices": torch.tensor([1])}, "1 index for 2 values"),
        ({"a.weight.indices": torch.tensor([1, 16])}, r"an index outside of shape \[4, 4\]"),
        ({"a.weight.indices": torch.tensor([-1, 2])}, r"an index outside of shape \[4, 4\]"),
        ({"a.weight.indices": torch.tensor([2, 2])}, "lists an index twice"),
        ({"more": torch.ones(2)}, "is neither NAME.indices nor NAME.values"),
        ({"shapes": "[1]"}, "have no shapes of tensors"),
        ({"shapes": '{"a.weight": ["4", 4]}'}, "have no shapes of tensors"),
        ({"shapes": "{}"}, "does not tell the tensor's shape; give --base"),
    ],
)
def test_damaged_sparse_values_are_refused(tmp_path: Path, change: dict[str, Any], message: str):
    from safetensors.torch import save_file

    held: dict[str, Any] = {"a.weight.indices": torch.tensor([1, 2]), "a.weight.values": torch.ones(2)}
    shapes = str(change.pop("shapes", '{"a.weight": [4, 4]}'))
    tensors = {name: tensor for name, tensor in (held | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "x.safetensors", {"layout": "sparse-values", "shapes": shapes})
    with pytest.raises(SourceError, match=message) as caught:
        sd.convert(tmp_path / "x.safetensors", tmp_path / "x.shd")
    assert "\n" not in str(caught.value)


def test_the_command(made: Path, tmp_path: Path):
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["export", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout

    listed = run("--list").splitlines()
    assert [line.split()[0] for line in listed[1:] if not line.startswith("-")] == list(EXPORTS)
    assert all(row.help in "\n".join(listed) for row in EXPORTS.values())
    said = run(made / "a.shd", "dense", tmp_path / "diff.safetensors")
    assert "dense, 6 tensors" in said
    about = json.loads(run(made / "a.shd", "merged", tmp_path / "out", "--model", made / "bf16", "--json"))
    assert {"out", "layout", "tensors", "nonzeros", "bytes", "energy_kept", "ranks", "warnings"} == set(about)
