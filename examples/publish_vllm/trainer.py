"""The process that trains: it publishes the weights, as the model's folder has them, after every step of AdamW."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from shiradelta.chain import Chain

RATE, TEXTS, TOKENS = 1e-5, 4, 32


def train(model_dir: Path, chain_dir: Path, steps: int, every: float) -> None:
    """Trains on random texts.

    Args:
        model_dir: the model at version 0.
        chain_dir: the chain; beside it, the folder "trained" keeps the model at its newest version.
        steps: how many to publish.
        every: seconds from one step to the next, at least.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chain, before = Chain.open(chain_dir), model_dir
    stored = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for version in range(1, steps + 1):
        begun = time.monotonic()
        texts = torch.randint(model.config.vocab_size, (TEXTS, TOKENS))
        torch.autograd.backward(model(input_ids=texts, labels=texts).loss)
        optimizer.step()
        optimizer.zero_grad()
        stored.load_state_dict(model.state_dict())  # rounds
        after = chain_dir.parent / "trained" / str(version)
        stored.save_pretrained(after)
        chain.publish(after, base=before, version=version)
        if before != model_dir:
            shutil.rmtree(before)
        before = after
        time.sleep(max(0.0, begun + every - time.monotonic()))
