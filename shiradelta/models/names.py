"""Tensor names: matching those of a delta with those of a model, and what a name says about its tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from shiradelta.models.checkpoint import Checkpoint

#: Prefixes that `rename_all` tries.
_TRIED = 4


def tied_slot(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> str | None:
    """The stored name of a tied output embedding, which files leave out; None if `name` is no such tensor.

    Args:
        checkpoint: where to look.
        name: of the tensor that the files lack.
        shape: of that tensor.
    """
    component, _, leaf = name.rpartition("/")
    if not leaf.endswith(("lm_head.weight", "embed_out.weight", "predictions.decoder.weight")):
        return None
    inputs = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
    found = [
        other
        for other, slot in checkpoint.items()
        if other.endswith(inputs) and other.rpartition("/")[0] == component and slot.shape == shape
    ]
    if len(found) == 1 and checkpoint.config(found[0]).get("tie_word_embeddings", True):
        return found[0]
    return None


def match_names(wanted: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> dict[str, str]:
    """Finds names in a checkpoint: as `rename_all`, and tied output embeddings under the input's name.

    Args:
        wanted: name -> shape.
        checkpoint: where to look.

    Returns:
        wanted name -> name in the checkpoint, without those that are not found.
    """
    best = rename_all(wanted, checkpoint)
    for name, shape in wanted.items():
        if name not in best and (tied := tied_slot(checkpoint, name, shape)) is not None:
            best[name] = tied
    return best


def rename_all(wanted: Collection[str], have: Collection[str]) -> dict[str, str]:
    """Finds names among others, with one prefix added or removed if that finds more (`bert.encoder` for `encoder`).

    Args:
        wanted: the names to find.
        have: the names that exist.

    Returns:
        wanted name -> existing name, without those that are not found.
    """
    best: dict[str, str] = {}
    for rename in _renamings(wanted, have):
        found = {name: other for name in wanted if (other := rename(name)) is not None and other in have}
        if len(found) > len(best):
            best = found
    return best


@dataclass(frozen=True)
class _Rename:
    """Replaces one prefix by another; None for names without it."""

    away: str = ""
    put: str = ""

    def __call__(self, name: str) -> str | None:
        return self.put + name[len(self.away) :] if name.startswith(self.away) else None


def _renamings(wanted: Collection[str], have: Collection[str]) -> list[_Rename]:
    """The identity, and the prefixes that would find most of the missing names."""
    missing = dict.fromkeys(name for name in wanted if name not in have)
    finds: Counter[_Rename] = Counter()
    if missing:
        finds.update(_Rename(put=head) for other in have for head, tail in _tails(other) if tail in missing)
        finds.update(_Rename(away=head) for name in missing for head, tail in _tails(name) if tail in have)
    return [_Rename(), *(rename for rename, _ in finds.most_common(_TRIED))]


def _tails(name: str) -> Iterator[tuple[str, str]]:
    """The name split in two, after each separator."""
    return ((name[: cut.end()], name[cut.end() :]) for cut in re.finditer("[./]", name))


def layer_of(name: str) -> str:
    """A tensor's name up to its first number, which counts layers ("model.layers.3"); all of it if there is none."""
    found = re.match(r".*?[._]\d+(?=[._])", name)
    return found.group() if found else name


def in_model_order(names: Iterable[str]) -> list[str]:
    """Sorted, with numbers by value: layer 2 comes before layer 10."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"[./]", name)]

    return sorted(names, key=key)
