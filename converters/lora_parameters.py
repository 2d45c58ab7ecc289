"""LoRA on parameters by name (PEFT's target_parameters), such as the stacked weights of experts.

PEFT wraps a module once for each of its parameters, in the order in which the module has them: the outermost wrapper,
whose keys look like those of the module, belongs to the last one.  A stack of E matrices has `lora_A` [E * rank, in]
and `lora_B` [out, rank * E].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Float32, to_float32
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.library import library_of
from shiradelta.models.names import find_names
from shiradelta.models.peft import CONFIG
from shiradelta.select.topk import Rows, row_shape
from shiradelta.util.text import count

from .base_names import find_tensors
from .lora_keys import NESTED, Module, Stack
from .lora_scale import Scale
from .peft_config import PARAMETERS

#: The first release of PEFT that asks a module whether its matrices are [in, out], and the first that does so rightly.
_ASKS, _ASKS_RIGHTLY = (0, 19), (0, 19, 1)


def find_parameters(
    modules: Mapping[str, Module], scale: Scale, source: Checkpoint, base: Checkpoint | None
) -> dict[str, Module]:
    """The modules of a file, those that adapt a parameter by name under that parameter's name.

    Args:
        modules: a file's modules, with the wrappers at the end of their names.
        scale: what the configuration says.
        source: the file.
        base: the base's checkpoint, or None.

    Raises:
        SourceError: it cannot be told which parameters they are, or how their factors multiply.
    """
    wrappers: dict[str, list[str]] = {}
    for name in modules:
        wrappers.setdefault(NESTED.fullmatch(name)[1], []).append(name)  # type: ignore[index]  # it matches any string
    leaves = {module: scale.parameters(module) for module in wrappers}
    if base is None and any(leaves.values()):
        raise SourceError(
            f"{source.root}: adapts parameters ({PARAMETERS}), whose shapes the base has; give --base MODEL"
        )
    wanted = {f"{module}.{leaf}": None for module, some in leaves.items() for leaf in some}
    shapes, order, transposed = _in_base(wanted, base) if base is not None and wanted else ({}, {}, set[str]())
    result: dict[str, Module] = {}
    for module, names in wrappers.items():
        there = [name for leaf in leaves[module] if (name := f"{module}.{leaf}") in shapes]
        if not there and len(names) == 1:
            result[module] = modules[names[0]]
            continue
        if len(there) != len(names):
            raise SourceError(
                f"{source.root}: {module!r} has factors for {count(names, 'parameter')}, and {len(there)} of the base's"
                f" are among {PARAMETERS} in {CONFIG}: {', '.join(there) or 'none'}; give the right base and {CONFIG}"
            )
        parts = [modules[name] for name in sorted(names, key=len, reverse=True)]  # the innermost first
        for name, one in zip(_assigned(module, there, order, parts, shapes, source), parts, strict=True):
            stack = _stack(name, one, shapes[name], name in transposed if order else None, scale, source)
            result[name] = Module(one.keys, stack=stack)
    return result


def _in_base(
    wanted: Mapping[str, None], base: Checkpoint
) -> tuple[dict[str, tuple[int, ...]], dict[str, int], set[str]]:
    """Shapes of parameters, their order in the model, and those that are [in, out]; nothing where it is unknown."""
    found = find_tensors(wanted, base)
    shapes = {name: base[tensor].shape for name, tensor in found.found.items()}
    shapes |= {name: stored.shape for name, stored in found.converted.items()}
    order: dict[str, int] = {}
    transposed: set[str] = set()
    for prefix, folder in base.folders.items():
        library = library_of(folder)
        if library is not None:
            bare = {name.removeprefix(prefix): None for name in shapes if name.startswith(prefix)}
            number = {name: at for at, name in enumerate(library.shapes)}
            for name, in_memory in find_names(bare, library.shapes).names.items():
                order[prefix + name] = number[in_memory]
                transposed |= {prefix + name} if in_memory.rpartition(".")[0] in library.transposed else set()
    return shapes, order, transposed


def _assigned(
    module: str,
    names: Sequence[str],
    order: Mapping[str, int],
    parts: Sequence[Module],
    shapes: Mapping[str, tuple[int, ...]],
    source: Checkpoint,
) -> Sequence[str]:
    """The parameters of a module in the order of its wrappers, from the innermost: the model's, else what fits."""
    if len(names) == 1:
        return names
    if all(name in order for name in names):
        return sorted(names, key=lambda name: order[name])
    fits = [
        some
        for some in permutations(names)
        if all(_orientations(source, one, shapes[name]) for name, one in zip(some, parts, strict=True))
    ]
    if len(fits) != 1:
        raise SourceError(
            f"{source.root}: the factors of {module!r} may be those of {' or '.join(map(repr, names))}, in whose order"
            " the model has them; put the base's config.json beside its weights"
        )
    return fits[0]


def _orientations(source: Checkpoint, parts: Module, shape: tuple[int, ...]) -> set[bool]:
    """Whether a parameter of a shape may change by (B A)^T, by B A, or by neither."""
    if set(parts.keys) != {"A", "B"} or not 2 <= len(shape) <= 3:
        return set()
    a, b = source[parts.keys["A"]].shape, source[parts.keys["B"]].shape
    experts = Stack(shape, False).experts
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0] or not experts or a[0] % experts:
        return set()
    straight = {False} if (b[0], a[1]) == shape[-2:] else set[bool]()
    return straight | ({True} if experts > 1 and (a[1], b[0]) == shape[-2:] else set())


def _stack(
    name: str, parts: Module, shape: tuple[int, ...], transposed: bool | None, scale: Scale, source: Checkpoint
) -> Stack:
    """How a parameter's factors multiply; square ones as the release of PEFT that trained them does."""
    may_be = _orientations(source, parts, shape)
    if len(may_be) == 2:
        version = scale.peft_version(name)
        if version is not None and version < _ASKS:
            may_be = {True}
        elif version is not None and version >= _ASKS_RIGHTLY and transposed is not None:
            may_be = {transposed}
        else:
            raise SourceError(
                f"{source.root}: {name!r} has square matrices, which PEFT takes as [out, in] or as [in, out], by its"
                f" release; put peft_version into {CONFIG} and the base's config.json beside its weights"
            )
    if not may_be:
        listed = ", ".join(f"{part} {list(source[key].shape)}" for part, key in parts.keys.items())
        raise SourceError(f"{source.root}: the factors of {name!r} ({listed}) do not fit its shape {list(shape)}")
    return Stack(shape, may_be.pop())


def stacked_rows(source: Checkpoint, parts: Module, stack: Stack, factor: float) -> Rows:
    """factor * the change of a parameter, a few rows at a time."""
    a, b = (to_float32(source.bits(key), source[key].dtype.name) for key in (parts.keys["A"], parts.keys["B"]))
    rank = source[parts.keys["A"]].shape[0] // stack.experts
    right = a.reshape(stack.experts, rank, -1)
    left = b.reshape(-1, rank, stack.experts).transpose(2, 0, 1)
    if stack.transposed:
        left, right = right.transpose(0, 2, 1), left.transpose(0, 2, 1)
    scaled = np.ascontiguousarray(left) * np.float32(factor)
    right = np.ascontiguousarray(right)
    height, width = stack.shape[-2:]
    columns = row_shape(stack.shape)[1]
    each = columns // width  # rows of a matrix in a row

    def rows(start: int, stop: int) -> Float32:
        first, last = start * each, stop * each
        made = [
            scaled[expert, max(first - expert * height, 0) : min(last - expert * height, height)] @ right[expert]
            for expert in range(first // height, -(-last // height))
        ]
        return np.concatenate(made).reshape(-1, columns)

    return rows
