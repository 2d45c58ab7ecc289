"""Damages what a model's folder records of itself: `.shiradelta/state.json` and the undo deltas, with deltas on it.

A damaged state has a wrong checksum; half of the cases have a right one, as whoever writes states can write it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np

import shiradelta as sd
from shiradelta.folder.commit import commit
from shiradelta.folder.listing import recorded
from shiradelta.folder.revert import revert_all
from tests.scenes import contents, weights
from tests.source_files import UP, Json, Raw, Special, Strange, Tree, folder, model, write
from tests.strange_sources import damaged_bytes, damaged_value

STATE = "source/.shiradelta/state.json"
#: Names that lead elsewhere, which a state must not.
ELSEWHERE = ("../outside/model.safetensors", "/etc/passwd", "config.json", "link/model.safetensors", "a\\..\\b")


@dataclass
class Sealed(Json):
    """A state whose checksum is made right."""

    def bytes(self) -> bytes:
        if not isinstance(self.value, dict):
            return super().bytes()
        content = {key: value for key, value in self.value.items() if key != "checksum"}
        with suppress(ValueError):
            checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            return Json({**content, "checksum": checksum}).bytes()
        return super().bytes()


@dataclass(frozen=True)
class Folders:
    """Whole folders.

    Attributes:
        trees: how it came about -> its files, below "source/".
        known: the weights of every state that a folder can be in.
        deltas: name -> bytes of the `.shd` file.
    """

    trees: dict[str, Tree]
    known: list[dict[str, bytes]]
    deltas: dict[str, bytes]


def _write_deltas(root: Path) -> dict[str, Path]:
    changed = f"{UP[0]}.weight"
    new = sd.TensorDelta((2, 3), None, np.zeros(6, np.uint16), "bfloat16", "new")
    gone = sd.TensorDelta((8,), None, None, "bfloat16", "drop")
    made = {
        "a": {changed: ([0, 5, 127], [1.0, -2.0, 3.0]), f"{UP[1]}.weight": ([3], [2.0])},
        "b": {changed: ([5, 6], [0.25, 1.5])},
        "whole": {changed: ([1, 5], [4.0, 1.0])},
    }
    for name, tensors in made.items():
        found = {key: sd.TensorDelta((16, 8), *nonzeros, "bfloat16") for key, nonzeros in tensors.items()}
        if name == "whole":
            found |= {"score.weight": new, "model.layers.0.norm.weight": gone}
        sd.save_delta(root / f"{name}.shd", found, values="f32")
    return {name: root / f"{name}.shd" for name in made}


@contextmanager
def _killed(what: str) -> Iterator[None]:
    """Lets an action end in the middle of the block, as if the process were killed."""
    with suppress(SystemExit), mock.patch(what, side_effect=SystemExit):
        yield


def _stop_before_syncing(what: str, done: int, total: int) -> None:
    if what == "syncing":
        raise SystemExit


@cache
def folders() -> Folders:
    """The folders to damage; made once a process."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        deltas = _write_deltas(root)
        trees: dict[str, Tree] = {}
        known: list[dict[str, bytes]] = []

        def fresh(*stack: str) -> Path:
            path = Path(tempfile.mkdtemp(dir=root)) / "source"
            if stack:
                shutil.copytree(made[stack], path)
            else:
                write(folder("source", model(Random(0)), 2), path.parent)
            return path

        def keep(path: Path, how: str) -> None:
            found = sorted(file for file in path.rglob("*") if file.is_file())
            trees[how] = {f"source/{file.relative_to(path).as_posix()}": Raw(file.read_bytes()) for file in found}

        made: dict[tuple[str, ...], Path] = {}
        for stack in [order for size in range(4) for order in permutations(deltas, size)]:
            with suppress(sd.ShiraDeltaError, KeyError):  # such as a delta of a tensor that is gone
                path = fresh(*stack[:-1])
                if stack:
                    sd.apply(path, deltas[stack[-1]])
                known.append(weights(path))
                made[stack] = path
                if stack in ((), ("a",), ("a", "b"), ("whole",), ("a", "whole")):
                    keep(path, " on ".join(reversed(stack)) or "nothing")
        reverted = fresh("a")
        sd.revert(reverted)
        keep(reverted, "reverted")
        for delta in ("a", "whole"):
            half = fresh("b") if delta == "whole" else fresh()
            with _killed("shiradelta.folder.apply.give_up"):
                sd.apply(half, deltas[delta], progress=_stop_before_syncing)
            keep(half, f"{delta} half applied")
            known.append(weights(half))
            half = fresh("b", delta)
            with _killed("shiradelta.folder.revert.restore"):
                sd.revert(half)
            keep(half, f"{delta} half reverted")
        return Folders(trees, known, {each: path.read_bytes() for each, path in deltas.items()})


def whole_state(rng: Random) -> Strange:
    """A folder with deltas on it, one from before, or one whose action was interrupted."""
    how = rng.choice([*folders().trees])
    tree = copy.deepcopy(folders().trees[how])
    raw = tree.pop(STATE, None)
    if isinstance(raw, Raw):
        tree[STATE] = Json(json.loads(raw.data))
    tree["outside/model.safetensors"] = tree["source/model-00001-of-00002.safetensors"]
    return Strange("state", tree, "source", None, {"how": how})


def damaged_state(rng: Random) -> Strange:
    """A folder whose state, or what belongs to it, is damaged."""
    strange = whole_state(rng)
    tree = strange.files
    state, seal = tree.get(STATE), rng.random() < 0.5
    for _ in range(rng.choice((1, 1, 2))):
        own = [name for name in tree if "/.shiradelta/" in name]
        action = rng.random()
        if action < 0.7 and isinstance(state, Json):
            value = copy.deepcopy(state.value)
            if rng.random() < 0.3:
                with suppress(KeyError, TypeError, AttributeError):  # it is damaged already
                    _mislead(rng, value)
            else:
                value = damaged_value(rng, value)
            state = tree[STATE] = (Sealed if seal else Json)(value)
        elif not own:
            tree[STATE] = Json(damaged_value(rng, {"version": 2, "applied": [], "pending": None, "base": {}}))
        else:
            name = rng.choice(own)
            content = tree[name]
            if action < 0.8 and not isinstance(content, Special):
                tree[name] = Raw(damaged_bytes(rng, content.bytes()))
            elif action < 0.85:
                del tree[name]
            elif action < 0.9:
                tree[name] = Special(rng.choice(("pipe", "folder", "../../outside/model.safetensors", "/dev/zero")))
            elif action < 0.95:
                other = rng.choice(own)
                tree[name], tree[other] = tree[other], tree[name]
            else:
                tree[f"source/.shiradelta/{rng.choice(('x', '.state.json.x.tmp', 'undo/0009.shd', 'undo/9'))}"] = Raw(
                    b""
                )
            state = tree.get(STATE)
    strange.options |= {"action": rng.choice([*ACTIONS]), "delta": rng.choice([*folders().deltas])}
    return strange


def _mislead(rng: Random, value: dict[str, Any]) -> None:
    """Makes a state wrong that stays well-formed: it names other files, or takes an action for another."""
    entries = [*value["applied"], *([value["pending"]] if value["pending"] else [])]
    if not entries:
        return
    entry, name = rng.choice(entries), rng.choice((*ELSEWHERE, "x.safetensors", "model-00002-of-00002.safetensors"))
    action = rng.randrange(8)
    if action == 0:
        entry |= {"replaced": [name], "before": {name: "0" * 64}, "after": {name: "0" * 64}}
    elif action == 1:
        entry |= {"replaced": [], "before": {}, "after": {}}
    elif action == 2:
        entry |= {"undo": ""}
    elif action == 3:
        entry["before"] = {name: "0" * 64, **entry["before"]}
    elif action == 4:
        value["pending"] = value["applied"].pop() if value["applied"] else None
    elif action == 5 and value["pending"]:
        value["applied"], value["pending"] = [*value["applied"], value["pending"]], None
    elif action == 6:
        entry["added"] = {"model.conv.weight": 0}
    else:
        value["version"] = 1
        for each in entries:
            for key in ("before", "after", "undo"):
                each.pop(key, None)


#: What is done with a folder after it was looked at.
ACTIONS: dict[str, Callable[[Path, bytes], object]] = {
    "revert": lambda model, delta: sd.revert(model),
    "revert --all": lambda model, delta: revert_all(model),
    "revert --force": lambda model, delta: sd.revert(model, force=True),
    "apply": lambda model, delta: sd.apply(model, sd.open_delta(delta)),
    "apply --out": lambda model, delta: sd.apply(model, sd.open_delta(delta), out=model.parent / "out"),
    "commit": lambda model, delta: commit(model),
}


def outcome_of_state(strange: Strange, root: Path) -> str:
    """Looks at a folder with a damaged state and changes it; what came of it.

    Raises:
        AssertionError: something was written where nothing should be, or weights are none that a folder can have.
    """
    model, before = root / "source", contents(root)
    action = strange.options["action"]
    done = []
    for look in (recorded, sd.verify, lambda path: sd.verify(path, full=True)):
        done.append(_said(lambda look=look: look(model), root))
        assert contents(root) == before, "it was only looked at"
    found = _said(lambda: ACTIONS[action](model, folders().deltas[strange.options["delta"]]), root)
    sealed = isinstance(strange.files.get(STATE), Sealed)
    after = contents(root)
    ours = {name: data for name, data in after.items() if not name.startswith(("source/", "out/"))}
    assert ours == {name: data for name, data in before.items() if not name.startswith("source/")}, "outside"
    assert found or "out/config.json" not in after or action == "apply --out"
    lied_to = "--force" in action or _can_lie(strange.files.get(STATE))
    assert lied_to or weights(model) in folders().known, f"{action} gives weights of no known state"
    meant = action == "commit" and STATE not in strange.files  # it takes the weights for the base
    if done[0] and not action.startswith("apply --out") and not meant:
        assert found, f"{action} takes a state that cannot be read"
    if done[0]:
        assert weights(model) == _original(strange), "the weights changed, though the state was refused"
    return f"{action}, {'sealed' if sealed else 'not sealed'}: {found or 'done'}"


def _can_lie(state: object) -> bool:
    """Whether nothing tells that a state is not what was written: there is none, or its checksum is right.

    States of version 1 have no checksum, and no digests of weights.
    """
    version = state.value.get("version") if isinstance(state, Json) and isinstance(state.value, dict) else None
    return state is None or isinstance(state, Sealed) or version == 1


def _original(strange: Strange) -> dict[str, bytes]:
    tree = folders().trees[strange.options["how"]]
    return {
        name.removeprefix("source/"): content.bytes()
        for name, content in tree.items()
        if name.endswith(".safetensors") and "/.shiradelta/" not in name and isinstance(content, Raw)
    }


def _said(work: Callable[[], object], root: Path) -> str:
    """The class of the error that something ends in, empty without one."""
    try:
        work()
    except sd.ShiraDeltaError as error:
        line = str(error).replace(str(root), "")
        assert "\n" not in line, f"several lines: {line}"
        assert len(line) <= 1500, f"a line of {len(line)} characters: {line[:300]}"
        return type(error).__name__
    return ""
