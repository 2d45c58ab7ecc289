"""The process that generates: its policy follows the chain, and every answer has the version that gave it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import shiradelta as sd
from examples.rl.files import save_answers, wait
from examples.rl.policy import Policy, answered, prompts, rewards
from shiradelta.chain import Chain, LiveFollower

BATCH = 256


@dataclass(frozen=True)
class Synced:
    """What a version of the policy earned, and what it took to get there.

    Attributes:
        version: the version.
        reward: the share of its answers that are right.
        changed: the share of the weights that the step to it has changed.
        bytes: the size of that step's file.
    """

    version: int
    reward: float
    changed: float
    bytes: int


def generate(root: Path, updates: int, alive: Callable[[], bool]) -> tuple[Policy, list[Synced]]:
    """Answers with each version of the chain in `root` until there are `updates` steps.

    Args:
        root: as for `examples.rl.trainer.train`.
        updates: how many steps the trainer takes.
        alive: whether the trainer still runs.

    Returns:
        The policy at the last version, in bf16, and a row for each version.
    """
    policy = Policy().bfloat16()
    policy.load_state_dict(load_file(root / "model" / "model.safetensors"))
    chain = Chain.open(root / "chain")
    follower = LiveFollower(chain, sd.HotSwap(policy), version=0)
    rng, random = np.random.default_rng(1), torch.Generator().manual_seed(1)
    weights, rows = sum(tensor.numel() for tensor in policy.parameters()), []
    changed, size = 0.0, 0
    for version in range(updates + 1):
        if version:
            wait(lambda: chain.refresh().head >= version, alive)  # noqa: B023 - called at once
            follower.follow(version)
            step = chain.way(version - 1, version).steps[0]
            with chain.open_step(step) as delta:
                changed, size = delta.nnz / weights, step.bytes
        asked = prompts(rng, BATCH)
        answers = answered(policy, asked, random)
        earned = rewards(asked, answers)
        rows.append(Synced(follower.version, float(earned.mean()), changed, size))
        save_answers(root / "answers" / f"{version}.pt", {"asked": asked, "answers": answers, "rewards": earned})
    return policy, rows
