"""The process that trains: it waits for the answers of a version, takes a step, and publishes the next version."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from examples.rl.files import load_answers, save_model, wait
from examples.rl.policy import Policy, log_likelihood
from shiradelta.chain import Chain

RATE = 5e-5


def train(root: Path, updates: int) -> None:
    """Reinforces right answers, and publishes each version to the chain in `root`.

    Args:
        root: has the chain, the folder "model" with version 0, and "float.pt" with its float32 weights.
        updates: how many steps to take.
    """
    parent = os.getppid()
    policy, chain = Policy(), Chain.open(root / "chain")
    policy.load_state_dict(torch.load(root / "float.pt", weights_only=True))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0)
    before = root / "model"
    for version in range(updates):
        path = root / "answers" / f"{version}.pt"
        wait(path.exists, lambda: os.getppid() == parent)
        found = load_answers(path)
        advantage = found["rewards"] - found["rewards"].mean()
        loss = -(advantage * log_likelihood(policy, found["asked"], found["answers"])).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        after = save_model(policy, root / "trained" / str(version + 1))
        chain.publish(after, base=before, version=version + 1)
        if before != root / "model":
            shutil.rmtree(before)
        before = after


def train_on_one_core(root: Path, updates: int) -> None:
    """As `train`; what a new process begins with."""
    torch.set_num_threads(1)
    train(root, updates)
