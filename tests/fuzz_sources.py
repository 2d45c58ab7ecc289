"""A deterministic fuzzer of what is read besides `.shd` files: sources, models' folders, their states, examples, wires.

    python -m tests.fuzz_sources --count 20000 --seed 1      the full job
    python -m tests.fuzz_sources --seconds 60 --seed 1       as much of it as that time allows
    python -m tests.fuzz_sources --seed 1 --only 4711 --keep DIR  one case again, its files kept

Every source must be converted, or refused in one short line, within seconds and with nothing left behind; a converted
file must be whole.  A delta's plan for a damaged folder likewise, a file of examples, and a step of another project.
A folder with a damaged state may be looked at, reverted and patched, or the commands refuse; `strange_states` says what
must hold.  Anything else is a finding: another exception, a warning, much memory.
"""

from __future__ import annotations

import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import shiradelta as sd
from shiradelta.chain.wires import WIRES
from shiradelta.folder.plan import make_plan
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.models.library import library_of
from shiradelta.text.pooling import find_pooling
from tests.fuzzing import Case, Report, judged, main
from tests.source_files import UP, Strange, write
from tests.strange_sources import damaged_source
from tests.strange_states import damaged_state, outcome_of_state
from tests.strange_texts import damaged_texts, read_strange_texts
from tests.strange_wires import damaged_wire, read_strange_wire, whole_wire
from tests.whole_sources import KINDS, whole

SECONDS_PER_CASE = 10.0
LONGEST_LINE = 1500


def delta() -> bytes:
    """A delta for the targets: it changes, adds and removes tensors."""
    changed = {f"{name}.weight": sd.TensorDelta((16, 8), [0, 5, 127], [1.0, -2.0, 3.0], "bfloat16") for name in UP}
    new = sd.TensorDelta((2, 3), None, np.zeros(6, np.uint16), "bfloat16", "new")
    gone = sd.TensorDelta((8,), None, None, "bfloat16", "drop")
    with tempfile.TemporaryDirectory() as folder:
        sd.save_delta(Path(folder) / "x.shd", {**changed, "score.weight": new, "model.layers.0.norm.weight": gone})
        return (Path(folder) / "x.shd").read_bytes()


def outcome_of(strange: Strange, root: Path, patch: bytes) -> str:
    """What comes of a case: "converted", "planned" or the class of the error."""
    if strange.kind == "state":
        return outcome_of_state(strange, root)
    given: dict[str, Any] = dict(strange.options)
    if strange.base is not None:
        given["base"] = root / strange.base
    try:
        if strange.kind == "texts":
            return read_strange_texts(strange, root)
        if strange.kind == "wire":
            return read_strange_wire(strange, root)
        if strange.kind == "target":
            find_pooling(root / strange.source)
            make_plan(open_checkpoint(root / strange.source), sd.open_delta(patch), 1.0, False)
            return "planned"
        sd.convert(root / strange.source, root / "out.shd", **given)
        with sd.open_delta(root / "out.shd") as made:
            made.verify()
            assert len(made), "a file without tensors"
        (root / "out.shd").unlink()
        return "converted"
    except sd.ShiraDeltaError as error:
        line = str(error).replace(str(root), "")
        assert len(line) <= LONGEST_LINE, f"a line of {len(line)} characters: {line[:300]}"
        return type(error).__name__


def tried(strange: Strange, patch: bytes) -> tuple[str, str | None]:
    """(what came of a case, what is wrong with it)."""
    with tempfile.TemporaryDirectory(prefix="source-") as folder:
        root = Path(folder)
        write(strange.files, root)
        before = sorted(root.rglob("*"))
        outcome = outcome_of(strange, root, patch)
        left = [] if strange.kind == "state" else sorted(set(map(str, root.rglob("*"))) ^ set(map(str, before)))
        return f"{strange.kind}: {outcome}", f"left behind: {left}" if left else None


def case(seed: int, i: int) -> Strange:
    """Case i of a seed: the same on every machine."""
    rng = random.Random(f"{seed} {i}")
    pick = rng.random()
    shares = ((0.2, damaged_state), (0.3, damaged_texts), (0.4, damaged_wire), (1.0, damaged_source))
    return next(damage for share, damage in shares if pick < share)(rng)


def run_case(patch: bytes, seed: int, i: int) -> Report:
    """One case, in this process."""
    return judged(i, partial(tried, case(seed, i), patch), SECONDS_PER_CASE)


def start() -> Case:
    """The fuzzer; see `tests.fuzzing`."""
    patch = delta()
    # Imports what is needed, not while a case runs, whose time and memory are limited.
    for kind in (*KINDS, "target"):
        tried(whole(kind, random.Random(0)), patch)
    for damage in (damaged_state, damaged_texts):
        tried(damage(random.Random(0)), patch)
    for wire in WIRES:
        tried(whole_wire(wire), patch)
    with tempfile.TemporaryDirectory() as folder:
        write(whole("bert", random.Random(0)).files, Path(folder))
        assert library_of(Path(folder) / "base") is not None
    return partial(run_case, patch)


def keep(seed: int, i: int, folder: Path) -> None:
    """Writes a case's files."""
    write(case(seed, i).files, folder / f"{seed}-{i}")


if __name__ == "__main__":
    # By the module's own name: the child process imports `start` from it.
    from tests import fuzz_sources

    sys.exit(main(sys.argv[1:], "Converts damaged sources.", 20_000, fuzz_sources.start, keep))
