"""KL divergence of a student's logits from a teacher's, in the memory of its gradient.

Logits are the largest tensors of a step: tokens x vocabulary.  Torch's own loss holds several more of that size in
float32.  The functions here work on a few rows at a time and keep only the gradient, in the logits' dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Elements to work on at a time, in float32; as many fit into a GPU's cache.
CHUNK = 1 << 22


def divergence(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """KL(teacher, student) in nats, mean over rows [n, choices], by their weights [n] if given.

    With a single output (a regression), half the squared error.
    """
    if student.shape[-1] == 1:
        return weighted_mean((student.float() - teacher.float()).square()[:, 0], weights) / 2
    result: Tensor = _Divergence.apply(student, teacher, weights)  # type: ignore[no-untyped-call]
    return result


def weighted_mean(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of [n] by weights [n]; all count alike without any."""
    return rows.mean() if weights is None else (rows * weights).sum() / weights.sum()


def divergence_of_labels(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher, student) in nats of independent labels [n, labels], one logit per label: [n]."""
    log = nn.functional.logsigmoid
    s, t = student.float(), teacher.float()
    terms = t.sigmoid() * (log(t) - log(s)) + (-t).sigmoid() * (log(-t) - log(-s))
    return terms.sum(1)


def log_likelihoods(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log likelihood of one token per row, in nats: [n] from logits [n, choices]."""
    step = max(1, CHUNK // logits.shape[-1])
    pairs = zip(torch.split(logits, step), torch.split(tokens, step), strict=True)
    return torch.cat([-nn.functional.cross_entropy(part.float(), own, reduction="none") for part, own in pairs])


def blend(logits: Tensor, tokens: Tensor, shares: Tensor) -> None:
    """Moves a share [n] of each row's probability to one token, in place; the others keep their proportions.

    Softmax depends only on differences, so only the logit of that token changes.  A token that is impossible (-inf)
    stays impossible.
    """
    own, likelihoods = logits.gather(1, tokens[:, None])[:, 0].float(), log_likelihoods(logits, tokens)
    raised = own - likelihoods + torch.logaddexp(likelihoods, (shares / (1 - shares)).log())
    raised = torch.where(own.isfinite() & (shares > 0), raised, own)
    logits.scatter_(1, tokens[:, None], raised.to(logits.dtype)[:, None])


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        rows, choices = student.shape
        number: Tensor | int = rows if weights is None else weights.sum()
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=student.device)
        step = max(1, CHUNK // choices)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            found, wanted = student[part].float().log_softmax(-1), teacher[part].float().log_softmax(-1)
            shares = wanted.exp()
            terms = shares * (wanted - found)
            total += terms.sum() if weights is None else (terms.sum(1) * weights[part]).sum()
            if gradient is not None:
                slope = found.exp_().sub_(shares).div_(number)
                gradient[part] = slope if weights is None else slope.mul_(weights[part, None])
        ctx.gradient = gradient
        return total / number

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grads[0]), None, None
