"""`load`: a delta on a live model in one line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shiradelta.errors import ArgumentError
from shiradelta.hotswap.matching import Names
from shiradelta.hotswap.session import HotSwap
from shiradelta.hotswap.strengths import by_part
from shiradelta.io.reader import Source, open_delta
from shiradelta.models.strengths import Strength, first_patterns
from shiradelta.signing.keys import Keys
from shiradelta.signing.verify import local_with_signature
from shiradelta.util.arguments import ANY, NAMES, OPEN, STRENGTH, checked


@checked(model=ANY, source=OPEN, strength=STRENGTH, names=NAMES)
def load(
    model: Any,
    source: Source,
    strength: Strength = 1.0,
    *,
    name: str | None = None,
    names: Names | None = None,
    backend: str = "auto",
    check: bool = True,
    allow_dtype: bool = False,
    skip: str | Sequence[str] | None = (),
    key: Keys | None = None,
    limit: int | str | None = None,
) -> HotSwap:
    """Loads a delta into a live model and makes it active.  On every error the weights stay as they were.

    Args:
        model: a torch module, a pipeline of transformers or diffusers, or a mapping of tensors, as for `HotSwap`; or a
            `HotSwap`, in which the delta becomes active beside those that are active there.
        source: a path, also `user/repo[@revision][/file]` on the Hub; bytes, or a binary file.
        strength: alpha; 0 loads the delta only.  Or {pattern: alpha}, a pattern being a component of a pipeline, a glob
            of the file's names, or "layers 0-15", which counts layers by the first number in a name.  The first one
            that matches a tensor counts, and each tensor needs one.  A pattern's tensors are an adapter "name/pattern".
        name: what to call the adapter; None for the file's name without its suffix, or "delta" where it has none.
        names: the file's names -> the model's, as for `HotSwap`.
        backend: as for `HotSwap`.
        check: refuse a base whose fingerprint differs.
        allow_dtype: take an adapter that was made against a base of another dtype.
        skip: glob patterns of tensors that may be left out, as in `HotSwap.load`.
        key: a file of public keys, or several: refuse what is not signed by one of them.
        limit: the most memory that decoding a tensor may take; see `open_delta`.

    Returns:
        The session: `swap[name] = 0.5` changes the strength, `swap.revert()` takes everything out, bit for bit.

    Raises:
        ArgumentError: a session is given, and `names` or `backend`, which it has already; or its adapter has this name.
        BaseMismatchError: the delta does not fit the model.
        TargetError: a tensor cannot be written, or another session is active on it: give that session instead.
        FormatError: the file is refused.
        ArgumentError: a pattern matches no tensor, or no pattern matches a tensor.
        DeltaError: the delta cannot have this strength.
        LimitError: a tensor takes more memory than `limit` allows.
        SignatureError: the file is not signed by any of the keys.
    """
    if isinstance(model, HotSwap):
        if names is not None or backend != "auto":
            raise ArgumentError("names and backend are those of the session, which is given; leave them out")
        swap = model
    else:
        swap = HotSwap(model, names, backend)
    source = local_with_signature(source, key)
    name = _default_name(source) if name is None else name
    parts: dict[str, list[str] | None] = {name: None}
    if isinstance(strength, Mapping):
        if not isinstance(source, str | os.PathLike | bytes):
            source = memoryview(source.read()).tobytes() if hasattr(source, "read") else source
        with open_delta(source, limit=limit) as delta:
            patterns = first_patterns(strength, delta, delta.file or name)
        parts = {f"{name}/{one}": [own for own, other in patterns.items() if other == one] for one in strength}
    begun: list[str] = []
    try:
        for part, only in parts.items():
            swap.load(part, source, check=check, allow_dtype=allow_dtype, skip=skip, only=only, key=key, limit=limit)
            begun.append(part)
        if wanted := {part: one for part, one in by_part(name, strength).items() if one}:
            swap.switch({**swap.active, **wanted})
    except BaseException:
        for part in begun:
            if part not in swap.active:
                with suppress(ArgumentError):
                    swap.unload(part)
        raise
    return swap


def _default_name(source: Source) -> str:
    """What an adapter is called for which no name is given."""
    return Path(source).stem if isinstance(source, (str, os.PathLike)) else "delta"
