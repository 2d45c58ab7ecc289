"""Loading a file that is read with its base: decoded where the weights are, or from a copy of the weights in the host.

Linear layers in the shapes of Llama-2-7B with random bf16 weights, and a step by which a weight changes the likelier
the finer its unit is, as in training, 1 % of all.  `python -m benchmarks.on_base` prints wall times of one run, by
parts, beside a copy of the weights in one piece.  `--device cpu` runs the same torch operations on one layer, beside
libshd.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

import shiradelta as sd
from benchmarks.switch import Stage, for_all_layers, versions, where
from benchmarks.table import print_table
from shiradelta.backends.choose import choose
from shiradelta.format.codecs import ULP
from shiradelta.format.digest import content_digest, tensor_digest
from shiradelta.format.registry import IndexId
from shiradelta.hotswap.devices import devices_for
from shiradelta.hotswap.numpy import NumpyBackend
from shiradelta.io.context import write_on_base
from shiradelta.io.reader import Delta
from shiradelta.io.restored import Elements, Located, located, with_values
from shiradelta.models.live import live_tensors
from shiradelta.models.memory import flat_bits

DENSITY = 0.01
Result = TypeVar("Result")


def one_step(stage: Stage) -> dict[str, sd.TensorDelta]:
    """Shifts of the first layer, nine in ten by 1."""
    rng, tensors = np.random.default_rng(0), {}
    for name, parameter in stage.model[0].named_parameters():
        fineness = torch.ldexp(torch.ones_like(parameter), -torch.frexp(parameter.float()).exponent).float()
        likely = (fineness * (DENSITY / fineness.clamp(max=1e4).mean())).clamp(max=0.5)
        positions = (torch.rand_like(likely) < likely).view(-1).nonzero().view(-1).cpu().numpy()
        shifts = rng.choice([-1, 1], positions.size) * np.where(rng.random(positions.size) < 0.1, 2, 1)
        base = flat_bits(parameter.data)[positions]
        tensors[f"0.{name}"] = sd.TensorDelta(tuple(parameter.shape), positions, shifts, "bfloat16", "ulp", base)
    return tensors


def file_on_base(stage: Stage) -> bytes:
    """The step of all layers, whose weights are the same, as a file that is read with its base."""
    tensors, small = one_step(stage), io.BytesIO()
    base = {f"0.{name}": flat_bits(parameter.data) for name, parameter in stage.model[0].named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        sd.save_delta(Path(folder) / "plain.shd", tensors)
        with sd.open_delta(Path(folder) / "plain.shd") as delta:
            write_on_base(delta, lambda record: base[record.name], small)
    digests = {name.removeprefix("0."): tensor_digest(tensor) for name, tensor in tensors.items()}
    every = [(f"{layer}.{name}", digest) for layer in range(stage.layers) for name, digest in digests.items()]
    with sd.open_delta(small.getvalue()) as delta:
        assert delta.needs_base
        data = small.getvalue() if delta.unpacked is None else delta.unpacked.tobytes()
    return for_all_layers(data, stage.layers, content_digest(sorted(every)))


class Parts:
    """The parts of a load, one after the other, of some of a file's tensors.

    Args:
        stage: the clock.
        delta: the file.
        names: of the tensors.
        elements: all elements of a tensor's base.
    """

    def __init__(self, stage: Stage, delta: Delta, names: Sequence[str], elements: Callable[[str], Elements]) -> None:
        self._stage, self._stored = stage, [delta[name] for name in names]
        self._elements = [partial(elements, name) for name in names]

    def positions(self, what: str) -> list[Located]:
        """Notes the times of what needs all weights."""
        elements, seconds = self._timed(lambda: [each() for each in self._elements])
        self._stage.row(what, "weights, copied if need be", len(elements), seconds)
        pairs = list(zip(self._stored, elements, strict=True))
        places, seconds = self._timed(lambda: [located(*pair) for pair in pairs])
        self._stage.row(what, "positions, elements there", len(elements), seconds)
        return places

    def run(self, what: str) -> None:
        """Notes the times of all parts."""
        places, clock = self.positions(what), partial(self._stage.row, what)
        found = list(zip(self._stored, places, strict=True))
        tensors, seconds = self._timed(lambda: [with_values(*each) for each in found])
        clock("shifts", len(found), seconds)
        rice = choose().index_codecs[IndexId.RICE]
        for part, work in {
            "positions as RICE": lambda one: rice.encode(one.positions(), one.shape),
            "shifts as ULP": lambda one: ULP.encode(one.bits()),
            "digest": tensor_digest,
        }.items():
            _, seconds = self._timed(partial(self._each, work, tensors))
            clock(part, len(found), seconds)

    @staticmethod
    def _each(work: Callable[[sd.TensorDelta], object], tensors: Sequence[sd.TensorDelta]) -> None:
        for tensor in tensors:
            work(tensor)

    def _timed(self, work: Callable[[], Result]) -> tuple[Result, float]:
        found: list[Result] = []
        seconds = self._stage.once(lambda: found.append(work()))
        return found[0], seconds


def copied(stage: Stage) -> float:
    """Copies as many bytes as the weights have on their device, in one piece."""
    size = sum(weight.numel() for weight in stage.weights())
    whole = torch.empty(size, dtype=torch.bfloat16, device=stage.device)
    other = torch.empty_like(whole)
    return stage.row("copy", "as many bytes in one piece", 1, stage.seconds(lambda: other.copy_(whole)))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="of 32; default 32 on a GPU, 1 on a CPU")
    parser.add_argument("--of-host", type=int, default=4, help="layers whose weights are copied to the host")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    stage = Stage(options.device, options.layers or (32 if options.device == "cuda" else 1), options.repeats)
    print(f"{where(options.device)}; {versions()}")
    data = file_on_base(stage)
    targets = live_tensors(stage.model)
    backend = "auto" if options.device == "cuda" else "torch"
    devices, host = devices_for(targets.values(), backend), NumpyBackend()
    copy = copied(stage)
    with sd.open_delta(data) as delta:
        print(
            f"{delta.nnz / 1e6:.1f} M nonzeros in {len(data) / 1e6:.1f} MB, {8 * len(data) / delta.nnz:.2f} bits each"
        )
        there = Parts(stage, delta, list(delta), lambda name: devices.all_elements(targets[name]))
        there.positions("there, first time")
        there.run("there")
        few = [name for name in delta if int(name.split(".")[0]) < options.of_host]
        Parts(stage, delta, few, lambda name: host.all_elements(targets[name])).run(f"host, {options.of_host} layers")
    swap = sd.HotSwap(stage.model, backend=backend)
    for number in range(options.repeats):
        stage.row("load", "HotSwap.load", number, stage.once(lambda: swap.load("step", data)))
        swap.switch("step")
        swap.revert()
        swap.unload("step")
    rows = [["", "s", "x a copy"]]
    for row in stage.rows:
        seconds = float(str(row["seconds"]))
        rows.append([f"{row['experiment']}: {row['what']}", f"{seconds:.4f}", f"{seconds / copy:.2f}"])
    print_table(f"{stage.layers} layers of Llama-2-7B, bf16, 1 %, on {where(options.device)}", rows)


if __name__ == "__main__":
    main()
