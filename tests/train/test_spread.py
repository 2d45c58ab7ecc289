"""Training of models that tensor parallelism has spread over processes, against one process with the whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests import ranks

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard") or not dist.is_gloo_available():
    pytest.skip("torch has no FSDP2 here", allow_module_level=True)

from tests.train import spread  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", spread.LAYERS)
def test_bits_are_those_of_one_process(kind: str, count: int, tmp_path: Path):
    """All sums are exact, so their order makes no difference."""
    whole = spread.layer(kind)
    expected = spread.exactly(copy.deepcopy(whole), whole, tmp_path / "one.shd", "rand")
    assert any(one.any() for name, one in expected.items() if name.endswith("values"))
    for found in ranks.run(spread.one_layer, count, tmp_path, kind, tmp_path, "rand"):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], one) for name, one in expected.items())
    assert (tmp_path / "spread.shd").read_bytes() == (tmp_path / "one.shd").read_bytes()


@pytest.mark.parametrize("mask", ["struct", {"0.weight": [103, 3, 0], "0.bias": torch.arange(13) == 12}])
def test_other_masks(mask: Any, tmp_path: Path):
    """With the second one, a process has no nonzero of a weight."""
    whole = spread.layer("columns")
    expected = spread.exactly(copy.deepcopy(whole), whole, tmp_path / "one.shd", mask)
    for found in ranks.run(spread.one_layer, 4, tmp_path, "columns", tmp_path, mask):
        assert all(np.array_equal(found[name], one) for name, one in expected.items())


@pytest.mark.parametrize(("kind", "dtype"), [("columns", torch.bfloat16), ("rows", torch.float16)])
def test_weights_of_16_bits(kind: str, dtype: torch.dtype, tmp_path: Path):
    whole = spread.layer(kind).to(dtype)
    expected = spread.in_half(copy.deepcopy(whole), whole, tmp_path / "one.shd")
    for found in ranks.run(spread.layer_in_half, 2, tmp_path, kind, tmp_path, dtype):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], one) for name, one in expected.items())
    assert (tmp_path / "spread.shd").read_bytes() == (tmp_path / "one.shd").read_bytes()


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        np.allclose(found[name], one, rtol=1e-5, atol=1e-6) for name, one in expected.items()
    )


@pytest.mark.parametrize(("how", "count"), [("two_layers", 2), ("two_layers", 4), ("over_fsdp", 4)])
def test_adam_and_clipped_gradients(how: str, count: int, tmp_path: Path):
    expected = spread.by_adam(spread.net(), [slice(0, 1), slice(1, 2)])
    for found in ranks.run(getattr(spread, how), count, tmp_path):
        assert close(found, expected)


def test_a_model_of_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers", minversion="5.20")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, vocab_size=60, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    expected = spread.llama(0, tmp_path / "base", "rand")
    for found in ranks.run(spread.llama, 2, tmp_path, tmp_path / "base", "rand"):
        assert close(found, expected)


def test_what_is_refused(tmp_path: Path):
    for said in ranks.run(spread.refusals, 2, tmp_path):
        for one, what in zip(
            said, ["mask='wm'", "mask='snip'", "mask='rigsa'", "a pattern N:M", "prune_s", "magn"], strict=False
        ):
            assert one.startswith("TargetError: tensor 'up.weight' is a DTensor, and " + what)
            assert one.endswith("give its Tuner.positions as mask=")
        assert said[6].startswith("ArgumentError: tensor 'up.weight' has another mask in another process")
        assert "with the placements" in said[7]
        assert said[8].startswith("TargetError: parameter 'weight' is in a layer with values that are trained")


def test_what_one_process_refuses_all_refuse(tmp_path: Path):
    one, two = ranks.run(spread.one_process_refuses, 2, tmp_path, tmp_path)
    for said in (one, two):
        for number, name in [(0, "down.weight"), (1, "down.weight"), (2, "norm.weight"), (5, "up.weight.values")]:
            assert said[number].startswith(f"ArgumentError: tensor '{name}' has another mask in another process, or")
        assert said[7] == said[5]
    by_first, by_second = [(3, "save"), (4, "export")], [(6, "load_state_dict"), (8, "reattach"), (9, "attach")]
    for said, other, rank, calls in [(two, one, 0, by_first), (one, two, 1, by_second)]:
        for number, call in calls:
            refusal = f"TargetError: rank {rank} refuses {call}(), so that no rank changes: "
            assert said[number].startswith(refusal + other[number][:50])
    assert "cannot be written" in one[3]
    assert two[6].startswith("DeltaError: the state of 'up.weight' does not fit")
    assert two[8].startswith("ArgumentError: the state is none of Tuner.state_dict")
    assert two[9].startswith("FormatError")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak of memory")
def test_no_process_makes_a_whole_tensor(tmp_path: Path):
    for most in ranks.run(spread.lean, 2, tmp_path, tmp_path, False):
        assert most < 50e6  # of 67 MB; the gradient of its half is 34 MB
    for most in ranks.run(spread.lean, 2, tmp_path, tmp_path, True):
        assert most > 60e6  # a whole tensor is seen
