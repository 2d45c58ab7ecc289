"""Signals at random moments after the first file of every command that writes; `VICTIMS` lists them.

Whatever the moment, what a command writes is as before it or as after it, or `verify` says that an action was
interrupted.  SIGTERM, SIGINT and SIGHUP leave no temporary; SIGKILL may, in nobody's way: the same command run again
ends as if nothing had been, and a last revert must leave the base.
`python -m tests.killing --count 1000 --processes 16` prints how it went; other moments come with another `--seed`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from itertools import cycle
from pathlib import Path

from tests.scenes import SIGNALS, Scene, Victim, preload, write_inputs

_FIT = "--fit {texts} --sparsity 0.05 --fit-steps 12 --fit-batch 16 --accept-worse --device cpu"
_TRAIN = (
    "--texts {pairs} --sparsity 0.1 --steps 10 --batch 12 --relative-lr 0.4 --tokens 16 --accept-worse --device cpu"
)
VICTIMS = (
    Victim("apply", "apply model {a}", weight=12),
    Victim("apply on top", "apply model {b}", ("apply model {a}",)),
    Victim("apply whole tensors", "apply model {whole}"),
    Victim("apply --out", "apply {model} {a} --out out", weight=6),
    Victim("revert", "revert model", ("apply model {a}",), weight=12),
    Victim("revert whole tensors", "revert model", ("apply model {whole}",)),
    Victim("revert --all", "revert --all model", ("apply model {a}", "apply model {b}"), halfway="revert model"),
    Victim("commit", "commit model", ("apply model {a}",)),
    Victim("convert", "convert {source} --base {model} -o out.shd", weight=6),
    Victim(
        "convert over an older file", "convert {source} --base {model} -o out.shd", ("fuse {a} -o out.shd",), weight=6
    ),
    Victim("fuse", "fuse {a} {b} -o out.shd", weight=6),
    Victim("fuse over an older file", "fuse {a} {b} -o out.shd", ("fuse {a} -o out.shd",), weight=6),
    Victim("chain follow", "chain follow out model", ("chain init out {model}", "chain publish out {a}")),
    Victim("export", "export {a} dense out.safetensors"),
    Victim("export merged", "export {a} merged out --model {model}"),
    Victim("sign", "sign {a} --key {key} -o out.sig"),
    Victim("sign --force", "sign {a} --key {key} -o out.sig --force", ("sign {b} --key {key} -o out.sig",)),
    Victim("convert --fit", f"convert {{tuned}} --base {{small}} -o out.shd {_FIT}", kept="out.shd.fit"),
    Victim("train", f"train {{small}} -o out.shd {_TRAIN}", kept="out.shd.train"),
)
#: Names and shapes of a layer of MiniLM.
LAYER = {
    **{f"attention.self.{name}.weight": (384, 384) for name in ("query", "key", "value")},
    "attention.output.dense.weight": (384, 384),
    "attention.output.LayerNorm.weight": (384,),
    "intermediate.dense.weight": (1536, 384),
    "output.dense.weight": (384, 1536),
}


def kill(scene: Scene, moment: float, number: signal.Signals) -> str:
    """Ends a command so many seconds after its first file, and checks everything; says what was found."""
    scene.reset()
    child = scene.start(scene.victim.command)
    time.sleep(moment)
    with suppress(ProcessLookupError):  # it has ended
        os.kill(child.pid or 0, number)
    child.join()
    return scene.settle(clean=number is not signal.SIGKILL)


def kill_repeatedly(victim: Victim, inputs: Path, count: int, seed: object, work: Path) -> Counter[str]:
    """Ends a victim by each signal in turn; how often which state was found.

    Args:
        victim: the command.
        inputs: the folder of what it reads.
        count: how often.
        seed: decides at which moments.
        work: a folder of its own, which is made if there is none.
    """
    work.mkdir(exist_ok=True)
    generator = random.Random(f"{seed} {victim.name}")
    seen: Counter[str] = Counter()
    scene = Scene(victim, inputs, work)
    for number, ended_by in zip(range(count), cycle(SIGNALS), strict=False):
        moment = generator.uniform(0, scene.seconds)
        try:
            outcome = kill(scene, moment, ended_by)
        except AssertionError as error:
            raise AssertionError(f"{victim.name}, {ended_by.name} after {moment:.4f} s, number {number}") from error
        seen[f"{victim.name}, {ended_by.name}: {outcome}"] += 1
    return seen


def write_training_inputs(root: Path) -> None:
    """Adds a small encoder, a fine-tune of it, texts and pairs."""
    from tests.fit.test_fit import texts, write_pair
    from tests.train.test_run import write

    base, tuned = write_pair("encoder", root / "pair")
    (root / "small").symlink_to(base)
    (root / "tuned").symlink_to(tuned)
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    write(root / "pairs.jsonl", "pairs")


def kill_in_parallel(victims: Sequence[Victim], inputs: Path, options: Namespace, work: Path) -> int:
    """Ends commands in several processes at once, and prints what was found; returns the number of problems."""
    whole = sum(victim.weight for victim in victims)
    problems = total = 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, spawn, initializer=preload, initargs=(victims,)) as pool:
        shares: dict[str, list[tuple[int, Future[Counter[str]]]]] = {}
        for victim in victims:
            count = -(-options.count * victim.weight // whole)
            parts = min(options.processes, count)
            for part in range(parts):
                share = len(range(part, count, parts))
                folder = work / f"{victim.name} {part}"
                future = pool.submit(kill_repeatedly, victim, inputs, share, f"{options.seed}.{part}", folder)
                shares.setdefault(victim.name, []).append((share, future))
        for name, futures in shares.items():
            seen: Counter[str] = Counter()
            for share, future in futures:
                try:
                    seen += future.result()
                    total += share
                except Exception as error:
                    problems += 1
                    print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
            print(f"{name}: {sum(seen.values())} signals, {total} in all; what was found:")
            for outcome, times in sorted(seen.items()):
                print(f"  {times:4}  {outcome}", flush=True)
    print(f"{total} signals, {problems} problems")
    return problems


def main() -> int:
    """The full run, on two layers in bf16 (7 MB), and on a small encoder where it trains."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME", action="append", help="a row of VICTIMS; repeatable")
    parser.add_argument("--processes", type=int, default=1, help="as many at a time; one for each processor")
    options = parser.parse_args()
    unknown = {*(options.only or [])} - {victim.name for victim in VICTIMS}
    if unknown:
        parser.error(f"no row of VICTIMS: {', '.join(sorted(unknown))}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch  # not above: every process of a test would wait for it
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(dir=".") as folder:
        work = Path(folder).resolve()
        torch.manual_seed(0)
        base = {f"layer.{i}.{name}": torch.randn(shape).bfloat16() for i in range(2) for name, shape in LAYER.items()}
        tuned = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.items()}
        for name, tensors in (("base", base), ("finetune", tuned)):
            (work / name).mkdir()
            save_file(tensors, work / name / "model.safetensors", metadata={"format": "pt"})
        (work / "inputs").mkdir()
        write_inputs(work / "inputs", work / "base", work / "finetune")
        victims = [victim for victim in VICTIMS if victim.name in (options.only or [victim.name])]
        if any(victim.kept for victim in victims):
            write_training_inputs(work / "inputs")
        return 1 if kill_in_parallel(victims, work / "inputs", options, work) else 0


if __name__ == "__main__":
    sys.exit(main())
