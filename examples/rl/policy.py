"""A tiny transformer that adds numbers, and the task whose answers can be verified: "7+8=" is "15"."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

DIGITS, PLUS, EQUALS, TOKENS = 10, 10, 11, 12
PROMPT, ANSWER = 4, 2
WIDTH, HEADS, BLOCKS = 64, 4, 2


class Block(nn.Module):
    """Attention to earlier tokens, then two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) -> the same."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        found: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return found


class Policy(nn.Module):
    """Tokens -> logits of the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(TOKENS, WIDTH), nn.Embedding(PROMPT + ANSWER, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, DIGITS)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, DIGITS)."""
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x))
        return found


def prompts(rng: np.random.Generator, count: int) -> Tensor:
    """Random sums to do, (count, PROMPT)."""
    left, right = rng.integers(0, DIGITS, (2, count))
    return torch.from_numpy(np.stack([left, np.full(count, PLUS), right, np.full(count, EQUALS)], 1))


def solutions(asked: Tensor) -> Tensor:
    """The right answers, (count, ANSWER)."""
    total = asked[:, 0] + asked[:, 2]
    return torch.stack([total // 10, total % 10], 1)


def rewards(asked: Tensor, answers: Tensor) -> Tensor:
    """1 for a sum that is right, 0 for any other."""
    return (answers == solutions(asked)).all(1).float()


def answered(policy: Policy, asked: Tensor, random: torch.Generator) -> Tensor:
    """Answers that are sampled digit by digit, (count, ANSWER)."""
    tokens = asked
    with torch.no_grad():
        for _ in range(ANSWER):
            share = policy(tokens)[:, -1].float().softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(share, 1, generator=random)], 1)
    return tokens[:, PROMPT:]


def log_likelihood(policy: Policy, asked: Tensor, answers: Tensor) -> Tensor:
    """Of each answer, (count,)."""
    logits: Tensor = policy(torch.cat([asked, answers[:, :-1]], 1))[:, PROMPT - 1 :]
    return logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0].sum(1)


def pretrained(steps: int) -> Policy:
    """A policy that has imitated answers of which many are wrong: it is right now and then."""
    torch.manual_seed(0)
    policy, rng = Policy(), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        asked = prompts(rng, 128)
        answers = solutions(asked)
        wrong = torch.from_numpy(rng.random(len(asked)) < 0.5)
        answers = torch.where(wrong[:, None], torch.from_numpy(rng.integers(0, DIGITS, (len(asked), ANSWER))), answers)
        loss = -log_likelihood(policy, asked, answers).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return policy
