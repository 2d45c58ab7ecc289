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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch

import shiradelta as sd
from benchmarks.switch import Stage, for_all_layers, versions, where
from benchmarks.table import print_table
from shiradelta.backends.choose import choose
from shiradelta.format.codecs import ULP
from shiradelta.format.digest import content_digest, tensor_digest
from shiradelta.format.registry import IndexId
from shiradelta.hotswap import on_device
from shiradelta.hotswap.numpy import NumpyBackend
from shiradelta.hotswap.shifts_there import ShiftsThere
from shiradelta.hotswap.torch import TorchBackend
from shiradelta.hotswap.triton import on_base as together
from shiradelta.hotswap.triton.counted import Counted
from shiradelta.hotswap.triton.listed import ListedThere
from shiradelta.io.context import write_on_base
from shiradelta.io.reader import Delta
from shiradelta.io.restored import located, with_values
from shiradelta.models.live import Target, live_tensors
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


#: What a load does on a device, by parts, for each backend: (where a function is, its name, what it does).
PARTS: dict[str, list[tuple[object, str, str]]] = {
    "triton": [
        (together.SectionHeads, "of", "heads of sections"),
        (together, "_tiles", "tables of tiles"),
        (ListedThere, "of", "lists of tiles"),
        (ShiftsThere, "of", "lists of shifts"),
        (Counted, "__init__", "counts"),
        (together, "nonzeros", "positions, elements there"),
        (ShiftsThere, "decode", "shifts"),
        (together, "encode_there", "positions as RICE"),
        (TorchBackend, "_upload", "copies to the device, and there"),
        (TorchBackend, "check_base", "fingerprints"),
    ],
    "torch": [
        (on_device, "positions_of", "positions"),
        (on_device, "shifts_of", "shifts"),
        (on_device, "encode_there", "positions as RICE"),
        (TorchBackend, "check_base", "fingerprints"),
    ],
}


@contextmanager
def clocks(stage: Stage, parts: Sequence[tuple[object, str, str]]) -> Iterator[dict[str, float]]:
    """Adds up the seconds of all calls of some functions, the device's work included."""
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        for where_, name, what in parts:
            function = getattr(where_, name)

            def timed(*given: Any, _function: Any = function, _what: str = what, **named: Any) -> Any:
                found: list[Any] = []
                taken = stage.once(lambda: found.append(_function(*given, **named)))
                seconds[_what] = seconds.get(_what, 0.0) + taken
                return found[0]

            is_bound = hasattr(function, "__self__")
            stack.enter_context(mock.patch.object(where_, name, staticmethod(timed) if is_bound else timed))
        yield seconds


def in_host(stage: Stage, delta: Delta, names: Sequence[str], targets: Mapping[str, Target]) -> None:
    """Notes the parts of a load by the plain form, of some of a file's tensors, on one thread."""
    what, host, stored = f"host, {len(names)} tensors", NumpyBackend(), [delta[name] for name in names]
    rice = choose().index_codecs[IndexId.RICE]
    elements = noted(stage, what, "weights, copied", lambda: [host.all_elements(targets[name], []) for name in names])
    pairs = list(zip(stored, elements, strict=True))
    places = noted(stage, what, "positions, elements there", lambda: [located(*pair) for pair in pairs])
    both = list(zip(stored, places, strict=True))
    tensors = noted(stage, what, "shifts", lambda: [with_values(*each) for each in both])
    noted(stage, what, "positions as RICE", lambda: [rice.encode(one.positions(), one.shape) for one in tensors])
    noted(stage, what, "shifts as ULP", lambda: [ULP.encode(one.bits()) for one in tensors])
    noted(stage, what, "digest", lambda: [tensor_digest(one) for one in tensors])


def noted(stage: Stage, experiment: str, what: str, work: Callable[[], Sequence[Result]]) -> Sequence[Result]:
    """Notes the time of some work, and returns what it gives."""
    found: list[Sequence[Result]] = []
    seconds = stage.once(lambda: found.append(work()))
    stage.row(experiment, what, len(found[0]), seconds)
    return found[0]


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
    backend = "triton" if options.device == "cuda" else "torch"
    copy = copied(stage)
    with sd.open_delta(data) as delta:
        print(
            f"{delta.nnz / 1e6:.1f} M nonzeros in {len(data) / 1e6:.1f} MB, {8 * len(data) / delta.nnz:.2f} bits each"
        )
        few = [name for name in delta if int(name.split(".")[0]) < options.of_host]
        in_host(stage, delta, few, targets)
    swap = sd.HotSwap(stage.model, backend=backend)
    for number in range(options.repeats + 1):
        parts = PARTS[backend] if number == options.repeats else []
        with clocks(stage, parts) as of_parts:
            whole = stage.once(lambda: swap.load("step", data))
        stage.row("load", "HotSwap.load, by parts" if parts else "HotSwap.load", number, whole)
        for what, taken in of_parts.items():
            stage.row("there", what, number, taken)
        if parts:
            stage.row("there", "the rest", number, whole - sum(of_parts.values()))
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
