"""Adapters that PEFT itself merges, against its merge of the whole model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shiradelta
from benchmarks.sources import peft_types as sources
from benchmarks.sources.case import outcome
from converters.peft_config import TYPES
from shiradelta.errors import SourceError

#: Types that are compared each time; the others are slow.
QUICK = ("IA3", "LN_TUNING", "OFT", "VERA", "TRAINABLE_TOKENS")
SLOW = sorted(set(sources.TYPES) - {*QUICK, *TYPES})


@pytest.fixture(scope="module")
def model() -> Any:
    return sources.small_model()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", QUICK)
def test_the_changes_are_those_of_pefts_merge(tmp_path: Path, model: Any, kind: str):
    assert outcome(sources.case(model, kind), tmp_path) == "exact"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SLOW)
def test_a_type_of_pefts_is_exact_or_refused(tmp_path: Path, model: Any, kind: str):
    """As the documentation says of PEFT 0.21."""
    found = outcome(_case(model, kind), tmp_path)
    if found.startswith("not made") and "is required" in found:
        pytest.skip(found)
    page = (Path(__file__).parents[2] / "docs/sources.md").read_text()
    exact = re.search(r"PEFT's merge, a layer at a time \| (.*) \|", page)
    assert exact is not None
    assert (found == "exact") == (kind in exact[1].split(", ")), found
    assert "WRONG" not in found


def _case(model: Any, kind: str) -> sources.Case:
    if kind == "BEFT":  # changes biases
        return sources.case(sources.small_model(bias=True), kind, target_modules=["q_proj"])
    return sources.case(model, kind)


def refused(folder: Path, base: Path | None, match: str) -> None:
    with pytest.raises(SourceError, match=match) as caught:
        shiradelta.convert(folder, base=base)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_refused_in_a_line(tmp_path: Path, model: Any):
    base, adapter = tmp_path / "base", sources.save_adapter(tmp_path / "adapter", model, "IA3")
    model.save_pretrained(base)
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    held, about = load_file(file), json.loads(config.read_text())
    refused(adapter, None, "is of type IA3, which PEFT itself has to merge, for which it needs the base")
    first = min(held)
    for tensors, match in (
        ({key: tensor for key, tensor in held.items() if key != first}, "is lacking in the layers that PEFT"),
        ({**held, "base_model.model.elsewhere.ia3_l": torch.ones(3)}, "elsewhere.* has no place in the layers"),
        ({**held, "base_model.model.model.norm.weight": torch.ones(32)}, "norm.* has no place in the layers"),
        ({**held, first: torch.ones(3)}, "cannot load"),
        ({**held, first: torch.full_like(held[first], torch.nan)}, "NaN"),
    ):
        save_file(tensors, file)
        refused(adapter, base, match)
    save_file(held, file)
    for change, match in (
        ({"target_modules": ["elsewhere"], "feedforward_modules": []}, "cannot load"),
        ({"tomorrow": 1}, "cannot read its configuration"),
        ({"peft_type": "TOMORROW"}, "knows no type TOMORROW; upgrade peft"),
        ({"peft_type": "XLORA"}, "mixes adapters by the text; no change of weights does the same"),
        ({"n": 1 << 40}, "has a number of no adapter"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save in an adapter of type IA3"),
    ):
        config.write_text(json.dumps({**about, **change}))
        refused(adapter, base, match)
    config.write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}))
    refused(adapter, base, "trains inputs of the model and not its weights; no change of weights does the same")
    config.write_text(json.dumps(about))
    (base / "config.json").unlink()
    refused(adapter, base, "transformers cannot build its model")


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_the_base_shares_is_not_changed_for_one_layer(tmp_path: Path):
    tied = sources.small_model(tied=True)
    adapter = sources.save_adapter(tmp_path / "adapter", tied, "TRAINABLE_TOKENS")
    tied.save_pretrained(tmp_path / "base")
    refused(adapter, tmp_path / "base", "the base shares 'model.embed_tokens.weight' with other layers")
