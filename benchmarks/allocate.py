"""Which weights change: energy kept, and distance of the outputs, by scope and by mask.

all-MiniLM-L6-v2 on the demo's reverse dictionary: the demo's LoRA, and a short full fine-tune made here.  A fit of few
steps, so that a CPU is enough; `python -m benchmarks.allocate` takes some ten minutes on two free cores.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import shiradelta
from benchmarks.table import print_table
from demo.task import embed, load_base, load_split
from demo.train_lora import OUT as LORA
from demo.train_lora import batches, contrastive_loss
from shiradelta.fit import MASKS, Fit
from shiradelta.select.shares import SCOPES

SPARSITY = 0.01
STEPS, BATCH = 60, 32
TEXTS = 1_500
TUNING_STEPS, TUNING_BATCH = 40, 48
LEARNING_RATE = 1e-4


def train_full(out: Path) -> Path:
    """All linear layers and norms of the encoder, with labels."""
    torch.manual_seed(0)
    model, tokenizer = load_base()
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith("encoder."))
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], LEARNING_RATE, weight_decay=0.0)
    stream = batches(load_split().train, random.Random(0))
    encode = partial(embed, model, tokenizer)
    for _ in range(TUNING_STEPS):
        definitions, words = zip(*next(stream)[:TUNING_BATCH], strict=True)
        optimizer.zero_grad()
        contrastive_loss(encode(definitions), encode(words)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.save_pretrained(str(out))
    return out


def main() -> None:
    """Prints the table."""
    base = Path(load_base()[0].name_or_path)
    pairs = random.Random(0).sample(load_split().train, TEXTS)
    texts = [pair.definition for pair in pairs[: TEXTS // 2]] + [pair.word for pair in pairs[TEXTS // 2 :]]
    fit = Fit(texts, steps=STEPS, batch=BATCH, tokens=32, held_out=200, device="cpu")
    rows = [["source", "scope", "mask", "energy of top-k", "distance: base", "top-k", "fitted"]]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, source in (("LoRA r16", LORA), ("full", train_full(root / "full"))):
            for scope, mask in product(SCOPES, MASKS):
                convert: Any = partial(shiradelta.convert, source, root / "a.shd", SPARSITY, base, scope=scope)
                energy = convert().energy_kept
                found = convert(fit=replace(fit, mask=mask)).fit
                distances = (found.base, found.topk, found.fitted)
                rows.append([name, scope, mask, f"{energy:.1%}", *(f"{distance:.4f}" for distance in distances)])
                print(*rows[-1], flush=True)
    print_table(f"{SPARSITY:.0%} of the weights, int4; {STEPS} steps of {BATCH} of {TEXTS:,} texts", rows)


if __name__ == "__main__":
    main()
