"""Checks of steps and models against what a chain says of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shiradelta.backends.choose import choose
from shiradelta.chain.fold import check_base
from shiradelta.chain.manifest import Manifest
from shiradelta.chain.state import State, state_digest, state_of
from shiradelta.errors import ChainError
from shiradelta.format import arithmetic
from shiradelta.format.windows import windows_of
from shiradelta.io.reader import Delta, open_delta
from shiradelta.models.checkpoint import Checkpoint, bits_of, open_checkpoint


def check_contents(delta: Delta, base: Checkpoint | None) -> None:
    """Checks all of a step: its digest, and its fingerprints as far as what is known of the base tells.

    Raises:
        ChainError: a fingerprint is that of something else.
        FormatError: the file is damaged.
    """
    delta.verify()
    fingerprint = choose().fingerprint
    for name, tensor in delta.items():
        where = f"{delta.file or 'step'}: tensor {name!r}"
        of_result, elements = 0, None
        if base is not None and not tensor.operation.restructures:
            if name not in base:
                raise ChainError("wrong_base", where, f"{base.root} does not have it")
            slot = base[name]
            if (slot.shape, slot.dtype.name) != (tensor.shape, tensor.dtype):
                found = f"{base.root} has it as {slot.dtype.name} {list(slot.shape)}"
                raise ChainError("wrong_base", where, found)
            elements = bits_of(slot)
            check_base(where, tensor, tensor.positions(), elements[tensor.positions()])
        if not tensor.operation.in_result or (not tensor.operation.stores_elements and elements is None):
            continue
        for positions, bits in windows_of(tensor):
            if elements is not None:
                bits = arithmetic.result(tensor.operation, bits, elements[positions], tensor.dtype, 1)
            of_result += fingerprint(positions, bits)
        if tensor.result_fingerprint not in (None, of_result % (1 << 64)):
            raise ChainError("wrong_base", where, "it does not give what its fingerprint says")


def check_sum(steps: Sequence[Delta], folded: Delta) -> None:
    """Checks that a fold takes every tensor's fingerprint as far as its steps do.

    A step that is read with the elements before it only may leave out what it gives, which is compared with the next
    step's fingerprint where it is replayed.

    Raises:
        ChainError: it does not: a step's fingerprints are not those of its elements.
    """
    for name in {name for step in steps for name in step}:
        moved = [_moved(step, name) for step in (*steps, folded)]
        known = [each for each in moved if each is not None]
        if len(known) == len(moved) and sum(known[:-1]) % (1 << 64) != known[-1] % (1 << 64):
            raise ChainError("wrong_base", f"tensor {name!r}", "the steps' fingerprints do not add up")


def _moved(delta: Delta, name: str) -> int | None:
    """What a step adds to a tensor's fingerprint; None if only the elements before it tell."""
    if name not in delta:
        return 0
    tensor = delta[name]
    if delta.needs_base and tensor.operation.in_result and tensor.result_fingerprint is None:
        return None
    return (tensor.result_fingerprint or 0) - (tensor.base_fingerprint or 0)


def check_state(checkpoint: Checkpoint, wanted: str, what: str) -> None:
    """Checks that a model is a version of the chain.

    Raises:
        ChainError: it is not.
    """
    if state_digest(state_of(checkpoint)) != wanted:
        raise ChainError("other_model", str(checkpoint.root), what)


def check_digest(state: State, wanted: str, label: str) -> None:
    """Checks that a state is that of a version.

    Raises:
        ChainError: it is not.
    """
    if state_digest(state) != wanted:
        raise ChainError("wrong_base", label, "it does not give the version that the manifest says")


def check_version(version: int, manifest: Manifest, chain: str) -> None:
    """Checks that a chain has a version, or had it.

    Raises:
        ChainError: it never had.
    """
    if not 0 <= version <= manifest.head:
        raise ChainError("not_published", chain, f"version {version}; the newest is {manifest.head}")


def check_new(path: Path, manifest: Manifest, version: int | None) -> None:
    """Checks that a step, or the model after it, is not published already.

    Raises:
        ChainError: it is, or the version is.
    """
    if version is not None and version > manifest.head:
        return
    if not path.is_dir():
        with open_delta(path) as delta:
            check_digest_new(delta, os.fspath(path), manifest, version)
        return
    stop = manifest.head if version is None else version
    is_same = manifest.states().get(stop) == state_digest(state_of(open_checkpoint(path, packed=True)))
    if is_same or version is not None:
        raise _published(is_same, os.fspath(path), stop, manifest)


def check_digest_new(delta: Delta, label: str, manifest: Manifest, version: int | None) -> None:
    """As `_check_new`, for a file."""
    if version is not None and version > manifest.head:
        return
    stop = manifest.head if version is None else version
    there = [step for step in manifest.since(max(stop - 1, 0)) if (step.stop, step.delta) == (stop, delta.digest)]
    if version is not None:
        raise _published(bool(there), label, stop, manifest)
    if any(step.needs != step.gives for step in there):  # steps without a change may follow each other
        raise _published(True, label, stop, manifest)


def _published(is_same: bool, label: str, version: int, manifest: Manifest) -> ChainError:
    return ChainError("duplicate" if is_same else "taken", label, f"version {version}; the newest is {manifest.head}")
