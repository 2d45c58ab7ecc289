"""Every wire against every other: steps come back bit for bit; whatever is wrong with one is refused in one line."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shiradelta as sd
from shiradelta.chain.wires import WIRES, read_wire, write_wire
from shiradelta.chain.wires.grail import FORMATS
from tests.chain.models import Model, Tensor, change, replayed, same, set_step, tensor, write
from tests.chain.plain_wires import PLAIN, Part, as_huggingface, as_verl, as_vllm, parts_of, safetensors
from tests.scenes import contents

#: Wire -> what steps cannot have on it.
LACKS = {"grail": {"integers"}, "vllm": {"integers", "nan"}}
#: Wire -> options to write it with, besides none.
OPTIONS: dict[str, list[dict[str, str]]] = {
    "fireworks": [{"format": "arc_v1"}, {"format": "arc_v2"}],
    "grail": [{"format": "sparse_codec_v2"}, {"format": "sparse_codec_v3"}],
    "huggingface": [{"encoding": "raw"}, {"encoding": "indices"}],
    "nemo-rl": [{"encoding": "overwrite"}],
}


def floats(rng: np.random.Generator) -> Model:
    return {
        "layers.0.up.weight": tensor(rng, (24, 16)),
        "layers.0.norm.weight": tensor(rng, (16,), "float32"),
        "layers.1.up.weight": tensor(rng, (8, 4, 2), "float16"),
        "layers.1.same.weight": tensor(rng, (8, 4)),
        "scale": tensor(rng, ()),
        "none": tensor(rng, (0, 4)),
        "bias": tensor(rng, (6,)),
    }


def plain_step(rng: np.random.Generator) -> tuple[Model, Model]:
    """Some elements of most tensors, 0 to -0 among them; one tensor stays."""
    before = floats(rng)
    before["layers.0.up.weight"][2][:2] = 0, 0x8000
    after = change(before, rng, 0.2)
    after["layers.0.up.weight"][2][:4] = 0x8000, 0, 0x7F80, 1
    after["scale"][2][0] = before["scale"][2][0] ^ 1
    after["layers.1.same.weight"] = before["layers.1.same.weight"]
    return before, after


def empty_step(rng: np.random.Generator) -> tuple[Model, Model]:
    before = floats(rng)
    return before, before


def step_with_nan(rng: np.random.Generator) -> tuple[Model, Model]:
    """NaNs with and without a sign and a payload, where there was none and another."""
    before, after = plain_step(rng)
    before["layers.0.up.weight"][2][9] = 0x7FC0
    after["layers.0.up.weight"][2][7:10] = 0x7FC0, 0xFFC1, 0x7F81
    after["layers.0.norm.weight"][2][3] = 0xFFC00001
    return before, after


def step_of_integers(rng: np.random.Generator) -> tuple[Model, Model]:
    before, after = plain_step(rng)
    before["mask"] = tensor(rng, (9,), "uint8")
    after["mask"] = "uint8", (9,), before["mask"][2] ^ np.array([0, 1, 0, 0, 255, 0, 0, 0, 0], "u1")
    return before, after


STEPS: dict[str, Callable[[np.random.Generator], tuple[Model, Model]]] = {
    "plain": plain_step,
    "empty": empty_step,
    "nan": step_with_nan,
    "integers": step_of_integers,
}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(wire, kind) -> a folder with the base and with the step after it was on that wire."""

    @cache
    def made(wire: str, kind: str) -> Path:
        root = tmp_path_factory.mktemp("once")
        before, after = STEPS[kind](np.random.default_rng(0))
        write(root / "base", before)
        sd.save_delta(root / "step.shd", set_step(before, after))
        on(wire, root / "step.shd", root / "base", root / "out", root / "once.shd")
        return root

    return made


def on(wire: str, step: Path, base: Path, folder: Path, out: Path) -> int:
    """Writes a step to a wire and reads it."""
    write_wire(wire, step, base, folder)
    return read_wire(wire, folder, base, out)


#: Each wire before its neighbour; the others are slow together.
ROUND = set(itertools.pairwise([*WIRES, next(iter(WIRES))]))


@pytest.mark.parametrize(
    ("one", "other"),
    [pytest.param(*way, marks=[] if way in ROUND else pytest.mark.slow) for way in itertools.product(WIRES, WIRES)],
)
def test_steps_go_from_wire_to_wire(once: Callable[[str, str], Path], tmp_path: Path, one: str, other: str):
    for kind in STEPS.keys() - LACKS.get(one, set()) - LACKS.get(other, set()):
        before, after = STEPS[kind](np.random.default_rng(0))
        root, step = once(one, kind), tmp_path / f"{kind}.shd"
        changed = on(other, root / "once.shd", root / "base", tmp_path / kind, step)
        assert changed == sum(np.count_nonzero(before[name][2] != after[name][2]) for name in before)
        assert same(replayed(before, step), after), kind
        assert not changed or sd.verify(root / "base", step).state == "base"


@pytest.mark.parametrize(("wire", "kind"), [(wire, kind) for wire, kinds in LACKS.items() for kind in sorted(kinds)])
def test_what_a_wire_has_no_form_for_is_refused(tmp_path: Path, wire: str, kind: str):
    before, after = STEPS[kind](np.random.default_rng(0))
    sd.save_delta(tmp_path / "step.shd", set_step(before, after))
    with pytest.raises(sd.DeltaError, match=r"; (take another wire|publish an anchor there)"):
        write_wire(wire, tmp_path / "step.shd", write(tmp_path / "base", before), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def step(tmp_path: Path) -> tuple[Model, Model, Path, Path]:
    """(the model before, the one after, the base's folder, the step)."""
    before, after = plain_step(np.random.default_rng(0))
    sd.save_delta(tmp_path / "set.shd", set_step(before, after))
    return before, after, write(tmp_path / "base", before), tmp_path / "set.shd"


@pytest.mark.parametrize(
    ("wire", "options"),
    [*((wire, {}) for wire in PLAIN), *((wire, one) for wire, some in OPTIONS.items() for one in some)],
)
def test_what_is_written_is_what_the_trainer_writes(
    step: tuple[Model, Model, Path, Path], tmp_path: Path, wire: str, options: dict[str, str]
):
    before, after, base, delta = step
    write_wire(wire, delta, base, tmp_path / "ours", **options)
    PLAIN[wire](tmp_path / "theirs", parts_of(before, after), before, **options)
    if (wire, options) != ("fireworks", {}):  # arc_v3 has several forms, of which the smallest is written
        assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    read_wire(wire, tmp_path / "theirs", base, tmp_path / "step.shd")
    assert same(replayed(before, tmp_path / "step.shd"), after)


def beyond(part: Part) -> None:
    part.at[-1] = part.old.size


def twice(part: Part) -> None:
    part.at[1] = part.at[0]


def too_few(part: Part) -> None:
    part.at = part.at[:-1]


def unknown(part: Part) -> None:
    part.name = "layers.9.up.weight"


def reshaped(part: Part) -> None:
    part.shape = 1, *part.shape


def another_dtype(part: Part) -> None:
    part.dtype = "float16"


def traversing(part: Part) -> None:
    part.name = "../../x"


MISTAKES = (beyond, twice, too_few, unknown, reshaped, another_dtype, traversing)
#: Wires that do not say of what shape tensors are.
SHAPELESS = {"huggingface"}


def refused(wire: str, source: Path, base: Path) -> bool:
    """Whether a step is refused, in one line, with nothing left behind."""
    out = base.parent / "made.shd"
    out.unlink(missing_ok=True)
    try:
        read_wire(wire, source, base, out)
    except sd.ShiraDeltaError as error:
        line = str(error)
    else:
        return False
    assert "\n" not in line
    assert not out.exists()
    return True


@pytest.mark.parametrize(
    ("wire", "mistake"),
    [(wire, one) for wire, one in itertools.product(PLAIN, MISTAKES) if wire not in SHAPELESS or one is not reshaped],
)
def test_what_contradicts_the_model_is_refused(
    step: tuple[Model, Model, Path, Path], tmp_path: Path, wire: str, mistake: Callable[[Part], None]
):
    before, after, base, _ = step
    parts = parts_of(before, after)
    mistake(max(parts, key=lambda part: part.at.size))
    PLAIN[wire](tmp_path / "source", parts, before)
    assert refused(wire, tmp_path / "source", base)


@pytest.mark.parametrize("wire", WIRES)
def test_files_that_are_missing_or_cut_off_are_refused(
    step: tuple[Model, Model, Path, Path], tmp_path: Path, wire: str
):
    _, _, base, delta = step
    write_wire(wire, delta, base, tmp_path / "source")
    for file in [file for file in sorted((tmp_path / "source").rglob("*")) if file.is_file() and file.stat().st_size]:
        whole = file.read_bytes()
        for size in {0, 3, len(whole) // 2, len(whole) - 1}:
            file.write_bytes(whole[:size])
            assert refused(wire, tmp_path / "source", base), f"{file} of {size} bytes"
        file.unlink()
        assert refused(wire, tmp_path / "source", base), f"without {file}"
        file.write_bytes(whole)
    assert not refused(wire, tmp_path / "source", base)
    assert refused(wire, tmp_path / "nothing", base)
    assert refused(wire, delta, base)


def test_files_of_a_bucket_are_read_by_what_their_metadata_say(step: tuple[Model, Model, Path, Path], tmp_path: Path):
    """Anchors, the checksum of earlier patches, the stand-in for nothing, several files, unknown encodings."""
    before, after, base, _ = step
    all_bytes = b"".join(bits.tobytes() for _, (_, _, bits) in sorted(after.items()))
    digest = hashlib.sha256(all_bytes).hexdigest()
    moved = {name: (dtype, shape, bits ^ 1) for name, (dtype, shape, bits) in before.items() if len(shape) == 1}
    mixed: dict[str, Tensor] = {**before, **moved}
    vectors = {name: (dtype, bits) for name, (dtype, shape, bits) in mixed.items() if len(shape) == 1}
    assert list(vectors) != sorted(vectors)
    of_mixed = hashlib.sha256(b"".join(bits.tobytes() for _, (_, _, bits) in sorted(mixed.items()))).hexdigest()
    flat = {name: (dtype, bits) for name, (dtype, _, bits) in after.items() if name == "layers.0.norm.weight"}
    whole: dict[str, Tensor] = {**before, "layers.0.norm.weight": after["layers.0.norm.weight"]}
    about = {"format": "sparse_weight_patch"}
    for number, (tensors, metadata, expected) in enumerate(
        [
            (flat, {"sparse": "False"}, whole),
            (flat, {"format": "anchor_checkpoint"}, whole),
            ({"__empty_delta__": ("int32", np.zeros(1, "<i4"))}, about, before),
            ({"__empty_delta__": ("int32", np.zeros(1, "<i4"))}, {**about, "checksum_sha256": digest}, None),
            (vectors, {"format": "anchor_checkpoint", "checksum_sha256": of_mixed}, mixed),
            (vectors, {"format": "anchor_checkpoint", "checksum_sha256": digest}, None),
            (flat, {"sparse": "True"}, None),
            (flat, {"format": "patch"}, None),
            ({}, {"sparse": "True", "encoding": "nvcomp_cascaded"}, None),
            ({}, {"sparse": "True", "changed_params": '["scale"]'}, None),
        ]
    ):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(safetensors(tensors, metadata))
        assert refused("huggingface", file, base) == (expected is None), metadata
        assert expected is None or same(replayed(before, tmp_path / "made.shd"), expected)
    as_huggingface(tmp_path / "bucket", parts_of(before, after), before, encoding="indices", checksum_sha256=digest)
    assert not refused("huggingface", tmp_path / "bucket", base)
    assert same(replayed(before, tmp_path / "made.shd"), after)
    assert refused("huggingface", tmp_path / "bucket", write(tmp_path / "other", {**before, "none": after["scale"]}))
    (tmp_path / "bucket" / "anchors").mkdir()
    (tmp_path / "bucket" / "anchors" / "step_000001.safetensors").write_bytes(safetensors({}, {"sparse": "False"}))
    with pytest.raises(sd.SourceError, match="give the file of one step"):
        read_wire("huggingface", tmp_path / "bucket", base, tmp_path / "step.shd")


def test_what_verl_and_vllm_would_take_for_unchanged_is_refused(tmp_path: Path):
    before, after = step_with_nan(np.random.default_rng(0))
    parts, base = parts_of(before, after), write(tmp_path / "base", before)
    as_vllm(tmp_path / "vllm", parts, before)
    assert refused("vllm", tmp_path / "vllm", base)
    as_verl(tmp_path / "verl", parts, before, has_dense=False)
    with pytest.raises(sd.SourceError, match="takes for unchanged"):
        read_wire("verl", tmp_path / "verl", base, tmp_path / "made.shd")


def test_rows_and_columns_beyond_a_byte_are_as_wide_as_they_need(tmp_path: Path):
    rng = np.random.default_rng(0)
    before = {"tall": tensor(rng, (70_000, 2)), "wide": tensor(rng, (3, 70_000)), "long": tensor(rng, (70_000,))}
    after = {name: (dtype, shape, bits.copy()) for name, (dtype, shape, bits) in before.items()}
    for name, at in {"tall": [0, 1, 800], "wide": [0, 69_999, 140_005], "long": [69_999]}.items():
        after[name][2][at] ^= 1
    base = write(tmp_path / "base", before)
    sd.save_delta(tmp_path / "step.shd", set_step(before, after))
    for format in FORMATS:
        write_wire("grail", tmp_path / "step.shd", base, tmp_path / format, format=format)
        assert not refused("grail", tmp_path / format, base)
        assert same(replayed(before, tmp_path / "made.shd"), after)


def test_a_manifest_of_grail_is_compared_with_its_files(step: tuple[Model, Model, Path, Path], tmp_path: Path):
    _, _, base, delta = step
    write_wire("grail", delta, base, tmp_path / "source")
    whole = json.loads((tmp_path / "source" / "metadata.json").read_text())
    digest = hashlib.sha256(b"x").hexdigest()
    (tmp_path / "x").write_bytes(b"x")
    for edit in (
        {"checkpoint_type": "FULL"},
        {"file_manifest": {"../x": digest, **whole["file_manifest"]}},
        {"file_manifest": {**whole["file_manifest"], "delta_sparse.bin.zst": digest}},
        {"file_manifest": {}},
        {"file_manifest": 7},
    ):
        (tmp_path / "source" / "metadata.json").write_text(json.dumps({**whole, **edit}))
        assert refused("grail", tmp_path / "source", base), edit


@pytest.mark.skipif(find_spec("xxhash") is None, reason="xxhash is not installed")
def test_the_hash_of_grail_tells_a_wrong_base(step: tuple[Model, Model, Path, Path], tmp_path: Path):
    before, after, base, delta = step
    write_wire("grail", delta, base, tmp_path / "source", checksum="xxh3-128")
    assert not refused("grail", tmp_path / "source", base)
    assert same(replayed(before, tmp_path / "made.shd"), after)
    other = {**before, "layers.1.same.weight": ("bfloat16", (8, 4), before["layers.1.same.weight"][2] ^ 1)}
    assert refused("grail", tmp_path / "source", write(tmp_path / "other", other))


@pytest.mark.parametrize("wire", WIRES)
@given(st.randoms(use_true_random=False))
def test_a_damaged_step_is_refused_or_changes_known_tensors(
    tmp_path_factory: pytest.TempPathFactory, wire: str, rng: random.Random
):
    """Where a wire has no checksum other values may come of it, and never anything else."""
    root = tmp_path_factory.mktemp("wire")
    before, after = plain_step(np.random.default_rng(0))
    base, delta = write(root / "base", before), root / "set.shd"
    sd.save_delta(delta, set_step(before, after))
    write_wire(wire, delta, base, root / "source")
    file = rng.choice([file for file in sorted((root / "source").rglob("*")) if file.is_file()])
    raw = bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        raw[at : at + rng.randint(0, 4)] = rng.randbytes(rng.choice([1, 4]))
    file.write_bytes(raw)
    if not refused(wire, root / "source", base):
        made = replayed(before, root / "made.shd")
        assert made.keys() == before.keys()
        assert all(made[name][:2] == before[name][:2] for name in made)
