"""A full fine-tune against its base: delta = tuned - base, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Array, Float32
from shiradelta.format.delta import TensorDelta
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.io.recognise import Wanted, explain
from shiradelta.models.checkpoint import Checkpoint, bits_of, open_checkpoint, same_bits
from shiradelta.models.library import Converted, match_names
from shiradelta.models.names import Named, search_the_rest
from shiradelta.models.safetensors import Slot
from shiradelta.models.sentence import LIST, unlisted_modules
from shiradelta.select.topk import Rows, row_shape
from shiradelta.util.text import count

from .differences import parse_key as parse_difference
from .float8 import RANKED, WIDEN, other_scale, scaled, values_of
from .full_converted import in_form_of
from .gates import refuse_gates
from .item import Item, Skipped, SkipReason, Source, replacing_tensor, whole_tensor
from .lora_keys import refuse_unmerged
from .sources import SourceFiles, source

#: The largest share of a model's tensors that may belong to its head.
_HEAD = 0.1


def _recognises(files: SourceFiles) -> bool:
    refuse_gates(files)
    return files.base is not None


@source(
    "full",
    "A fine-tuned model, as a folder or a file; it needs the base.",
    _recognises,
    order=30,
    hint="for a full fine-tune give --base MODEL",
)
def open_full(files: SourceFiles) -> Source:
    """Every tensor of the fine-tune: changed, added whole, or skipped with the reason."""
    refuse_unmerged(files.checkpoint)
    return read_full(files.checkpoint, files)


def read_full(source: Checkpoint, files: SourceFiles) -> Source:
    """The fine-tuned tensors of a checkpoint against the base."""
    base, result = files.base, Source()
    if base is None:
        raise SourceError(f"{files.path}: a full fine-tune needs the model that it was made from; give --base MODEL")
    _skip_unlisted(source, base, result)
    found, unclear, converted = _find(source, base, files.may_lack)
    if converted:
        source, made = in_form_of(base, source, converted, result)
        found = {key: name for key, name in found.items() if key not in converted} | {name: name for name in made}
    for key, why in unclear.items():
        result.skipped[key] = Skipped(SkipReason.NO_TARGET, f"{why} of {base.root}; rename it in the source")
    if not found:
        other = Skipped(SkipReason.NO_TARGET, f"{base.root} has no such tensor")
        result.skipped |= {key: other for key in source if key not in unclear}
        return result
    used = set(found.values())
    lacking = [name for name in base if name not in used]
    missing = [key for key in source if key not in found and key not in unclear and key not in result.skipped]
    homeless = {key: folder for key in missing if (folder := _folder_of(key)) not in base.folders}
    added = [key for key in missing if key not in homeless]
    _check_added(added, lacking, source, base, result)
    first: dict[str, str] = {}  # the base's name -> the fine-tune's
    for key in (key for key in source if key not in unclear and key not in result.skipped):
        if key in homeless:
            remedy = f"copy the fine-tune's {LIST} to the base first"
            if not (base.root / homeless[key]).is_dir():
                remedy = "copy that of the fine-tune to the base first"
            why = f"{base.root} has no folder {homeless[key]!r} for it; {remedy}"
            result.skipped[key] = Skipped(SkipReason.NO_TARGET, why)
            continue
        if key not in found:
            result.items.append(whole_tensor(source, key, key))
            continue
        tied = first.setdefault(found[key], key)
        if tied != key:
            same = Skipped(SkipReason.DUPLICATE, f"the same as {tied!r}")
            result.skipped[key] = (
                same if same_bits(source, key, source, tied) else _untied(source, key, base, found[key], tied)
            )
            continue
        item = difference(source, key, base, found[key])
        result.add(key, item.called(found[key]) if isinstance(item, Skipped) else item)
    if lacking:
        some = count(lacking, "tensor of the base is", "tensors of the base are")
        result.warnings.append(f"{some} not in the fine-tune, and left as in the base")
    return result


def _skip_unlisted(source: Checkpoint, base: Checkpoint, result: Source) -> None:
    """Skips the modules of sentence-transformers in the fine-tune's folder that no modules.json lists."""
    for folder in unlisted_modules(source.root):
        why = f"{source.root} has no {LIST} that lists {folder.name}; copy the base's {LIST} to it"
        skipped = Skipped(SkipReason.NO_TARGET, why)
        part = None if explain(folder, Wanted.SOURCE) else open_checkpoint(folder, Wanted.SOURCE)
        for key in part or ():
            assert part is not None
            name = f"{folder.name}/{key}"
            result.skipped[name] = lost_change(skipped, difference(part, key, base, name) if name in base else None)
        if part is None:
            result.skipped[f"{folder.name}/"] = skipped


def _find(
    source: Checkpoint, base: Checkpoint, may_lack: Callable[[str], bool]
) -> tuple[dict[str, str], dict[str, str], dict[str, Converted]]:
    """Finds the fine-tune's tensors.

    Returns:
        (the fine-tune's name -> the base's, the fine-tune's name -> why it is unclear which is meant, the fine-tune's
        name -> where the base has the elements in another form).
    """
    unclear: dict[str, str] = {}
    converted: dict[str, Converted] = {}

    def search(some: Named) -> tuple[dict[str, str], dict[str, str]]:
        matched = match_names(some, base)
        unclear.update(matched.unclear)
        converted.update(matched.converted)
        return matched.names, matched.unclear

    found = search_the_rest(source.shapes, search, may_lack)
    there = {*found, *converted}
    return found, {key: why for key, why in unclear.items() if key not in there}, converted


def _untied(source: Checkpoint, key: str, base: Checkpoint, name: str, tied: str) -> Skipped:
    """A tensor that the fine-tune has beside the one that the base ties it to."""
    why = f"the fine-tune untied its embeddings: it differs from {tied!r}, and the base has one tensor for both"
    skipped = Skipped(SkipReason.CONFLICT, f"{why}; untie them in the base first", names=(name,))
    return lost_change(skipped, difference(source, key, base, name))


def lost_change(skipped: Skipped, item: Item | Skipped | None) -> Skipped:
    """A tensor that is skipped, with the energy of the change that would have been converted, if that is known."""
    if isinstance(item, Skipped):
        return replace(skipped, energy=item.energy)
    return skipped.of_change(item.dense, item.shape) if item is not None and item.dense is not None else skipped


def _folder_of(name: str) -> str:
    """The folder of a component or module that a tensor is in, as `Checkpoint.folders` names it."""
    folder, slash, _ = name.rpartition("/")
    return folder + slash


def _check_added(added: list[str], lacking: list[str], source: Checkpoint, base: Checkpoint, result: Source) -> None:
    """Warns about tensors that are added whole; refuses them where they look like the base's under other names.

    They do where most have the shapes of tensors that the fine-tune lacks, or all together as many elements, and there
    are too many for an exchanged head.
    """
    if not added:
        return
    for key in added:
        name, _ = parse_difference(key) or (key.removesuffix(".indices"), "")
        if name != key and name in base:
            raise SourceError(
                f"{source.root}: holds {key!r} beside a model's weights, which may be a part of a difference; save the"
                " model and the differences apart"
            )
    free: dict[tuple[int, ...], list[str]] = {}
    for name in lacking:
        free.setdefault(base[name].shape, []).append(name)
    pairs = [(key, names.pop(0)) for key in added if (names := free.get(source[key].shape))]
    if 2 * len(pairs) > len(added) and len(pairs) > _HEAD * len(source):
        key, name = max(pairs, key=lambda pair: source[pair[0]].numel)
        some = count(pairs, "tensor has another name", "tensors have other names")
        raise SourceError(
            f"{source.root}: {some} than the base's: it has {key!r} and lacks {name!r} of the same shape; rename them"
            " as the base's first"
        )
    elements = [sum(model[name].numel for name in some) for model, some in ((source, added), (base, lacking))]
    if lacking and elements[0] == elements[1] and max(len(added), len(lacking)) > _HEAD * len(base):
        raise SourceError(
            f"{source.root}: has {added[0]!r} and lacks the base's {lacking[0]!r}: as many elements in other shapes;"
            " put the config.json of both beside their weights, or save both with the same release of the library"
        )
    named = ", ".join(added[:3]) + (", ..." if len(added) > 3 else "")
    some = count(added, "tensor that the base lacks is", "tensors that the base lacks are")
    result.warnings.append(f"{some} added whole: {named}")


def difference(source: Checkpoint, key: str, base: Checkpoint, name: str) -> Item | Skipped:
    """One tensor's change, or why it is skipped."""
    slot, tuned_slot = base[name], source[key]
    if slot.shape != tuned_slot.shape:
        remedy = "give --whole PATTERN (whole=) to store it whole, or resize the base's first"
        whole: Item | None = replacing_tensor(source, key, base, name)
        if slot.shape == (*tuned_slot.shape[:-2], *tuned_slot.shape[:-3:-1]):
            remedy = (
                "the base has it transposed, as some releases of transformers save it: load and save the base first"
            )
            whole = None
        why = f"its shape is {list(tuned_slot.shape)}, the base's {list(slot.shape)}; {remedy}"
        return _resized(Skipped(SkipReason.SHAPE, why, whole=whole), source, key, base, name)
    base_bits, tuned = partial(bits_of, slot), partial(bits_of, tuned_slot)
    dtype, tuned_dtype = slot.dtype.name, tuned_slot.dtype.name
    if (unlike := other_scale(source, key, base, name)) is not None:
        return unlike
    dense = scaled(partial(_subtraction, tuned_slot, slot), base, name)
    if dtype in ADD_DTYPES and tuned_dtype in ADD_DTYPES:
        return Item(name, slot.shape, dtype, dense, base_bits=base_bits, tuned=tuned, tuned_dtype=tuned_dtype)
    if dtype != tuned_dtype:
        why = f"it is {tuned_dtype}, the base's {dtype}; store one as the other is"
        skipped = Skipped(SkipReason.DTYPE, why)
        return skipped.of_change(dense, slot.shape) if {dtype, tuned_dtype} <= RANKED else skipped
    if dtype in WIDEN:
        return Item(name, slot.shape, dtype, dense, base_bits=base_bits, tuned=tuned, replaces=True)
    return Item(name, slot.shape, dtype, exact=partial(_all_changes, slot, base_bits, tuned), tuned=tuned)


def _all_changes(slot: Slot, base_bits: Callable[[], Array], tuned_bits: Callable[[], Array]) -> TensorDelta:
    """Every change, to be set: integers and the like have no magnitude to rank by."""
    base, tuned = base_bits(), tuned_bits()
    changed = np.flatnonzero(base != tuned)
    return TensorDelta(slot.shape, changed, tuned[changed], slot.dtype.name, "set", base_bits=base[changed])


def _resized(skipped: Skipped, source: Checkpoint, key: str, base: Checkpoint, name: str) -> Skipped:
    """A tensor with more or fewer rows than the base's: it changes the rows that both have, and adds or removes others.

    Its energy is unknown where more than the number of rows differs.
    """
    tuned, slot = source[key].shape, base[name].shape
    if not tuned or not slot or tuned[1:] != slot[1:] or not {source[key].dtype.name, base[name].dtype.name} <= RANKED:
        return skipped
    common = min(tuned[0], slot[0])
    longer, where = (source, key) if tuned[0] > common else (base, name)
    bits, dtype = longer.bits(where), longer[where].dtype.name
    count, columns = row_shape(longer[where].shape)
    shared = common * (count // longer[where].shape[0])
    change = _subtraction(source[key], base[name])

    def rows(start: int, stop: int) -> Float32:
        parts = [change(start, min(stop, shared))] if start < shared else []
        first = max(start, shared)
        if first < stop:
            parts.append(values_of(bits[first * columns : stop * columns], dtype))
        return np.concatenate([part.reshape(-1, columns) for part in parts])

    return skipped.of_change(lambda: rows, longer[where].shape)


def _subtraction(tuned: Slot, base: Slot) -> Rows:
    """tuned - base in float32, a few rows at a time."""
    tuned_bits, base_bits = bits_of(tuned), bits_of(base)
    tuned_dtype, dtype = tuned.dtype.name, base.dtype.name
    columns = row_shape(base.shape)[1]

    def rows(start: int, stop: int) -> Float32:
        part = slice(start * columns, stop * columns)
        with np.errstate(invalid="ignore", over="ignore"):
            return values_of(tuned_bits[part], tuned_dtype) - values_of(base_bits[part], dtype)

    return rows
