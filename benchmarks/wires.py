"""Steps of a real training run on every wire: bytes, times, and what comes of a mistake.

`python -m benchmarks.wires` trains all-MiniLM-L6-v2 as `benchmarks.lossless` does, and writes one step as a `.shd`
file and on each wire.  Every one is read again and gives the step bit for bit.  Times are processor time, from tensors
in memory to files and from files to tensors in memory.  Then a bit of each wire's step is flipped, at three places, and
the step is applied to the weights of another run, applied twice, and applied without the step before it.  `refused` is
what a reader can tell from the wire alone, and `other weights` what it cannot.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

import shiradelta as sd
from benchmarks.lossless.steps import RATES, STEPS, State, language_steps, steps
from benchmarks.table import print_table
from shiradelta.chain.difference import shifted
from shiradelta.chain.fold import check_base
from shiradelta.chain.wires import WIRES
from shiradelta.folder.recode import base_of
from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array
from shiradelta.format.codecs.from_base_classes import keys_of
from shiradelta.format.entropy import entropy
from shiradelta.io.context import plain_delta
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint

SHD, SHD_ZSTD, SHD_ON_BASE = "shd", "shd, zstd", "shd, base as context"
#: Wires that the size of a `.shd` file is compared with as one.
OPEN = ("slime", "verl", "nemo-rl", "huggingface", "grail", "vllm")
Bits = dict[str, Array]
Changes = list[tuple[str, Array, Array]]


def timed(work: Callable[[], object], repeats: int = 3) -> float:
    """The least processor time of all threads."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def encode(name: str, folder: Path, base: Checkpoint, changes: Changes) -> None:
    """Writes a step; a `.shd` file as `publish` does."""
    if name in WIRES:
        wire = WIRES[name]
        wire.write(folder, base, iter(changes), **wire.options)
        return
    deltas = {}
    for tensor, old, new in changes:
        at = np.flatnonzero(old != new)
        if at.size:
            dtype = base[tensor].dtype.name
            deltas[tensor] = shifted(sd.TensorDelta.trusted(base[tensor].shape, at, new[at], dtype, "set", old[at]))
    sd.save_delta(folder / "step.shd", deltas, zstd=name == SHD_ZSTD)
    if name == SHD_ON_BASE:
        sd.recode(folder / "step.shd", folder / "step.shd", base.root)


def apply(name: str, folder: Path, base: Checkpoint) -> Bits:
    """The tensors that a step changes, afterwards.

    Raises:
        ShiraDeltaError: it is refused.
    """
    if name in WIRES:
        return {tensor: new for tensor, _, new in WIRES[name].read(folder, base)}
    found = {}
    with ExitStack() as stack:
        delta = stack.enter_context(sd.open_delta(folder / "step.shd"))
        if delta.needs_base:
            delta = stack.enter_context(plain_delta(delta, base_of(delta, base)))
        delta.verify()
        for tensor, one in delta.items():
            found[tensor], positions = base.bits(tensor).copy(), one.positions()
            check_base(tensor, one, positions, found[tensor][positions])
            one.patch(found[tensor], one.dtype)
    return found


def written(state: State, folder: Path) -> Checkpoint:
    """A model's folder."""
    folder.mkdir()
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


def new_folder(root: Path, name: str) -> Path:
    """An empty folder."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def outcome(name: str, folder: Path, base: Checkpoint, wanted: Bits) -> str:
    """What comes of applying a step: whether it is refused, or which weights there are."""
    try:
        found = apply(name, folder, base)
    except sd.ShiraDeltaError:
        return "refused"
    right = all(np.array_equal(found.get(tensor, base.bits(tensor)), each) for tensor, each in wanted.items())
    return "same weights" if right else "other weights"


def damaged(name: str, folder: Path, base: Checkpoint, wanted: Bits) -> str:
    """What comes of it when a bit of the largest file is flipped, at one of three places."""
    file = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    whole, found = file.read_bytes(), set()
    for place in (1, 2, 3):
        raw = bytearray(whole)
        raw[len(raw) * place // 4] ^= 0x10
        file.write_bytes(raw)
        found.add(outcome(name, folder, base, wanted))
    return "refused" if found == {"refused"} else "other weights"


def entropy_on_base(base: Checkpoint, changes: Changes) -> float:
    """Bytes of positions and shifts by their entropies, given each element's exponent in the base, by tensor."""
    bits = 0.0
    for tensor, old, new in changes:
        at, exponents = np.flatnonzero(old != new), keys_of(old) >> 7
        shifts = arithmetic.shifts_between(old[at], new[at], base[tensor].dtype.name)
        assert shifts is not None
        for exponent in np.unique(exponents[at]):
            here = shifts[exponents[at] == exponent]
            share = np.unique(here, return_counts=True)[1] / here.size
            bits += here.size * (entropy(here.size, int((exponents == exponent).sum())) - float(share @ np.log2(share)))
    return bits / 8


def compare(states: list[State], title: str) -> None:
    """Prints the tables of the step from the second state to the third."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        earlier, base, after = (written(state, root / str(number)) for number, state in enumerate(states))
        other = written({key: -tensor for key, tensor in states[1].items()}, root / "other")
        changes = [(tensor, base.bits(tensor), after.bits(tensor)) for tensor in base]
        changed = sum(int(np.count_nonzero(old != new)) for _, old, new in changes)
        wanted = {tensor: new for tensor, _, new in changes}
        sizes: dict[str, int] = {}
        rows = [["", "bytes", "bits a change", "encode", "apply"]]
        mistakes = [["", "a bit flipped", "weights of another run", "twice", "without the step before"]]
        for wire in (SHD, SHD_ZSTD, SHD_ON_BASE, *WIRES):
            seconds = timed(lambda wire=wire: encode(wire, new_folder(root, wire), base, changes))  # type: ignore[misc]
            folder = next(root.glob(f"{wire}-*"))
            assert outcome(wire, folder, base, wanted) == "same weights", wire
            sizes[wire] = size(folder)
            decode = timed(lambda wire=wire, folder=folder: apply(wire, folder, base))  # type: ignore[misc]
            rows.append(
                [wire, f"{sizes[wire]:,}", f"{8 * sizes[wire] / changed:.2f}", f"{seconds:.2f} s", f"{decode:.2f} s"]
            )
            results = [outcome(wire, folder, model, wanted) for model in (other, after, earlier)]
            mistakes.append([wire, damaged(wire, folder, base, wanted), *results])
        total = sum(slot.numel for slot in base.values())
        print_table(f"{title}: {changed / total:.2%} of {total:,} weights change; processor time", rows)
        print_table(f"{title}: what comes of a mistake", mistakes)
        least = min(OPEN, key=lambda wire: sizes[wire])
        for form in SHD, SHD_ON_BASE:
            of_least, of_fireworks = sizes[form] / sizes[least], sizes[form] / sizes["fireworks"]
            print(f"{form}: {of_least:.3f} x {least}, {of_fireworks:.3f} x fireworks")
        floor = entropy_on_base(base, changes)
        print(f"entropy given the base's exponents: {floor:,.0f} bytes, {floor / sizes[least]:.3f} x {least}")


def tables(
    before: int, rates: Sequence[float] = RATES, model: Path | None = None, examples: Path | None = None
) -> None:
    """Prints the tables for each learning rate, after some steps."""
    for rate in rates:
        every = language_steps(model, examples, rate) if model is not None and examples is not None else steps(rate)
        states = list(islice(every, before + 2))[-3:]
        compare(states, f"AdamW, learning rate {rate:g}, step {before + 2}")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps before the one that is written")
    parser.add_argument("--model", type=Path, help="folder of a language model, instead of all-MiniLM-L6-v2")
    parser.add_argument("--examples", type=Path, help="its examples: JSON Lines with prompt and completion")
    parser.add_argument("--rate", type=float, nargs="*", default=RATES, help="learning rates")
    options = parser.parse_args()
    tables(options.steps, options.rate, options.model, options.examples)


if __name__ == "__main__":
    main()
