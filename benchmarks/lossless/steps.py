"""Consecutive checkpoints: of real training steps, and of independent changes; and what their changes take at least."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks.models import LLAMA_7B_LAYER
from demo.task import embed, load_base
from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array
from shiradelta.format.entropy import entropy

RATES = (1e-6, 1e-5)
STEPS, BATCH = 12, 32
#: Shares of the weights that change independently.
DENSITIES = (0.0005, 0.015, 0.1)
#: Nine of ten move by one unit, the others by m > 1 units as often as 1 / m^2.  So do they in steps of AdamW on
#: all-MiniLM-L6-v2 (0.906, 0.039, 0.017, 0.008, ... at 1e-6): a unit shrinks with its weight, and weights are about as
#: dense near 0 as at 0.
UNITS = np.arange(1, 128, dtype="<i2")
ODDS = np.where(UNITS == 1, 0.9, 0.1 / UNITS**2.0 / (1 / UNITS[1:] ** 2.0).sum())
State = Mapping[str, torch.Tensor]


def texts() -> list[tuple[str, str]]:
    """Names and docstrings of NumPy, as pairs to pull together."""
    found = []
    for file in sorted(Path(np.__file__).parent.rglob("*.py"))[:150]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and len(about := ast.get_docstring(node) or "") > 80:
                found.append((node.name.replace("_", " "), about[:220]))
    return found


def steps(rate: float) -> Iterator[State]:
    """The model after each step, in bfloat16."""
    torch.manual_seed(0)
    (model, tokenizer), pairs, rng = load_base(), texts(), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate)
    while True:
        chosen = [pairs[i] for i in rng.choice(len(pairs), BATCH, replace=False)]
        names, about = (embed(model, tokenizer, some) for some in zip(*chosen, strict=True))
        scores = names @ about.T
        loss = torch.nn.functional.cross_entropy(scores * 20, torch.arange(BATCH))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        floats = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        yield {name: tensor.bfloat16() for name, tensor in floats.items()}


def language_steps(folder: Path, examples: Path, rate: float) -> Iterator[State]:
    """A language model after each step on prompts with their completions, in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with examples.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    optimizer = torch.optim.AdamW(model.float().train().parameters(), lr=rate)
    rng = np.random.default_rng(0)
    while True:
        chosen = [rows[i]["prompt"] + rows[i]["completion"] for i in rng.choice(len(rows), BATCH // 4, replace=False)]
        batch = tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=96)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        torch.autograd.backward(model(**batch, labels=labels).loss)
        optimizer.step()
        yield {name: tensor.detach().bfloat16() for name, tensor in model.named_parameters()}


def independent(density: float, layers: int = 1) -> tuple[State, State]:
    """Random weights in the shapes of Llama-2-7B, and the same with changes that are independent of everything."""
    generator, rng, base, tuned = torch.Generator().manual_seed(0), np.random.default_rng(0), {}, {}
    for name, shape in ((f"{layer}.{name}", each) for layer in range(layers) for name, each in LLAMA_7B_LAYER.items()):
        base[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        tuned[name] = base[name].clone()
        new, size = bits(tuned[name]), base[name].numel()
        at = np.flatnonzero(rng.random(size, np.float32) < density)
        shifts = rng.choice(UNITS, at.size, p=ODDS) * rng.choice(np.array([1, -1], "<i2"), at.size)
        new[at] = arithmetic.shift(new[at], "bfloat16", shifts)
    return base, tuned


def bits(tensor: torch.Tensor) -> Array:
    """The elements as uint16; the tensor's memory where it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint16).numpy()


def floor(base: State, tuned: State, least: int = 0) -> tuple[float, int]:
    """(bits of independent changes: positions and shifts by their entropies, the number of changes), by tensor.

    Args:
        base: before.
        tuned: after.
        least: only tensors of more elements count.
    """
    total, changed = 0.0, 0
    for name, tensor in base.items():
        old, new = bits(tensor), bits(tuned[name])
        at = np.flatnonzero(old != new)
        if tensor.numel() <= least or not at.size:
            continue
        shifts = arithmetic.shifts_between(old[at], new[at], "bfloat16")
        assert shifts is not None
        _, counts = np.unique(shifts, return_counts=True)
        share = counts / at.size
        total += at.size * (entropy(at.size, old.size) - float(share @ np.log2(share)))
        changed += at.size
    return total, changed
