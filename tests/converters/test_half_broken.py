"""Half-broken sources of every layout: a part missing, ranks that disagree, two layouts in one file."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import shiradelta
from shiradelta.errors import SourceError
from tests.conftest import write_model
from tests.source_files import Strange, Tree, Weights, write
from tests.whole_sources import KINDS, whole

#: Kinds of low-rank adapters -> ends of the keys that a file may be without, as the rest of it is whole.
ADAPTERS = {
    "peft": ("trainable_tokens_delta", "score.weight", "norm.weight"),
    "adalora": (),
    "lycoris": (".alpha", ".w_norm"),
    "kohya": (".alpha",),
    "diffusers": (),
    "torchtune": (".magnitude",),
    "nemo": (),
    "nemo_archive": (),
    "gguf": (),
    "mlx": (),
    "tucker": (".dora_scale",),
    "dora": (),
    "biased": (),
    "flux": (),
    "flux_dora": ("magnitude_vector",),
    "pickled": (),
    "on_base": (".rescale",),
}
DIFFERENCES = ("shira", "sparse", "dense", "sparse_values")


def changed(kind: str) -> tuple[Strange, str, Any]:
    """A whole source with its base, the name of its file, and what is in it."""
    rng = random.Random(5)
    made = whole(kind, rng)
    made.files |= KINDS[kind][2](rng) if not any(name.startswith("base/") for name in made.files) else {}
    made.options = {key: made.options[key] for key in ("alpha", "whole") if key in made.options}
    name = next(
        name for name, content in made.files.items() if name.startswith("source") and hasattr(content, "tensors")
    )
    return made, name, made.files[name]


def line_of(root: Path, made: Strange, files: Tree) -> str:
    """The one line that refuses a source; "" if it is converted."""
    write(files, root)
    line = ""
    try:
        shiradelta.convert(root / made.source, root / "x.shd", 1.0, root / "base", "f32", **made.options)
    except SourceError as error:
        line = str(error)
    assert "\n" not in line
    assert (root / "x.shd").exists() == (not line)
    return line


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_tensor_is_missing(tmp_path: Path, kind: str):
    made, name, content = changed(kind)
    assert line_of(tmp_path / "whole", made, made.files) == ""
    for number, key in enumerate(content.tensors):
        less = copy.copy(content)
        less.tensors = {other: held for other, held in content.tensors.items() if other != key}
        line = line_of(tmp_path / str(number), made, {**made.files, name: less})
        assert (line == "") == key.endswith(ADAPTERS[kind] or ("no",)), f"without {key}: {line}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_ranks_that_disagree(tmp_path: Path, kind: str):
    """Each matrix is one row short in turn."""
    made, name, content = changed(kind)
    for number, (key, (dtype, shape, raw)) in enumerate(content.tensors.items()):
        if len(shape) > 1 and shape[0] > 1:
            short = copy.copy(content)
            held = dtype, [shape[0] - 1, *shape[1:]], raw[len(raw) // shape[0] :]
            short.tensors = {**content.tensors, key: held}
            assert line_of(tmp_path / str(number), made, {**made.files, name: short}) != "", f"{key} {shape}"


@pytest.mark.parametrize("other", ["full", *DIFFERENCES])
@pytest.mark.parametrize("kind", DIFFERENCES)
def test_differences_mixed_with_others(tmp_path: Path, kind: str, other: str):
    """Nothing says whether a plain tensor beside differences is one; PEFT's SHiRA saves new values beside its own."""
    made, name, content = changed(kind)
    second = changed(other)[2]
    assert isinstance(content, Weights)
    mixed = copy.copy(content)
    mixed.tensors = {**second.tensors, **content.tensors}
    if mixed.tensors == content.tensors:
        return
    line = line_of(tmp_path, made, {**made.files, name: mixed})
    clear = {"shira", "sparse", "dense"}  # by their names
    assert (line == "") == ({kind, other} <= clear or (kind, other) == ("shira", "full")), line


@pytest.mark.parametrize("kind", ["dense", "sparse_values"])
def test_a_model_with_differences_in_it(tmp_path: Path, kind: str):
    made, name, content = changed("full")
    mixed = copy.copy(content)
    mixed.tensors = {**content.tensors, **changed(kind)[2].tensors}
    assert "beside a model's weights" in line_of(tmp_path, made, {**made.files, name: mixed})


def test_differences_beside_plain_ones_by_their_kind(tmp_path: Path):
    """--kind diff says that all of them are."""
    write_model(tmp_path / "base", {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(4)})
    parts = {
        "a.weight.positions": torch.tensor([1]),
        "a.weight.values": torch.ones(1),
        "b.weight": torch.full((4,), 0.5),
    }
    save_file(parts, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"'b\.weight', which may be one or a new value; give --kind diff"):
        shiradelta.convert(tmp_path / "x.safetensors", base=tmp_path / "base")
    shiradelta.convert(tmp_path / "x.safetensors", sparsity=1, base=tmp_path / "base", values="f32", kind="diff")
    shiradelta.apply(tmp_path / "base", tmp_path / "x.shd")
    assert load_file(tmp_path / "base/model.safetensors")["b.weight"].tolist() == [1.5] * 4


def test_pefts_shira_with_modules_that_it_saves_whole(tmp_path: Path):
    """modules_to_save were added to the base, as if they were differences."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False), torch.nn.Linear(40, 24, bias=False))
    write_model(tmp_path / "base", {name: tensor.clone() for name, tensor in model.state_dict().items()})
    tuned = get_peft_model(model, ShiraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_weights=False))
    with torch.no_grad():
        tuned.base_model.model[1].modules_to_save["default"].weight += 1
    tuned.save_pretrained(tmp_path / "shira")
    shiradelta.convert(tmp_path / "shira", sparsity=1, base=tmp_path / "base", values="f32")
    shiradelta.apply(tmp_path / "base", tmp_path / "shira.shd")
    patched = load_file(tmp_path / "base/model.safetensors")
    with torch.sparse.check_sparse_tensor_invariants(True):
        merged = tuned.merge_and_unload().state_dict()
    assert all(torch.allclose(patched[name], tensor, atol=1e-6) for name, tensor in merged.items())
