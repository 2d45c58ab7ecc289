"""sentence-transformers' folders: the modules that modules.json lists, and their names in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import shiradelta
from shiradelta.errors import ShiraDeltaError, SourceError
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.models.live import live_tensors
from shiradelta.models.sentence import SentenceModule, modules_of
from shiradelta.train import attach
from tests.scenes import contents

ENCODER = {f"encoder.layer.{i}.dense.weight": (8, 8) for i in range(2)} | {"embeddings.word_embeddings.weight": (20, 8)}
#: Folder -> its tensors, as sentence-transformers names them.
MODULES: dict[str, dict[str, tuple[int, ...]]] = {
    "1_WeightedLayerPooling": {"layer_weights": (3,)},
    "2_Pooling": {},
    "3_Dense": {"linear.weight": (4, 8), "linear.bias": (4,)},
    "4_Dense": {"linear.weight": (4, 4), "linear.bias": (4,)},
    "5_LayerNorm": {"norm.weight": (4,), "norm.bias": (4,)},
    "6_CNN": {"convs.0.weight": (2, 4, 1), "convs.0.bias": (2,)},
    "7_LSTM": {"encoder.weight_ih_l0": (8, 2), "encoder.weight_hh_l0": (8, 2)},
    "8_Normalize": {},
}


def listing(folder: Path, paths: dict[str, str]) -> None:
    """Writes modules.json: path -> class."""
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(paths.items())
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(entries))


def sentences(folder: Path, seed: int, home: str = "") -> Path:
    """A model's folder with weights in every module; the encoder's are in the folder `home`."""
    torch.manual_seed(seed)
    parts = {home: ENCODER, **MODULES}
    listing(folder, {path: path.partition("_")[2] or "Transformer" for path in parts})
    for path, shapes in parts.items():
        if path.endswith("Normalize"):
            continue  # it saves no file, and git keeps no empty folder
        (folder / path).mkdir(exist_ok=True)
        (folder / path / "config.json").write_text("{}")
        if shapes:
            tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
            save_file(tensors, folder / path / "model.safetensors", metadata={"format": "pt"})
    return folder


def live(folder: Path, home: str = "") -> nn.Sequential:
    """The model as sentence-transformers loads it, as far as names go."""
    model = nn.Sequential()
    for i, path in enumerate([home, *MODULES]):
        model.append(nn.Module())
        file = folder / path / "model.safetensors"
        for name, tensor in (load_file(file) if file.exists() else {}).items():
            holder: nn.Module = model[i]
            parts = (["auto_model"] if i == 0 else []) + name.split(".")
            for part in parts[:-1]:
                if not hasattr(holder, part):
                    holder.add_module(part, nn.Module())
                holder = getattr(holder, part)
            holder.register_parameter(parts[-1], nn.Parameter(tensor))
    return model


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.relative_to(folder)}/{name}": tensor
        for file in folder.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def check_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6)


HOMES = ["", "0_Transformer"]


@pytest.mark.parametrize("home", HOMES)
def test_every_module_is_converted_applied_and_reverted(tmp_path: Path, home: str):
    base, tuned = (sentences(tmp_path / name, seed, home) for seed, name in enumerate(("base", "tuned")))
    before = contents(base)
    prefix = f"{home}/" if home else ""
    report = shiradelta.convert(tuned, tmp_path / "a.shd", sparsity=1, base=base, values="f32")
    every = {path + "/" if path else "": shapes for path, shapes in {home: ENCODER, **MODULES}.items()}
    assert {tensor.name for tensor in report.tensors} == {path + name for path in every for name in every[path]}
    assert f"{prefix}encoder.layer.0.dense.weight" in open_checkpoint(base)
    shiradelta.apply(base, tmp_path / "a.shd")
    check_equal(weights(base), weights(tuned))
    assert shiradelta.verify(base, tmp_path / "a.shd").state == "patched"
    shiradelta.revert(base)
    assert contents(base) == before


@pytest.mark.parametrize("home", HOMES)
def test_the_live_model_has_the_same_tensors(tmp_path: Path, home: str):
    base, tuned = (sentences(tmp_path / name, seed, home) for seed, name in enumerate(("base", "tuned")))
    shiradelta.convert(tuned, tmp_path / "a.shd", sparsity=1, base=base, values="f32")
    model = live(base, home)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    swap = shiradelta.HotSwap(model)
    swap.load("a", tmp_path / "a.shd")
    swap.switch("a")
    check_equal(dict(model.state_dict()), dict(live(tuned, home).state_dict()))
    swap.revert()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("home", HOMES)
def test_what_is_trained_on_the_live_model_fits_the_folder(tmp_path: Path, home: str):
    base = sentences(tmp_path / "base", 0, home)
    model = live(base, home)
    targets = ["0.auto_model.encoder.layer.0.dense.weight", "3.linear.weight", "4.linear.weight", "5.norm.weight"]
    tuner = attach(model, sparsity=0.5, mask="rand", targets=targets)
    with torch.no_grad():
        for values in tuner.parameters():
            values.add_(1)
    tuner.save(tmp_path / "a.shd", values="f32")
    tuner.detach()
    swap = shiradelta.HotSwap(model)
    assert swap.load("a", tmp_path / "a.shd").matched.keys() == set(targets)
    swap.switch("a")
    assert shiradelta.apply(base, tmp_path / "a.shd").tensors == len(targets)
    patched = live(base, home).state_dict()
    assert all(torch.equal(tensor, patched[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("home", "other"), [HOMES, HOMES[::-1]])
def test_a_delta_fits_the_other_form_of_its_folder(tmp_path: Path, home: str, other: str):
    base, tuned = (sentences(tmp_path / name, seed, home) for seed, name in enumerate(("base", "tuned")))
    shiradelta.convert(tuned, tmp_path / "a.shd", sparsity=1, base=base, values="f32")
    shiradelta.apply(sentences(tmp_path / "form", 0, other), tmp_path / "a.shd", out=tmp_path / "out")
    check_equal(weights(tmp_path / "out"), weights(sentences(tmp_path / "wanted", 1, other)))


def test_a_router_has_its_modules_in_subfolders(tmp_path: Path):
    listing(tmp_path, {"": "Router", "1_Normalize": "Normalize"})
    about = {"types": {f"{route}_0_StaticEmbedding": "x.StaticEmbedding" for route in ("query", "document")}}
    (tmp_path / "router_config.json").write_text(json.dumps(about))
    for name in about["types"]:
        (tmp_path / name).mkdir()
        save_file({"embedding.weight": torch.ones(3, 2)}, tmp_path / name / "model.safetensors")
    assert modules_of(tmp_path) == (
        SentenceModule("", "Router"),
        SentenceModule("query_0_StaticEmbedding", "StaticEmbedding"),
        SentenceModule("document_0_StaticEmbedding", "StaticEmbedding"),
        SentenceModule("1_Normalize", "Normalize"),
    )
    assert set(open_checkpoint(tmp_path)) == {f"{name}/embedding.weight" for name in about["types"]}


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"linear.weight": torch.ones(2)}, folder / "pytorch_model.bin")


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize("path", ["", "3_Dense"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickled, "has its weights in a pickle of PyTorch .*; save it as safetensors first"),
        (pointer, "is a Git LFS pointer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no .safetensors weights, and .* lists it as"),
    ],
)
def test_a_module_without_safetensors_is_named(tmp_path: Path, path: str, spoil: Callable[[Path], None], message: str):
    base, tuned = (sentences(tmp_path / name, seed) for seed, name in enumerate(("base", "tuned")))
    shiradelta.convert(tuned, tmp_path / "a.shd", sparsity=1, base=base)
    spoil(base / path)
    spoil(tuned / path)
    calls: list[Callable[[], object]] = [
        lambda: shiradelta.apply(base, tmp_path / "a.shd"),
        lambda: shiradelta.verify(base, tmp_path / "a.shd"),
    ]
    if spoil is not pickled:  # which it reads
        calls.append(lambda: shiradelta.convert(tuned, tmp_path / "b.shd", base=base))
    for call in calls:
        with pytest.raises(ShiraDeltaError, match=message) as caught:
            call()
        assert f"{base / path}" in str(caught.value) or f"{tuned / path}" in str(caught.value)
    assert not (tmp_path / "b.shd").exists()


def test_a_folder_with_a_delta_on_it_can_be_reverted_without_a_module(tmp_path: Path):
    base, tuned = (sentences(tmp_path / name, seed) for seed, name in enumerate(("base", "tuned")))
    shutil.rmtree(tuned / "3_Dense")
    listing(tuned, {"": "Transformer"})
    shiradelta.convert(tuned, tmp_path / "a.shd", base=base)
    before = (base / "model.safetensors").read_bytes()
    shiradelta.apply(base, tmp_path / "a.shd")
    pickled(base / "3_Dense")
    shiradelta.revert(base)
    assert (base / "model.safetensors").read_bytes() == before
    with pytest.raises(SourceError, match="3_Dense: has its weights in a pickle"):
        shiradelta.apply(base, tmp_path / "a.shd")


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../other",
        "/etc",
        "a/../..",
        "C:\\x",
        "..\\x",
        "\\\\host\\x",
        ".shiradelta/undo",
        "a\0b",
        "a" * 256,
        "a/" * 3000,
    ],
    ids=lambda path: path[:9].encode("unicode_escape").decode(),
)
def test_a_list_from_elsewhere_reaches_nothing_outside(tmp_path: Path, path: str):
    sentences(tmp_path / "other", 0)
    sentences(tmp_path / "m", 0)
    listing(tmp_path / "m", {"": "Transformer", path: "Dense"})
    with pytest.raises(SourceError, match=r"modules\.json: .* is no folder of a module within the model's"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("text", ["3", "{", '{"a": 1}', '[{"path": ""}]', '[{"path": 1, "type": "Dense"}]', "[3]"])
def test_a_damaged_list_is_refused(tmp_path: Path, text: str):
    sentences(tmp_path, 0)
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(SourceError, match=r"modules\.json: is not .*; get it again"):
        open_checkpoint(tmp_path)


def test_weights_that_the_list_leaves_out_are_named(tmp_path: Path):
    base, tuned = (sentences(tmp_path / name, seed, "0_Transformer") for seed, name in enumerate(("base", "tuned")))
    shutil.copy(base / "3_Dense" / "model.safetensors", base)
    shiradelta.convert(tuned, tmp_path / "a.shd", base=base)
    assert shiradelta.apply(base, tmp_path / "a.shd").warnings == ("model.safetensors is left as it is",)


def test_a_module_that_the_base_lacks_is_refused(tmp_path: Path):
    base, tuned = (sentences(tmp_path / name, seed) for seed, name in enumerate(("base", "tuned")))
    listing(base, {"": "Transformer", "2_Pooling": "Pooling"})
    with pytest.raises(SourceError, match=r"1_WeightedLayerPooling/layer_weights: .* has no folder '1_Weighted"):
        shiradelta.convert(tuned, tmp_path / "a.shd", base=base)
    skip = [f"{path}/*" for path, shapes in MODULES.items() if shapes]
    shiradelta.convert(tuned, tmp_path / "a.shd", base=base, skip=skip)
    shiradelta.apply(base, tmp_path / "a.shd")


def test_an_adapter_beside_other_weights_is_refused(tmp_path: Path):
    base, tuned = (sentences(tmp_path / name, seed) for seed, name in enumerate(("base", "tuned")))
    (tuned / "model.safetensors").unlink()
    (tuned / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    factors = {"lora_A.weight": torch.ones(1, 8), "lora_B.weight": torch.ones(8, 1)}
    names = {f"base_model.model.encoder.layer.0.dense.{name}": factor for name, factor in factors.items()}
    save_file(names, tuned / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="holds an adapter, and the weights of 1_WeightedLayerPooling beside it"):
        shiradelta.convert(tuned, tmp_path / "a.shd", base=base)
    report = shiradelta.convert(tuned / "adapter_model.safetensors", tmp_path / "a.shd", sparsity=1, base=base)
    assert [tensor.name for tensor in report.tensors] == ["encoder.layer.0.dense.weight"]


def test_a_lora_on_the_whole_model_reaches_its_modules(tmp_path: Path):
    base = sentences(tmp_path / "base", 0)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    tensors = {}
    for module, (rows, columns) in {"0.auto_model.encoder.layer.0.dense": (8, 8), "3.linear": (4, 8)}.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(1, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 1)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    report = shiradelta.convert(tmp_path / "lora", tmp_path / "a.shd", sparsity=1, base=base)
    assert [tensor.name for tensor in report.tensors] == ["encoder.layer.0.dense.weight", "3_Dense/linear.weight"]


@pytest.mark.parametrize("of_base", [True, False])
def test_modules_that_no_list_names_are_not_lost(tmp_path: Path, of_base: bool):
    """The fine-tune was copied without modules.json: only its encoder would be read."""
    base, tuned = sentences(tmp_path / "base", 1), sentences(tmp_path / "tuned", 2)
    (tuned / "modules.json").unlink()
    if not of_base:
        (base / "modules.json").unlink()
    with pytest.raises(SourceError, match=r"1_WeightedLayerPooling/layer_weights: .*tuned has no modules\.json that"):
        shiradelta.convert(tuned, base=base)
    report = shiradelta.convert(tuned, None, 1.0, base, "f32", skip="[1-9]_*/*")
    assert len(report.tensors) == len(ENCODER)
    names = {f"{folder}/{name}" for folder, shapes in MODULES.items() for name in shapes}
    assert report.lost.keys() == names
    assert (report.energy_kept is not None) == of_base
    shutil.copy(tmp_path / "tuned" / "5_LayerNorm" / "model.safetensors", tuned / "adapter_model.safetensors")
    (tuned / "model.safetensors").unlink()
    (tuned / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"holds an adapter, and the weights of 1_WeightedLayerPooling beside it"):
        shiradelta.convert(tuned, base=base)


def test_a_base_without_a_list_of_its_modules(tmp_path: Path):
    base, tuned = sentences(tmp_path / "base", 1), sentences(tmp_path / "tuned", 2)
    (base / "modules.json").unlink()
    with pytest.raises(SourceError, match=r"has no folder '3_Dense/' for it; copy the fine-tune's modules\.json"):
        shiradelta.convert(tuned, base=base, skip=["1_*"])


def test_a_module_in_a_pickle_that_no_list_names(tmp_path: Path):
    base, tuned = sentences(tmp_path / "base", 1), sentences(tmp_path / "tuned", 2)
    for folder in MODULES:
        shutil.rmtree(tuned / folder, ignore_errors=True)
    (tuned / "modules.json").unlink()
    (tuned / "2_Dense").mkdir()
    torch.save({"w": torch.ones(2)}, tuned / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"2_Dense/w: \S* has no modules\.json"):
        shiradelta.convert(tuned, base=base)


class StaticEmbedding(nn.Module):
    save_in_root = True

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)


class Transformer(nn.Module):
    save_in_root = True

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 4)

    @property
    def auto_model(self) -> nn.Module:
        return self.model


class Router(nn.Module):
    save_in_root = True

    def __init__(self) -> None:
        super().__init__()
        self.sub_modules = nn.ModuleDict(
            {"query": nn.Sequential(StaticEmbedding()), "document": nn.Sequential(Transformer())}
        )


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)


class SentenceTransformer(nn.Sequential):
    """As the library's own, as far as names go."""


@pytest.mark.parametrize(
    ("first", "saved"),
    [
        (StaticEmbedding, {"embedding.weight": "0.embedding.weight"}),
        (
            Router,
            {
                "query_0_StaticEmbedding/embedding.weight": "0.sub_modules.query.0.embedding.weight",
                "document_0_Transformer/weight": "0.sub_modules.document.0.model.weight",
            },
        ),
    ],
)
def test_a_live_model_has_the_names_of_its_folder(first: type[nn.Module], saved: dict[str, str]):
    """As they are saved: the first module in the model's own folder, and what a Router runs in folders of its own."""
    model = SentenceTransformer(first(), Dense())
    targets = live_tensors(model)
    for name, own in {**saved, "1_Dense/linear.weight": "1.linear.weight"}.items():
        assert targets[name] is targets[own]
    assert "embedding.weight" not in live_tensors(nn.Sequential(StaticEmbedding()))
