"""Deltas in the form that is read with its base only: the same bits as the plain form gives, or a refusal by name."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import shiradelta as sd
from shiradelta.cli import main
from shiradelta.errors import ArgumentError, FormatError, LimitError, TargetError
from shiradelta.folder.recode import base_of
from shiradelta.format import registry
from shiradelta.format.codecs import BITS, FROM_BASE, ULP_FROM_BASE
from shiradelta.format.codecs.base import SLACK
from shiradelta.format.codecs.from_base import HEAD, FromBase
from shiradelta.format.operations import OPERATIONS
from shiradelta.format.record import Record, Section
from shiradelta.io import context
from shiradelta.io.context import plain_delta
from shiradelta.io.restored import codecs_on_base, restored
from shiradelta.io.writer import writing
from shiradelta.models.checkpoint import open_checkpoint
from tests.swapping import bits

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e5m2}


def trained(seed: int, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A step that moves all weights by about the same amount, so that small ones change."""
    rng, tuned = np.random.default_rng(seed), {}
    for name, tensor in base.items():
        moved = tensor.float() + torch.from_numpy(rng.normal(size=tuple(tensor.shape)).astype(np.float32)) * 2e-4
        unlike = moved.to(tensor.dtype).view(torch.uint8) != tensor.view(torch.uint8)
        changed = torch.from_numpy(bits(moved.to(tensor.dtype)) != bits(tensor)).reshape(tensor.shape)
        assert unlike.any()
        small = tensor.float().abs() < tensor.float().abs().median()
        tuned[name] = torch.where(changed & small, moved.to(tensor.dtype), tensor)
    return tuned


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of three versions, and the step from each to the next as a plain file."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("recode")
    state = {name: (torch.randn(160, 96) * 0.02).to(dtype) for name, dtype in DTYPES.items()}
    state |= {"norm": torch.ones(300).bfloat16() * 0.001, "ids": torch.arange(50)}
    for version in range(3):
        (place / str(version)).mkdir()
        save_file(state, place / str(version) / "model.safetensors", metadata={"format": "pt"})
        if version:
            base = place / str(version - 1)
            sd.convert(place / str(version), place / f"{version}.shd", base=base, lossless=True)
            sd.recode(place / f"{version}.shd", place / f"small{version}.shd", base)
        state |= trained(version, {name: tensor for name, tensor in state.items() if name in DTYPES})
    return place


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_way_there_and_back_gives_the_same_file(made: Path, tmp_path: Path):
    plain, small, back = made / "1.shd", made / "small1.shd", tmp_path / "back.shd"
    report = sd.recode(small, back, made / "0")
    assert back.read_bytes() == plain.read_bytes()
    assert not report.needs_base
    assert (report.source_bytes, report.file_bytes) == (small.stat().st_size, plain.stat().st_size)
    assert small.stat().st_size < 0.9 * plain.stat().st_size
    with sd.open_delta(plain) as one, sd.open_delta(small) as other:
        assert (one.needs_base, other.needs_base) == (False, True)
        assert one.digest == other.digest == report.digest
        assert one.metadata == other.metadata
        codecs = {(tensor.record.index_codec_name, tensor.record.value_codec_name) for tensor in other.values()}
        assert ("FROM_BASE", "ULP_FROM_BASE") in codecs
        # What the result's fingerprint is follows from the base, so only the plain form has it.
        assert None not in {tensor.result_fingerprint for tensor in one.values()}
        assert {tensor.result_fingerprint for tensor in other.values()} == {None}
        assert [tensor.base_fingerprint for tensor in other.values()] == [one[n].base_fingerprint for n in other]


def test_a_file_may_be_recoded_in_place(made: Path, tmp_path: Path):
    file = tmp_path / "step.shd"
    shutil.copy(made / "1.shd", file)
    assert sd.recode(file, file, made / "0").needs_base
    assert file.read_bytes() == (made / "small1.shd").read_bytes()


def test_a_form_that_is_thrown_away_takes_no_codec_that_is_slow_to_choose(tmp_path: Path):
    base, rng = {"w": torch.randn(256, 256).bfloat16()}, np.random.default_rng(0)
    moves = rng.random((256, 256)) < np.where(np.arange(256) % 8, 0.002, 0.4)[:, None]
    tuned = {"w": (base["w"].view(torch.int16) ^ torch.from_numpy(moves).to(torch.int16)).view(torch.bfloat16)}
    for name, state in ("base", base), ("tuned", tuned):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    small, back = tmp_path / "small.shd", tmp_path / "back.shd"
    sd.convert(tmp_path / "tuned", small, base=tmp_path / "base", lossless=True, context="base")
    sd.recode(small, back, tmp_path / "base")
    with sd.open_delta(small) as delta, sd.open_delta(back) as other:
        assert delta.needs_base
        with plain_delta(delta, base_of(delta, open_checkpoint(tmp_path / "base"))) as passing:
            codecs = {name: each["w"].record.index_codec_name for name, each in {"kept": other, "not": passing}.items()}
            assert passing.digest == other.digest
            assert np.array_equal(passing["w"].positions(), other["w"].positions())
    assert codecs == {"kept": "TILED", "not": "RICE"}


def test_convert_writes_the_smaller_form(made: Path, tmp_path: Path):
    report = sd.convert(made / "1", tmp_path / "a.shd", base=made / "0", lossless=True, context="base")
    assert report.exact
    assert (tmp_path / "a.shd").read_bytes() == (made / "small1.shd").read_bytes()
    with pytest.raises(ArgumentError, match="for lossless files"):
        sd.convert(made / "1", tmp_path / "b.shd", base=made / "0", context="base")
    with pytest.raises(ArgumentError, match="one of none, base"):
        sd.convert(made / "1", tmp_path / "b.shd", base=made / "0", lossless=True, context="other")


def test_apply_and_verify_take_it_as_any_other(made: Path, tmp_path: Path):
    shutil.copytree(made / "0", model := tmp_path / "model")
    assert sd.verify(model, made / "small1.shd").state == "base"
    sd.apply(model, made / "small1.shd")
    assert load_file(model / "model.safetensors").keys() == load_file(made / "1" / "model.safetensors").keys()
    assert weights(model) == weights(made / "1")
    assert sd.verify(model, made / "small1.shd").state == "patched"
    sd.apply(model, made / "small2.shd")  # a successor: what is there now is its base
    assert weights(model) == weights(made / "2")
    sd.revert(model)
    sd.revert(model)
    assert weights(model) == weights(made / "0")


def test_the_base_may_lie_under_a_delta(made: Path, tmp_path: Path):
    """A delta that was made for a folder's base is read with that base, whatever is on it."""
    shutil.copytree(made / "0", model := tmp_path / "model")
    shape = (160, 96)
    other = sd.TensorDelta(shape, np.arange(0, 15360, 7), np.full(2195, 0.01, np.float32), "bfloat16")
    sd.save_delta(tmp_path / "other.shd", {"bf16": other}, values="bf16")
    mine = sd.TensorDelta(shape, np.arange(3, 15360, 50), np.full(308, 0.02, np.float32), "bfloat16")
    sd.save_delta(tmp_path / "mine.shd", {"bf16": mine}, values="bf16")
    sd.recode(tmp_path / "mine.shd", tmp_path / "small.shd", made / "0")
    sd.apply(model, tmp_path / "other.shd")
    sd.apply(model, tmp_path / "small.shd")
    shutil.copytree(made / "0", expected := tmp_path / "expected")
    sd.apply(expected, tmp_path / "other.shd")
    sd.apply(expected, tmp_path / "mine.shd")
    assert weights(model) == weights(expected)


def test_a_mask_by_magnitude_takes_next_to_nothing(made: Path, tmp_path: Path):
    base = load_file(made / "0" / "model.safetensors")["fp32"]
    at = np.flatnonzero(np.abs(base.numpy().reshape(-1)) > 0.045)
    values = np.linspace(-1, 1, at.size, dtype=np.float32)
    sd.save_delta(tmp_path / "a.shd", {"fp32": sd.TensorDelta((160, 96), at, values, "float32")})
    sd.recode(tmp_path / "a.shd", tmp_path / "small.shd", made / "0")
    with sd.open_delta(tmp_path / "a.shd") as plain, sd.open_delta(tmp_path / "small.shd") as small:
        one, other = plain["fp32"].record, small["fp32"].record
        assert other.index_codec_name == "FROM_BASE"
        assert other.value_codec == one.value_codec
        assert 8 * other.index.stored < 2 * at.size < 4 * 8 * one.index.stored
    sd.recode(tmp_path / "small.shd", tmp_path / "back.shd", made / "0")
    assert (tmp_path / "back.shd").read_bytes() == (tmp_path / "a.shd").read_bytes()


@pytest.mark.parametrize("backend", ["numpy", "auto"])
def test_without_the_base_there_are_no_positions(made: Path, backend: str):
    with sd.open_delta(made / "small1.shd", backend) as delta:
        for read in (delta["bf16"].positions, delta["bf16"].check, delta.verify, lambda: delta["bf16"].rows(0, 3)):
            with pytest.raises(FormatError, match="--base") as caught:
                read()
            assert caught.value.reason == "base_needed"


def test_another_base_is_refused_and_nothing_is_written(made: Path, tmp_path: Path):
    shutil.copytree(made / "1", model := tmp_path / "model")
    with pytest.raises(FormatError) as caught:
        sd.apply(model, made / "small1.shd")
    assert caught.value.reason == "wrong_base"
    assert weights(model) == weights(made / "1")
    for source in ("small1.shd", "1.shd"):
        with pytest.raises(FormatError) as caught:
            sd.recode(made / source, tmp_path / "out.shd", made / "2")
        assert caught.value.reason == "wrong_base"
    state = load_file(made / "0" / "model.safetensors")
    for name, tensor in {"shape": torch.zeros(3, 3).bfloat16(), "dtype": torch.zeros(160, 96).half()}.items():
        (tmp_path / name).mkdir()
        save_file(state | {"bf16": tensor}, tmp_path / name / "model.safetensors")
        with pytest.raises(FormatError, match="has it as") as caught:
            sd.recode(made / "small1.shd", tmp_path / "out.shd", tmp_path / name)
        assert caught.value.reason == "wrong_base"
    assert not (tmp_path / "out.shd").exists()


def test_a_base_that_no_section_looks_at_is_compared_too(tmp_path: Path):
    """A tensor that its base would not make smaller decodes with any base: the fingerprint tells that it is another."""
    torch.manual_seed(0)
    base = {"big": (torch.randn(160, 96) * 0.02).bfloat16(), "few": torch.ones(300).bfloat16()}
    tuned = {"big": trained(0, {"big": base["big"]})["big"], "few": base["few"].clone()}
    tuned["few"][7] = 2
    folders = [folder_of(tmp_path / "base", base), folder_of(tmp_path / "tuned", tuned)]
    other = folder_of(tmp_path / "other", base | {"few": torch.full((300,), 3.0).bfloat16()})
    small, plain = tmp_path / "small.shd", tmp_path / "plain.shd"
    sd.convert(folders[1], small, base=folders[0], lossless=True, context="base")
    with sd.open_delta(small) as delta:
        assert [tensor.record.needs_base for tensor in delta.values()] == [True, False]
    for source in small, plain:  # one way, and the other
        with pytest.raises(FormatError, match=rf"{source.name}, tensor 'few'.*wrong_base"):
            sd.recode(source, tmp_path / "out.shd", other)
        assert not (tmp_path / "out.shd").exists()
        sd.recode(small, plain, folders[0])


def test_a_file_of_another_kind_is_not_replaced(made: Path, tmp_path: Path):
    model = folder_of(tmp_path / "model", load_file(made / "0" / "model.safetensors"))
    before = weights(model)
    for source in ("1.shd", "small1.shd"):
        with pytest.raises(TargetError, match="is not replaced"):
            sd.recode(made / source, model / "model.safetensors", model)
    assert weights(model) == before


def test_one_element_that_differs_is_noticed(made: Path, tmp_path: Path):
    """Whatever is read of the wrong base, no file comes of it."""
    refused = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        state = load_file(made / "0" / "model.safetensors")
        state["bf16"].view(-1)[rng.integers(state["bf16"].numel())] = float(rng.choice([0.0, 1.0, float("nan")]))
        (tmp_path / str(seed)).mkdir()
        save_file(state, tmp_path / str(seed) / "model.safetensors")
        out = tmp_path / f"{seed}.shd"
        with suppress(FormatError):
            sd.recode(made / "small1.shd", out, tmp_path / str(seed))
        refused += not out.exists()
        if out.exists():  # the element is of a class that lists nothing after it, and the step does not touch it
            assert out.read_bytes() == (made / "1.shd").read_bytes()
    assert refused


def folder_of(place: Path, weights: dict[str, torch.Tensor]) -> Path:
    place.mkdir()
    save_file(weights, place / "model.safetensors")
    return place


@pytest.mark.parametrize("now", [None, (200, 100)], ids=["dropped", "replaced"])
def test_the_tensor_may_be_gone_since(made: Path, tmp_path: Path, now: tuple[int, ...] | None):
    old, new = (load_file(made / version / "model.safetensors")["bf16"] for version in "01")
    rest = {"rest": torch.zeros(8).bfloat16()}
    base = folder_of(tmp_path / "base", rest | {"w": old})
    moved = folder_of(tmp_path / "moved", rest | {"w": new})
    end = folder_of(tmp_path / "end", rest if now is None else rest | {"w": torch.zeros(now).bfloat16()})
    sd.convert(moved, tmp_path / "move.shd", base=base, lossless=True, context="base")
    sd.convert(end, tmp_path / "end.shd", base=moved, lossless=True)
    sd.apply(base, tmp_path / "move.shd")
    sd.apply(base, tmp_path / "end.shd")
    assert sd.verify(base, tmp_path / "move.shd").state == "patched"


@pytest.mark.parametrize("before", [None, (3, 5)], ids=["added", "replaced"])
def test_a_tensor_that_was_not_there_before_is_no_base(made: Path, tmp_path: Path, before: tuple[int, ...] | None):
    """Under the delta that brought the tensor there is none, or a smaller one."""
    rest, now = {"rest": torch.zeros(8).bfloat16()}, {"w": torch.zeros(160, 96).bfloat16()}
    base = folder_of(tmp_path / "base", rest if before is None else rest | {"w": torch.zeros(before).bfloat16()})
    sd.convert(folder_of(tmp_path / "now", rest | now), tmp_path / "now.shd", base=base, lossless=True)
    others = [
        folder_of(tmp_path / version, {"w": load_file(made / version / "model.safetensors")["bf16"]})
        for version in "01"
    ]
    sd.convert(others[1], tmp_path / "theirs.shd", base=others[0], lossless=True, context="base")
    sd.apply(base, tmp_path / "now.shd")
    found = weights(base)
    with pytest.raises(FormatError, match="does not have it" if before is None else "has it as") as caught:
        sd.apply(base, tmp_path / "theirs.shd")
    assert caught.value.reason == "wrong_base"
    assert weights(base) == found


def test_no_more_is_read_than_the_base_has(made: Path):
    """A caller with other elements than the tensor's is refused before a reader sees them."""
    with sd.open_delta(made / "small1.shd") as delta:
        for base in (np.zeros(15359, "<u2"), np.zeros(15360, np.uint8), np.zeros(15360, "<u4")):
            with pytest.raises(FormatError, match=f"{base.size} elements of {base.itemsize} bytes") as caught:
                restored(delta["bf16"], base)
            assert caught.value.reason == "wrong_base"


@pytest.mark.parametrize("native", [False, True])
def test_tiles_are_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool):
    """A section of 40 bytes may have a tile for each element; who keeps a number of each refuses before that."""
    if not native:
        monkeypatch.setattr("shiradelta.io.restored.codecs_on_base", lambda: (FROM_BASE, ULP_FROM_BASE))
    elif type(codecs_on_base()[0]) is FromBase:
        pytest.skip("libshd is not here")
    numel, empty = 1 << 17, Section(0, 0, 0, 0)
    dtype, codecs = registry.DTYPE_OF_NAME["float16"], (FROM_BASE.id, BITS.id)
    record = Record("w", (numel,), dtype, OPERATIONS["set"], *codecs, 1, None, None, empty, empty)
    head = HEAD.pack(0, 0, 1, 0, 1, 1, 0)
    with writing(tmp_path / "many.shd", "f32") as writer:
        writer.add_sections(record, bytes(32), head + bytes([3, 0, 0, 0]) + bytes(4) + SLACK, bytes(4) + SLACK)
    refusal = pytest.raises(FormatError if native else LimitError)
    with sd.open_delta(tmp_path / "many.shd", limit="4MB") as delta, refusal:
        restored(delta["w"], np.zeros(numel, "<u2"))


def test_a_file_without_a_limit_leaves_memory_to_others(made: Path, monkeypatch: pytest.MonkeyPatch):
    """Threads are as many as the default limit has room for: a lossless conversion has none for its own file."""
    monkeypatch.setattr(context, "THREADS", 16)
    with sd.open_delta(made / "1.shd", limit=1 << 62) as delta:
        largest = max(tensor.record.decoded_size for tensor in delta.values())
        for threads in 1, 3, 16:
            monkeypatch.setattr(context, "default_limit", lambda size, threads=threads: 6 * threads * largest)
            assert context._threads(delta, 6) == threads


def test_verify_tells_what_it_can_without_the_base(made: Path, tmp_path: Path):
    assert (found := sd.verify(made / "1", made / "small1.shd")).state == "unknown"
    assert "shiradelta recode" in found.detail
    shutil.copytree(made / "0", model := tmp_path / "model")
    sd.apply(model, made / "1.shd")
    assert sd.verify(model, made / "small2.shd").state == "neither"
    state = load_file(model / "model.safetensors")
    at = int(np.flatnonzero(bits(state["bf16"]) != bits(load_file(made / "0" / "model.safetensors")["bf16"]))[0])
    state["bf16"].view(-1)[at] = 3
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    assert "not as 1.shd left it" in sd.verify(model, made / "small1.shd").detail


def test_an_interrupted_action_comes_first(made: Path, tmp_path: Path):
    """Weights that are half patched are nobody's base."""
    shutil.copytree(made / "0", model := tmp_path / "model")
    sd.apply(model, made / "small1.shd")
    record = model / ".shiradelta" / "state.json"
    entry = json.loads(record.read_bytes())["applied"][0]
    for field in ("before", "after", "undo"):  # as version 1 had it, which has no checksum
        del entry[field]
    record.write_text(json.dumps({"version": 1, "applied": [], "pending": entry}))
    state = load_file(made / "1" / "model.safetensors")
    state["bf16"][:80] = load_file(made / "0" / "model.safetensors")["bf16"][:80]
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    assert sd.verify(model, made / "small1.shd").interrupted
    sd.revert(model, force=True)
    assert weights(model) == weights(made / "0")


def test_a_full_temporary_folder_is_named(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is not the model that cannot be read."""
    shutil.copytree(made / "0", model := tmp_path / "model")
    state = load_file(made / "0" / "model.safetensors")

    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    monkeypatch.setattr("tempfile.SpooledTemporaryFile.write", full)
    for call in (sd.apply, sd.verify):
        with pytest.raises(TargetError, match=f"^{re.escape(tempfile.gettempdir())}: .* set TMPDIR"):
            call(model, made / "small1.shd")
    with pytest.raises(TargetError, match="set TMPDIR"):
        sd.load(state, made / "small1.shd")
    assert weights(model) == weights(made / "0")


def test_what_the_base_does_not_make_smaller_stays_as_it_is(made: Path, tmp_path: Path):
    at = np.sort(np.random.default_rng(0).choice(15360, 40, replace=False))
    delta = sd.TensorDelta((160, 96), at, np.ones(40, np.float32), "float32")
    sd.save_delta(tmp_path / "a.shd", {"fp32": delta, "none": sd.TensorDelta((3,), [], [], "float32")})
    base = folder_of(tmp_path / "base", {"fp32": torch.ones(160, 96), "none": torch.ones(3)})
    report = sd.recode(tmp_path / "a.shd", tmp_path / "b.shd", base)
    assert (report.needs_base, report.packed) == (False, True)
    assert report.file_bytes < report.source_bytes
    arguments = ["recode", str(tmp_path / "a.shd"), str(tmp_path / "b.shd"), "--base", str(base)]
    said = CliRunner().invoke(main, arguments).stdout
    assert "its base would not make it smaller" in said.replace("\n", " ")
    state = {"fp32": torch.ones(160, 96), "none": torch.ones(3)}
    sd.load(state, tmp_path / "b.shd")
    assert int((state["fp32"] == 2).sum()) == 40
    sd.recode(tmp_path / "b.shd", tmp_path / "c.shd", base)
    assert (tmp_path / "a.shd").read_bytes() == (tmp_path / "c.shd").read_bytes()


def test_the_form_can_be_said_and_a_pipe_takes_it(made: Path, tmp_path: Path):
    plain, small = (made / "1.shd").read_bytes(), tmp_path / "small.shd"
    base = made / "0"
    for source in plain, plain:  # the second time it has that form already
        (tmp_path / "a.shd").write_bytes(source)
        assert not sd.recode(tmp_path / "a.shd", tmp_path / "same.shd", base, context="none").needs_base
        assert (tmp_path / "same.shd").read_bytes() == plain
        assert sd.recode(tmp_path / "a.shd", small, base, context="base").needs_base
    report = sd.recode(small, tmp_path / "again.shd", base, context="base")
    assert (tmp_path / "again.shd").read_bytes() == small.read_bytes()
    assert report.source_bytes == report.file_bytes == small.stat().st_size
    with pytest.raises(sd.ArgumentError, match="none, base"):
        sd.recode(small, tmp_path / "no.shd", base, context="other")
    arguments = ["recode", "-", "-", "--base", str(base), "--context", "none"]
    done = CliRunner().invoke(main, arguments, input=small.read_bytes())
    assert (done.exit_code, done.stdout_bytes) == (0, plain)
    assert "read by itself" in done.stderr


def test_packing_leaves_a_file_that_it_makes_no_smaller(tmp_path: Path):
    values = np.random.default_rng(0).standard_normal(20000).astype(np.float32)
    sd.save_delta(
        tmp_path / "a.shd", {"w": sd.TensorDelta((200, 100), np.arange(20000), values, "float32")}, values="f32"
    )
    report = sd.recode(
        tmp_path / "a.shd", tmp_path / "b.shd", folder_of(tmp_path / "base", {"w": torch.ones(200, 100)})
    )
    assert (report.needs_base, report.packed) == (False, False)
    assert (tmp_path / "a.shd").read_bytes() == (tmp_path / "b.shd").read_bytes()
    said = CliRunner().invoke(
        main, ["recode", str(tmp_path / "a.shd"), str(tmp_path / "b.shd"), "--base", str(tmp_path / "base")]
    )
    assert "1.00 of" in said.stdout


def test_compressed_sections_stay_so(made: Path, tmp_path: Path):
    pytest.importorskip("zstandard")
    base = load_file(made / "0" / "model.safetensors")["fp32"]
    at = np.flatnonzero(np.abs(base.numpy().reshape(-1)) > 0.03)
    delta = sd.TensorDelta(
        (160, 96), at, np.random.default_rng(0).choice(np.float32([0.5, 0.25, -1.0]), at.size), "float32"
    )
    a, small, back = (tmp_path / name for name in ("a.shd", "small.shd", "back.shd"))
    sd.save_delta(a, {"fp32": delta}, values="f32", zstd=True)
    assert sd.recode(a, small, made / "0").needs_base
    assert small.stat().st_size < a.stat().st_size
    sd.recode(small, back, made / "0")
    assert back.read_bytes() == a.read_bytes()


@pytest.mark.parametrize("kind", ["arrays", "torch"])
def test_a_live_model_is_its_own_base(made: Path, kind: str):
    state = load_file(made / "0" / "model.safetensors")
    model = (
        state if kind == "torch" else {name: bits(tensor).copy() for name, tensor in state.items() if name == "bf16"}
    )
    before = {name: bits(tensor).copy() if kind == "torch" else tensor.copy() for name, tensor in model.items()}
    if kind == "arrays":
        at = np.arange(0, 15360, 31)
        step = sd.TensorDelta((160, 96), at, np.ones(at.size, np.int64), "bfloat16", op="ulp")
        sd.save_delta(made / "one.shd", {"bf16": step})
        sd.recode(made / "one.shd", made / "one-small.shd", made / "0")
        swap = sd.load({"bf16": model["bf16"].reshape(160, 96)}, made / "one-small.shd")
        assert (model["bf16"].reshape(-1) != before["bf16"].reshape(-1)).sum() == at.size
    else:
        swap = sd.load(model, made / "small1.shd")
        after = load_file(made / "1" / "model.safetensors")
        assert all(np.array_equal(bits(model[name]), bits(after[name])) for name in after)
        swap.load("again", made / "small1.shd")  # its base is beneath itself now
        swap.load("next", made / "small2.shd")
        swap.switch({"small1": 1.0, "next": 1.0})
        after = load_file(made / "2" / "model.safetensors")
        assert all(np.array_equal(bits(model[name]), bits(after[name])) for name in after)
    swap.revert()
    if kind == "torch":
        with pytest.raises(FormatError) as caught:
            swap.load("too early", made / "small2.shd")
        assert caught.value.reason == "wrong_base"
    now = {name: bits(tensor) if kind == "torch" else tensor for name, tensor in model.items()}
    assert all(np.array_equal(now[name].reshape(-1), before[name].reshape(-1)) for name in before)
