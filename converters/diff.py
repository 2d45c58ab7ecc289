"""Files of differences, as a source: LyCORIS', PEFT's SHiRA, tensors with their positions."""

from __future__ import annotations

from shiradelta.errors import SourceError
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.library import shared_tensors
from shiradelta.models.peft import parse_shira_key, unwrap

from .base_names import BaseTensors, find_tensors
from .differences import change_of, holds_diffs, item_of, lost_difference, parse_key
from .item import CONVERTED, Skipped, Source
from .lora_converted import add_converted
from .lora_scale import Scale
from .lora_whole import add_whole
from .peft_config import check_parts, read_configs
from .sources import SourceFiles, source


def _recognises(files: SourceFiles) -> bool:
    keys = files.checkpoint
    if not holds_diffs(keys):
        return False
    plain = [key for key in keys if parse_key(key) is None]
    if plain and not any(map(parse_shira_key, keys)):
        one = next(key for key in keys if parse_key(key) is not None)
        raise SourceError(
            f"{files.path}: holds a difference, {one!r}, and {plain[0]!r}, which may be one or a new value; give --kind"
            " diff if all are differences, or save them apart"
        )
    return True


@source(
    "diff",
    "A file of differences, dense or sparse: LyCORIS', PEFT's SHiRA, or tensors with their positions.",
    _recognises,
    order=20,
    hint="for plain tensors that are differences give --kind diff",
)
def open_diff(files: SourceFiles) -> Source:
    """Every difference in a file, and the new values that PEFT's SHiRA saves beside its own (modules_to_save)."""
    source, base, result = files.checkpoint, files.base, Source()
    tensors, saved = _sort(source)
    of_shira = [keys for keys in tensors.values() if any(map(parse_shira_key, keys.values()))]
    configs, where = read_configs(source) if of_shira else ({}, source.root)
    for keys in of_shira:
        check_parts(configs.get("", {}), keys, next(iter(keys.values())), where)
    there = BaseTensors({name: name for name in tensors})
    if base is not None:
        shapes = {name: source[keys["dense"]].shape if "dense" in keys else None for name, keys in tensors.items()}
        shapes |= {name: source[key].shape for key, name in saved.items()}
        called = {name: [*keys.values()] for name, keys in tensors.items()}
        for key, name in saved.items():
            called.setdefault(name, []).append(key)
        there = find_tensors(shapes, base, lambda name: files.may_lack(name, *called[name]))
        changes = {
            name: change_of(source, tensors[name]["dense"])
            for name in there.converted.keys() & tensors.keys()
            if "dense" in tensors[name] and source[tensors[name]["dense"]].dtype.name in ADD_DTYPES
        }
        add_converted(changes, there.converted, base, result)
        tensors = {name: keys for name, keys in tensors.items() if name not in changes}
    lacking = there.lacking | dict.fromkeys(there.converted, CONVERTED)
    for name, keys in tensors.items():
        item = item_of(source, keys, there.found[name], base) if name in there.found else lacking[name]
        if isinstance(item, Skipped):
            item = item.called(*keys.values(), there.found.get(name))
            item = lost_difference(source, keys, item) if item.energy is None else item
        result.add(name, item)
    if saved:
        shared = {} if base is None else shared_tensors(base)
        add_whole(source, saved, (), there.found, Scale(configs, None, where), base, result, there.tied, shared)
    return result


def _sort(source: Checkpoint) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """(tensor -> its difference's parts -> their keys, key of a new value -> its tensor)."""
    tensors: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    of_shira = any(map(parse_shira_key, source))
    for key in source:
        parsed = parse_key(key)
        if parsed is None and of_shira:
            saved[key] = unwrap(key)
        else:
            name, what = parsed or (key, "dense")
            tensors.setdefault(name, {})[what] = key
    return tensors, saved
