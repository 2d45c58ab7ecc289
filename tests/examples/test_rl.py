"""The example of reinforcement learning: two processes, one chain, the same bits."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from examples.rl.__main__ import differing, main, prepare
from examples.rl.files import wait
from examples.rl.generator import generate
from examples.rl.policy import prompts, rewards, solutions
from examples.rl.trainer import train
from shiradelta.chain import Chain


@pytest.mark.slow
def test_the_generator_has_the_trainers_weights_at_every_version(tmp_path: Path):
    """The trainer is a thread here, which begins at once."""
    prepare(tmp_path, 2)
    trainer = Thread(target=train, args=(tmp_path, 3), daemon=True)
    trainer.start()
    policy, rows = generate(tmp_path, 3, trainer.is_alive)
    trainer.join(10)
    assert differing(policy, tmp_path, 3) == 0
    assert [row.version for row in rows] == [0, 1, 2, 3]
    assert all(0 < row.changed < 1 and row.bytes for row in rows[1:])
    assert all(0 <= row.reward <= 1 for row in rows)
    assert Chain.open(tmp_path / "chain").verify() == []


@pytest.mark.slow  # a new process imports torch
def test_two_processes_have_the_same_weights(tmp_path: Path):
    found = CliRunner().invoke(main, [str(tmp_path / "run"), "--updates", "3", "--imitated", "2"])
    assert found.exit_code == 0, found.output
    assert "0 weights differ" in found.output
    assert (tmp_path / "run" / "rl.png").exists()


def test_a_reward_is_for_the_right_sum_alone():
    asked = prompts(np.random.default_rng(0), 50)
    right = solutions(asked)
    assert rewards(asked, right).tolist() == [1] * 50
    assert rewards(asked, (right + torch.tensor([0, 1])) % 10).sum() == 0
    first = torch.tensor([[7, 10, 8, 11]])
    assert solutions(first).tolist() == [[1, 5]]


def test_who_waits_for_a_process_that_has_ended_is_told():
    with pytest.raises(RuntimeError, match="has ended"):
        wait(lambda: False, lambda: False)
