"""A model from a folder, for routes of text prompts; and the weight average that a route gives, as a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.combine.fuse import Source, fuse
from shiradelta.errors import BaseMismatchError, TargetError
from shiradelta.experts.family import ExpertFamily
from shiradelta.experts.routing import ExpertRouter
from shiradelta.experts.texts import prompt_loss
from shiradelta.format import registry
from shiradelta.io.download import local_model
from shiradelta.models import loading
from shiradelta.models.candidates import refuse_several
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.models.placement import pick_device
from shiradelta.train.gradients import Loss
from shiradelta.train.subject import stored_dtype
from shiradelta.util.files import check_target
from shiradelta.util.progress import Progress

#: Prompts whose gradients are taken together.
TOGETHER = 16


@dataclass(frozen=True)
class LiveModel:
    """A model that routes prompts.

    Attributes:
        folder: where it is from.
        model: in evaluation mode, in the dtype in which it is stored.
        prompt_loss: of the tokens of prompts.
    """

    folder: Path
    model: nn.Module
    prompt_loss: Loss

    def routes(
        self, family: ExpertFamily, prompts: Sequence[Any], progress: Progress
    ) -> tuple[list[dict[str, float]], dict[str, float]]:
        """(the route of each prompt, the route of all as one group).

        Raises:
            BaseMismatchError: the family is another model's, or the folder has deltas on it.
        """
        try:
            router = ExpertRouter(self.model, family, self.prompt_loss, TOGETHER)
        except BaseMismatchError as error:
            raise BaseMismatchError(
                f"{self.folder}: is not the model that {family.folder} was made for, or has deltas on it; give its base"
                f" model, or take them out with `shiradelta revert {self.folder}`"
            ) from error
        routes = router.each(prompts, progress)
        return routes, routes[0] if len(routes) == 1 else router.route(prompts, progress)


def open_live(folder: Path, tokens: int, device: str | None) -> LiveModel:
    """Loads a language model.

    Args:
        folder: a folder that transformers loads, or a name on the Hub.
        tokens: longer prompts are cut.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.

    Raises:
        SourceError: the model cannot be used.
    """
    folder = local_model(folder)
    refuse_several(folder)
    dtype = stored_dtype(open_checkpoint(folder))
    where = pick_device(device)
    of_prompts = prompt_loss(loading.load_tokenizer(folder), tokens)
    # As in training: activations in float16 may overflow.
    casting: Any = torch.autocast(where.type, torch.bfloat16) if dtype == torch.float16 else nullcontext()

    def loss(model: nn.Module, prompts: Sequence[Any]) -> Tensor:
        with casting:
            return of_prompts(model, prompts)

    return LiveModel(folder, loading.load_model(folder, folder, [where], dtype).eval(), loss)


def check_average(family: ExpertFamily, out: str | os.PathLike[str]) -> None:
    """Checks, before long work, that an average can be written.

    Raises:
        TargetError: the file cannot be written, is of another kind, or lies in the family's folder, where it would
            replace a member, or be taken for one.
    """
    path = Path(out)
    check_target(path, registry.MAGIC, "a .shd file")
    if path.absolute().parent.samefile(family.folder):
        raise TargetError(f"{path}: lies in the folder of the family, which holds its members alone; give another name")


def write_average(family: ExpertFamily, strengths: Mapping[str, float], out: str | os.PathLike[str]) -> None:
    """Writes the experts' weight average as one delta, which changes weights as `HotSwap.switch(strengths)` does.

    Raises:
        TargetError: as `check_average`.
    """
    check_average(family, out)
    parts: dict[Source, float] = {family.path(name): strength for name, strength in strengths.items()}
    fuse(parts, out, method="sum", values="f32")
