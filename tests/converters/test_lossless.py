"""`convert --lossless`: the next checkpoint bit for bit, or a refusal that says what a file cannot hold."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

import shiradelta as sd
from shiradelta.cli import main
from shiradelta.converters import lossless
from shiradelta.errors import ArgumentError, BaseMismatchError, DeltaError, SourceError, TargetError
from shiradelta.fit import Fit
from tests.conftest import write_model
from tests.swapping import bits

State = dict[str, torch.Tensor]


def step(tensor: torch.Tensor, share: float, seed: int = 0, most: int = 3) -> torch.Tensor:
    """A step: some elements move by a few representable numbers."""
    rng = np.random.default_rng(seed)
    flat = bits(tensor)
    at = rng.random(flat.size) < share
    flat[at] += rng.integers(1, most + 1, at.sum()).astype(flat.dtype)
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.itemsize]
    kind = "u1" if flat.itemsize == 1 else f"i{flat.itemsize}"
    return torch.from_numpy(flat.view(kind)).view(size).view(tensor.dtype).view(tensor.shape)


def scattered(old: torch.Tensor, share: float, by: float) -> torch.Tensor:
    """Some elements are far from where they were."""
    return torch.where(torch.rand(old.shape) < share, torch.randn(old.shape).bfloat16() * by, old)


def model() -> State:
    torch.manual_seed(0)
    return {
        "bf16": torch.randn(60, 40).bfloat16(),
        "fp16": torch.randn(60, 40).half(),
        "fp32": torch.randn(60, 40),
        "fp8": torch.randn(60, 40).to(torch.float8_e4m3fn),
        "ids": torch.arange(50),
        "packed": torch.randint(0, 255, (60, 40), dtype=torch.uint8),
        "same": torch.randn(20, 20).bfloat16(),
        "old": torch.randn(5, 5).bfloat16(),
        "shape": torch.randn(5, 5).bfloat16(),
        "dtype": torch.randn(5, 5).bfloat16(),
    }  # fmt: skip


def after(base: State) -> State:
    tuned = {
        name: step(tensor, 0.05) for name, tensor in base.items() if name in ("bf16", "fp16", "fp32", "fp8", "packed")
    }
    tuned["bf16"].view(torch.int16)[3, 3] = -0x8000  # -0
    tuned["bf16"][4, 4] = float("nan")
    whole = {"shape": torch.ones(6, 5).bfloat16(), "dtype": base["dtype"].float(), "new": torch.ones(3, 3)}
    return {**tuned, **whole, "same": base["same"], "ids": base["ids"] + 1}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(bits(one[name]), bits(other[name])) for name in one)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    base = model()
    return write_model(tmp_path / "base", base, 2), write_model(tmp_path / "tuned", after(base))


def read(folder: Path) -> State:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("backend", ["numpy", "libshd"])
def test_a_folder_becomes_the_next_bit_for_bit_and_goes_back(folders, tmp_path: Path, backend: str, zstd: bool):
    base, tuned = folders
    before = read(base)
    report = sd.convert(tuned, tmp_path / "x.shd", base=base, lossless=True, zstd=zstd, backend=backend)
    assert report.exact
    assert report.summary == "the source's weights, compared bit for bit; exact"
    ops = {tensor.name: tensor.op for tensor in report.tensors}
    assert ops == {
        **dict.fromkeys(("bf16", "fp16", "fp32", "fp8", "packed", "ids"), "ulp"),
        "new": "new",
        "old": "drop",
        "shape": "replace",
        "dtype": "replace",
    }
    with sd.open_delta(tmp_path / "x.shd") as delta:
        delta.verify()
        assert delta.metadata["method"] == "lossless"
        assert delta.metadata["exactness"] == "exact"
    sd.apply(base, tmp_path / "x.shd")
    assert same(read(base), read(tuned))
    assert sd.verify(base).state == "patched"
    sd.revert(base)
    assert same(read(base), before)


@pytest.mark.parametrize("context", ["none", "base"])
def test_progress_goes_forward(folders, tmp_path: Path, context: str):
    base, tuned = folders
    done: list[float] = []
    sd.convert(
        tuned,
        tmp_path / "x.shd",
        base=base,
        lossless=True,
        context=context,
        progress=lambda what, number, total: done.append(number / total),
    )
    assert done == sorted(done)
    assert (done[0], done[-1] > 0.8, max(done) < 1) == (0, True, True)


def test_an_empty_tensor_that_is_new_has_a_row_in_the_table(tmp_path: Path):
    base = write_model(tmp_path / "base", {"w": torch.ones(3), "none": torch.zeros(0, 4)})
    tuned = write_model(tmp_path / "tuned", {"w": torch.ones(3) * 2, "none": torch.zeros(4, 0), "new": torch.zeros(0)})
    report = sd.convert(tuned, tmp_path / "x.shd", base=base, lossless=True)
    assert [row[:5] for row in report.rows[1:3]] == [
        ["new", "new", "0", "0", "0%"],
        ["none", "replace", "4x0", "0", "0%"],
    ]
    sd.apply(base, tmp_path / "x.shd")
    assert same(read(base), read(tuned))


@pytest.mark.parametrize(
    ("change", "op", "whole"),
    [
        (lambda old: step(old, 0.1, most=2), "ulp", False),
        (lambda old: step(old, 1.0, most=2), "ulp", True),
        (lambda old: scattered(old, 0.05, 1e9), "set", False),
        (lambda old: scattered(old, 0.97, 1e9), "set", True),
    ],
    ids=["few", "all", "far", "most"],
)
def test_a_tensor_is_the_smallest_of_what_there_is(change, op: str, whole: bool):
    torch.manual_seed(1)
    old = torch.randn(80, 90).bfloat16()
    new = change(old)
    at = np.flatnonzero(bits(old) != bits(new))
    step = sd.TensorDelta((80, 90), at, bits(new)[at], "bfloat16", "set", bits(old)[at])
    delta = lossless.smallest(step, bits(old), bits(new))
    assert (delta.op, delta.all_positions) == (op, whole)


@pytest.mark.parametrize("context", ["none", "base"])
def test_tensors_in_memory_give_the_file_of_the_folders(folders, tmp_path: Path, context: str):
    base, tuned = folders
    old, new = model(), after(model())
    new["bf16"] = torch.nn.Parameter(new["bf16"].t().contiguous().t())  # as it is in a module, and in another order
    files = [tmp_path / f"{number}.shd" for number in range(4)]
    for file, source, before in zip(files, (tuned, new, new, tuned), (base, old, base, old), strict=True):
        sd.convert(source, file, base=before, lossless=True, context=context)
    digests = {sd.open_delta(file).digest for file in files}
    assert len(digests) == 1
    sd.recode(files[1], tmp_path / "plain.shd", old, context="none")
    assert same(read(base), old)
    sd.apply(base, tmp_path / "plain.shd")
    assert same(read(base), new)


def test_arrays_in_memory_need_no_torch(tmp_path: Path):
    old = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.arange(3, dtype=np.int64)}
    new = {"w": np.asfortranarray(old["w"] * np.float32(1.0000001)), "n": old["n"] + 1}
    sd.convert(new, tmp_path / "x.shd", base=old, lossless=True)
    live = {name: array.copy() for name, array in old.items()}
    sd.load(live, tmp_path / "x.shd")
    assert all(np.array_equal(live[name], new[name]) for name in new)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"w": torch.ones(3)}, "'w' is a dict, no tensor"),
        (torch.ones(3, device="meta"), "'w' is sparse, without elements"),
        (torch.ones(3).to_sparse(), "'w' is sparse, without elements"),
        (torch.ones(3, dtype=torch.complex64).conj(), "or a view that torch computes"),
        (torch.ones(3, dtype=torch.complex128), "has dtype torch.complex128"),
        (np.array(["a"]), "has dtype <U1"),
    ],
)
def test_what_is_no_plain_tensor_is_named(tmp_path: Path, tensor: object, message: str):
    for source, base, where in ((tensor, torch.ones(3), "source"), (torch.ones(3), tensor, "base")):
        with pytest.raises(SourceError, match=f"^{where}: .*{message}"):
            sd.convert({"w": source}, tmp_path / "x.shd", base={"w": base}, lossless=True)
    assert not list(tmp_path.iterdir())


def test_tensors_in_memory_are_for_lossless_and_need_a_name(tmp_path: Path):
    tensors = {"w": torch.ones(3)}
    with pytest.raises(ArgumentError, match="lossless=True"):
        sd.convert(tensors, tmp_path / "x.shd", base=tensors)
    with pytest.raises(ArgumentError, match="out=FILE"):
        sd.convert(tensors, base=tensors, lossless=True)


@pytest.mark.parametrize("known", [True, False], ids=["config", "names"])
@pytest.mark.parametrize("context", ["none", "base"])
def test_packed_weights_are_bits_like_all_others(tmp_path: Path, known: bool, context: str):
    torch.manual_seed(0)
    old = {
        "l.qweight": torch.randint(-(2**31), 2**31, (64, 128), dtype=torch.int64).int(),
        "l.scales": torch.rand(4, 128).half(),
        "norm.weight": torch.rand(4096).bfloat16() * 0.01,
    }
    new = {name: step(tensor, 0.1) for name, tensor in old.items()}
    base, tuned = write_model(tmp_path / "base", old), write_model(tmp_path / "tuned", new)
    for folder in (base, tuned) if known else ():
        (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    sd.convert(tuned, tmp_path / "x.shd", base=base, lossless=True, context=context)
    sd.recode(tmp_path / "x.shd", tmp_path / "plain.shd", base, context="none")
    sd.apply(base, tmp_path / "x.shd", out=tmp_path / "copy")
    assert same(read(tmp_path / "copy"), new)
    for file in ("x.shd", "plain.shd"):
        assert sd.verify(base, tmp_path / file).state == "base"
        sd.apply(base, tmp_path / file)
        assert sd.verify(base, full=True).state == "patched"
        assert same(read(base), new)
        sd.revert(base)
        assert sd.verify(base).state == "base"
        assert same(read(base), old)
    sd.export(tmp_path / "plain.shd", "sparse", tmp_path / "new.safetensors", model=base)
    sparse = load_file(tmp_path / "new.safetensors")
    for name, tensor in new.items():
        assert torch.equal(sparse[f"{name}.values"], tensor.view(-1)[sparse[f"{name}.indices"].long()])
    added = sd.TensorDelta((4096,), [3], [1.0], "bfloat16")
    sd.save_delta(tmp_path / "add.shd", {"norm.weight": added}, values="f32")
    for call in (
        lambda: sd.export(tmp_path / "add.shd", "sparse", tmp_path / "add.safetensors", model=base),
        lambda: sd.apply(base, tmp_path / "add.shd"),
        lambda: sd.apply(base, tmp_path / "add.shd", out=tmp_path / "other"),
        lambda: sd.verify(base, tmp_path / "add.shd"),
    ):
        with pytest.raises(SourceError, match="unquantised"):
            call()
    assert same(read(base), old)


def test_what_a_file_cannot_hold_is_refused(folders, tmp_path: Path):
    base, tuned = folders
    out = tmp_path / "x.shd"
    options = {"base": base, "lossless": True}
    with pytest.raises(SourceError, match=r"base: .*nothing"):
        sd.convert(base, out, **options)
    other = write_model(tmp_path / "other", {"elsewhere": torch.ones(3)})
    with pytest.raises(SourceError, match="has no tensor of"):
        sd.convert(other, out, **options)
    with pytest.raises(SourceError, match="give --base MODEL"):
        sd.convert(tuned, out, lossless=True)
    assert not out.exists()


@pytest.mark.parametrize(
    "choice",
    [
        {"sparsity": 0.1},
        {"values": "f32"},
        {"target_size": "2MB"},
        {"kind": "full"},
        {"scope": "model"},
        {"skip": "*"},
        {"alpha": 2.0},
        {"fit": Fit("texts.jsonl")},
    ],
    ids=lambda choice: next(iter(choice)),
)
def test_a_choice_of_what_is_kept_is_refused(folders, tmp_path: Path, choice):
    base, tuned = folders
    name = next(iter(choice)).replace("_", " ")
    with pytest.raises(ArgumentError, match=f"lossless keeps everything as it is, so {name} cannot be chosen"):
        sd.convert(tuned, tmp_path / "x.shd", base=base, lossless=True, **choice)


@pytest.mark.parametrize(
    "given",
    [
        "--sparsity 1%", "--target-size 1MB", "--target-error 0.1", "--target-kept 90%", "--values int4", "--kind full",
        "--scope tensor", "--alpha 8", "--skip *", "--whole *", "--from-base model", "--fit x.jsonl", "--plot x.png",
    ],
)  # fmt: skip
def test_options_of_a_choice_are_wrong_usage(given: str):
    done = CliRunner().invoke(main, ["convert", "tuned", "--base", "model", "--lossless", *given.split()])
    assert done.exit_code == 2
    assert f"{given.split()[0]} is for a choice of changes" in done.stderr


def test_no_base_is_wrong_usage():
    done = CliRunner().invoke(main, ["convert", "tuned", "--lossless"])
    assert (done.exit_code, "give --base MODEL" in done.stderr) == (2, True)


def test_a_result_that_differs_is_not_put_in_place(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, tuned = folders
    right = lossless.smallest

    def wrong(step, old, new):
        found = right(step, old, new)
        return sd.TensorDelta(found.shape, found.positions()[1:], found.payload()[1:], found.dtype, found.op)

    monkeypatch.setattr(lossless, "smallest", wrong)
    with pytest.raises(TargetError, match="would not be the source's"):
        sd.convert(tuned, tmp_path / "x.shd", base=base, lossless=True)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_another_base_is_refused_before_anything_is_written(folders, tmp_path: Path):
    base, tuned = folders
    sd.convert(tuned, tmp_path / "x.shd", base=base, lossless=True)
    for check in True, False:
        tensors = read(base)
        tensors["bf16"].view(torch.int16)[:] = 0x7FFF  # the last of its order
        for file in base.glob("*.safetensors"):
            file.unlink()
        (base / "model.safetensors.index.json").unlink(missing_ok=True)
        save_file(tensors, base / "model.safetensors")
        with pytest.raises((BaseMismatchError, DeltaError), match=r"made against|range of its dtype"):
            sd.apply(base, tmp_path / "x.shd", check=check)
        assert same(read(base), tensors)
    with pytest.raises(DeltaError, match="drop, new, replace, ulp have strength 1 only"):
        sd.apply(base, tmp_path / "x.shd", strength=0.5)


@pytest.mark.parametrize(("share", "most"), [(0.02, 2), (0.3, 6), (1.0, 6)])
def test_memory_is_some_times_a_tensor(tmp_path: Path, share: float, most: int):
    """Positions take four times as much as elements in bfloat16, so they are not made where all elements change."""
    old = np.zeros((2048, 1024), np.uint16)
    new = old + (np.random.default_rng(0).random(old.shape) < share).astype(np.uint16)
    states = [{"w": torch.from_numpy(each).view(torch.bfloat16)} for each in (old, new)]
    folders = [write_model(tmp_path / str(number), state) for number, state in enumerate(states)]
    sd.convert(folders[1], tmp_path / "first.shd", base=folders[0], lossless=True)  # imports what it needs
    tracemalloc.start()
    try:
        sd.convert(folders[1], tmp_path / "x.shd", base=folders[0], lossless=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most * old.nbytes


def test_two_steps_fuse_into_one_without_a_base(tmp_path: Path):
    first = {"w": torch.randn(60, 40).bfloat16()}
    second = {"w": step(first["w"], 0.1, 1)}
    third = {"w": step(second["w"], 0.1, 2)}
    back = bits(first["w"]) != bits(second["w"])
    third["w"].view(-1)[back] = first["w"].view(-1)[back]
    models = [write_model(tmp_path / str(i), state) for i, state in enumerate((first, second, third))]
    for i in 0, 1:
        sd.convert(models[i + 1], tmp_path / f"{i}.shd", base=models[i], lossless=True)
    report = sd.fuse({tmp_path / "0.shd": 1, tmp_path / "1.shd": 1}, tmp_path / "x.shd")
    with sd.open_delta(tmp_path / "x.shd") as delta:
        assert delta["w"].op == "ulp"
        assert report.nnz == np.count_nonzero(bits(first["w"]) != bits(third["w"]))
        listed = [sd.open_delta(tmp_path / f"{i}.shd")["w"] for i in (0, 1)]
        both = np.intersect1d(*(tensor.positions() for tensor in listed))
        assert report.shared == np.isin(both, delta["w"].positions()).sum()
    sd.apply(models[0], tmp_path / "x.shd")
    assert same(read(models[0]), third)


def test_what_changes_nearly_everywhere_is_compressed(tmp_path: Path):
    """A bitmap of ones, and shifts of about one size, beside a tensor of which little changes."""
    rng = np.random.default_rng(0)
    before = {name: (rng.standard_normal((128, 96)) * 0.02).astype(np.float16) for name in "ab"}
    moved = rng.random((128, 96)) < 0.97
    bits = before["a"].view("<u2")
    after = {"a": np.where(moved, bits ^ np.uint16(5), bits).view(np.float16), "b": before["b"].copy()}
    after["b"][3, :4] *= 2
    for name, state in ("0", before), ("1", after):
        (tmp_path / name).mkdir()
        save_numpy(state, tmp_path / name / "model.safetensors")
    sd.convert(tmp_path / "1", tmp_path / "1.shd", base=tmp_path / "0", lossless=True)
    with sd.open_delta(tmp_path / "1.shd") as delta:
        records = {name: tensor.record for name, tensor in delta.items()}
    assert records["a"].index.zstd
    assert [section.zstd for section in (records["b"].index, records["b"].values)] == [False, False]
    sd.recode(tmp_path / "1.shd", tmp_path / "small.shd", tmp_path / "0")
    sd.recode(tmp_path / "small.shd", tmp_path / "back.shd", tmp_path / "0")
    with sd.open_delta(tmp_path / "back.shd") as delta:
        assert [tensor.record.index.zstd for tensor in delta.values()] == [True, False]


def test_what_is_compressed_is_packed_too(tmp_path: Path):
    """Of small changes in many tensors, most bytes tell of the tensors."""
    pytest.importorskip("zstandard")
    torch.manual_seed(0)
    base = {f"model.layers.{layer}.mlp.weight": torch.randn(64, 32).bfloat16() for layer in range(12)}
    tuned = {name: step(tensor, 0.01) for name, tensor in base.items()}
    for name, state in ("base", base), ("tuned", tuned):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    sizes = []
    for zstd in False, True:
        path = tmp_path / f"{zstd}.shd"
        sd.convert(tmp_path / "tuned", path, base=tmp_path / "base", lossless=True, zstd=zstd)
        sizes.append(path.stat().st_size)
        with sd.open_delta(path) as delta:
            assert delta.packed == zstd
            assert delta.version == "1.1"
        sd.apply(tmp_path / "base", path)
        assert same(load_file(tmp_path / "base" / "model.safetensors"), tuned)
        sd.revert(tmp_path / "base")
    assert sizes[1] < 0.5 * sizes[0]


def test_zstd_of_a_selection_is_packed_where_that_pays(tmp_path: Path):
    pytest.importorskip("zstandard")
    torch.manual_seed(0)
    base = {f"model.layers.{layer}.mlp.weight": torch.randn(64, 32) for layer in range(12)}
    tuned = {name: tensor + torch.randn(64, 32) * 0.1 for name, tensor in base.items()}
    for name, state in ("base", base), ("tuned", tuned):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    found = {}
    for zstd in False, True:
        sd.convert(tmp_path / "tuned", tmp_path / "a.shd", base=tmp_path / "base", sparsity=0.01, zstd=zstd)
        with sd.open_delta(tmp_path / "a.shd") as delta:
            found[zstd] = delta.packed, delta.version, delta.digest
    assert found[False][2] == found[True][2]
    assert [found[zstd][:2] for zstd in (False, True)] == [(False, "1.0"), (True, "1.1")]
