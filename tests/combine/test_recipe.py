"""Strengths by tensor, the density of the result, and recipes, which are the same arguments in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import shiradelta as sd
from shiradelta.cli import main
from shiradelta.combine.recipe import read_recipe
from shiradelta.errors import ArgumentError, DeltaError, SourceError
from shiradelta.format.arithmetic import scaled

NAMES = ("model.layers.0.mlp.w", "model.layers.0.q.w", "model.layers.7.mlp.w", "model.layers.12.mlp.w", "norm")


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a.shd and b.shd, on the same positions, with fingerprints."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    base = np.zeros(20, np.uint32)
    for file in ("a.shd", "b.shd"):
        tensors = {
            name: sd.TensorDelta(
                (10, 20), np.arange(20), random.standard_normal(20).astype(np.float32), "float32", base_bits=base
            )
            for name in NAMES
        }
        sd.save_delta(file, tensors, values="f32")


def values(file: str) -> dict[str, np.ndarray]:
    with sd.open_delta(file) as delta:
        return {name: tensor.values() for name, tensor in delta.items()}


def test_the_first_pattern_that_matches_counts():
    rules = {"layers 7-12": 0.5, "*.mlp.*": 2.0, "norm": 0, "*": -1.0}
    sd.fuse({"a.shd": rules, "b.shd": 0.3}, "out.shd")
    a, b, out = values("a.shd"), values("b.shd"), values("out.shd")
    strengths = dict(zip(NAMES, (2.0, -1.0, 0.5, 0.5, None), strict=True))
    for name, strength in strengths.items():
        added = scaled(b[name], 0.3)
        sums = added if strength is None else scaled(a[name], strength) + added  # of two numbers, in either order
        assert np.array_equal(out[name], sums), name
    with sd.open_delta("out.shd") as delta:
        assert "{layers 7-12: 0.5, *.mlp.*: 2, norm: 0, *: -1} a.shd" in delta.metadata["source"]


def test_one_strength_for_all_tensors_is_the_same_as_a_number():
    for method in ("sum", "mean", "slerp", "ties"):
        sd.fuse({"a.shd": {"*": 0.7}, "b.shd": 0.3}, "rules.shd", method)
        sd.fuse({"a.shd": 0.7, "b.shd": 0.3}, "numbers.shd", method)
        with sd.open_delta("rules.shd") as one, sd.open_delta("numbers.shd") as other:
            assert one.digest == other.digest, method


def test_a_tensor_that_all_leave_out_is_not_in_the_result():
    sd.fuse({"a.shd": {"norm": 0, "*": 1}, "b.shd": {"norm": 0, "*": 1}}, "out.shd")
    assert set(values("out.shd")) == set(NAMES) - {"norm"}
    with pytest.raises(ArgumentError, match="all strengths are 0"):
        sd.fuse({"a.shd": {"*": 0}}, "none.shd")
    assert not Path("none.shd").exists()


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"*.mpl.*": 1, "*": 1}, r"a.shd: no tensor is called '\*.mpl.\*' \(there is '"),
        ({"layers 8-9": 1, "*": 1}, "no tensor is called 'layers 8-9'"),
        ({"*.mlp.*": 1}, r"no pattern matches tensor 'model.layers.0.q.w'.*end with '\*'"),
        ({"*": 1, "*.mlp.*": 2}, r"pattern '\*.mlp.\*' comes after others that match all of it; put it first"),
        ({}, "no pattern matches tensor"),
    ],
)
def test_patterns_that_leave_a_question_are_refused(rules: dict[str, float], said: str):
    with pytest.raises(ArgumentError, match=said):
        sd.fuse({"a.shd": rules}, "out.shd")
    assert not Path("out.shd").exists()


def test_slerp_has_no_share_for_a_tensor_that_one_leaves_out():
    with pytest.raises(DeltaError, match="slerp takes two deltas with strengths above 0"):
        sd.fuse({"a.shd": {"norm": 0, "*": 1}, "b.shd": 1}, "out.shd", "slerp")


def test_density_keeps_the_largest_changes_and_no_wrong_fingerprint():
    sd.fuse({"a.shd": 1, "b.shd": 1}, "all.shd")
    sd.fuse({"a.shd": 1, "b.shd": 1}, "few.shd", density=0.02)
    with sd.open_delta("all.shd") as every, sd.open_delta("few.shd") as few:
        for name in NAMES:
            kept = np.sort(np.argsort(-np.abs(every[name].values()), kind="stable")[:4])
            assert np.array_equal(few[name].positions(), every[name].positions()[kept])
            assert np.array_equal(few[name].values(), every[name].values()[kept])
            assert every[name].base_fingerprint is not None
            assert few[name].base_fingerprint is None
    sd.fuse({"a.shd": 1, "b.shd": 1}, "wide.shd", density=0.5)  # more than there are
    with sd.open_delta("all.shd") as every, sd.open_delta("wide.shd") as wide:
        assert wide.digest == every.digest
        assert wide["norm"].base_fingerprint == every["norm"].base_fingerprint
    with pytest.raises(ArgumentError, match="not a share"):
        sd.fuse({"a.shd": 1}, "out.shd", density=2)


RECIPE = """\
deltas:
  a.shd:
    layers 0-7: 0.3
    "*.mlp.*": 0.8
    "*": 1
  b.shd: 0.7
method: ties
density: 2%
values: f16
"""


def test_a_recipe_is_the_arguments_of_fuse():
    Path("merge.yml").write_text(RECIPE)
    rules = {"layers 0-7": 0.3, "*.mlp.*": 0.8, "*": 1.0}
    arguments = {"deltas": {"a.shd": rules, "b.shd": 0.7}, "method": "ties", "density": 0.02, "values": "f16"}
    assert read_recipe("merge.yml") == arguments
    result = CliRunner().invoke(main, ["fuse", "--recipe", "merge.yml", "-o", "recipe.shd"])
    assert result.exit_code == 0, result.output
    sd.fuse(out="call.shd", **arguments)
    assert Path("recipe.shd").read_bytes() == Path("call.shd").read_bytes()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("delta: {a.shd: 1}", "key 'delta' is unknown; did you mean 'deltas'?"),
        ("deltas: {a.shd: 1}\nlambda: 1", "key 'lambda' is unknown; take deltas, method"),
        ("deltas: {a.shd: 1}\n1: 2", "key 1 is unknown"),
        ("deltas: {a.shd: 1, a.shd: 2}", "line 1: is not YAML that can be read (key 'a.shd' stands twice)"),
        ("deltas: {a.shd: one}", "deltas is {'a.shd': 'one'}; give a mapping of files to strengths"),
        ("deltas: {a.shd: {'*': {b: 1}}}", "give a mapping of files to strengths"),
        ("deltas: [a.shd]", "deltas is ['a.shd']; give a mapping"),
        ("deltas: {a.shd: true}", "give a mapping of files to strengths"),
        ("deltas: {}", "names nothing to fuse"),
        ("method: sum", "names nothing to fuse"),
        ("deltas: {a.shd: 1}\ndensity: lots", "density is 'lots'; give a share such as 1%"),
        ("deltas: {a.shd: 1}\nseed: 1.5\nmethod: dare", "seed is 1.5; give a whole number"),
        ("deltas: {a.shd: 1}\ndrop: 10%", "drop means nothing to method sum; leave it out"),
        ("deltas: {a.shd: 1}\nmethod: tie", "merge method 'tie' is unknown"),
        ("- a.shd", "is not a mapping"),
        ("", "is not a mapping"),
        ("deltas: {a.shd: 1", "is not YAML that can be read"),
        ("deltas: !!python/object/apply:os.getcwd []", "is not YAML that can be read"),
        ("a: &a [1]\nb: *c", "is not YAML that can be read"),
        ("[" * 1000, "is not YAML that can be read"),
        ("? {a: 1}\n: 2", "is not YAML that can be read"),
        ("\x00", "is not YAML that can be read"),
        ("# " + "a" * (1 << 20), "is larger than any recipe"),
    ],
)
def test_recipes_that_are_not_understood_are_refused(text: str, said: str):
    Path("merge.yml").write_text(text)
    with pytest.raises((SourceError, ArgumentError)) as caught:
        read_recipe("merge.yml")
    assert said in str(caught.value)
    result = CliRunner().invoke(main, ["fuse", "--recipe", "merge.yml", "-o", "out.shd"])
    code = 2 if isinstance(caught.value, ArgumentError) else 1
    assert (result.exit_code, result.output) == (code, f"error: {caught.value}\n")
    assert not Path("out.shd").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("a.shd --recipe merge.yml", "FILE is for fusing without a recipe"),
        ("--recipe merge.yml --method ties", "--method is for fusing without a recipe"),
        ("", "Missing argument 'FILE[:STRENGTH]...'"),
    ],
)
def test_a_recipe_stands_alone(words: str, said: str):
    Path("merge.yml").write_text(RECIPE)
    result = CliRunner().invoke(main, ["fuse", "-o", "out.shd", *words.split()])
    assert result.exit_code == 2
    assert said in result.output
