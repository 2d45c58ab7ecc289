"""What a file says of its source and its base: names, and for models of the Hub their ids and commits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shiradelta.io.hub import is_repo, origin_of
from shiradelta.models.peft import CONFIG
from shiradelta.util.json_files import read_json


def named(source: Path, base: Path | None) -> dict[str, str]:
    """The pairs `source`, `base` and `base_revision` of a file's metadata, as far as they are known.

    A path in the Hub's cache tells id and commit.  Otherwise the base's id is what an adapter's configuration names
    (`base_model_name_or_path`), or that of the fine-tune or the base (`_name_or_path`), if the base's folder is called
    so.
    """
    origin = origin_of(source)
    pairs = {"source": source.resolve().name if origin is None else origin.repo}
    if base is not None and origin_of(base) is not None:
        return {**pairs, **base_names(base)}
    adapter = _config(source, CONFIG)
    repo = _id(adapter, "base_model_name_or_path")
    if base is None:
        if repo is not None and isinstance(revision := adapter.get("revision"), str):
            pairs["base_revision"] = revision
        repo = repo or _id(_config(source, "config.json"), "_name_or_path")
        return {**pairs, **({} if repo is None else {"base": repo})}
    return {**pairs, **({"base": repo} if repo is not None else base_names(base, source))}


def renewed(source: Path, old: Path, base: Path | None) -> dict[str, str]:
    """The same for a delta that is fitted to a new base; `old_base` is the one that the source was made for."""
    pairs = named(source, old)
    return {"source": pairs["source"], **({} if base is None else base_names(base)), "old_base": pairs["base"]}


def base_names(base: Path, *tuned: Path) -> dict[str, str]:
    """The pairs `base` and `base_revision`, from a model's path, or from its or its fine-tunes' configurations."""
    if (origin := origin_of(base)) is not None:
        return {"base": origin.repo, "base_revision": origin.revision}
    name = base.resolve().name
    others = (_id(_config(path, "config.json"), "_name_or_path") for path in (*tuned, base))
    found = (other for other in others if other is not None and other.rpartition("/")[2] == name)
    return {"base": next(found, name)}


def _config(path: Path, name: str) -> dict[str, Any]:
    """The configuration in a folder, or beside a file; empty if there is none."""
    file = (path if path.is_dir() else path.parent) / name
    found = read_json(file) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _id(config: dict[str, Any], key: str) -> str | None:
    """What a configuration names, if it can be an id on the Hub."""
    found = config.get(key)
    return found if isinstance(found, str) and is_repo(found) else None
