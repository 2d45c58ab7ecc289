"""System calls of commands fail from outside, by `strace`, which also reaches what C code calls.

One call with a certain number fails, or all from it on; EINTR every second one, for Python repeats most calls that were
interrupted.  Afterwards the folder is as before the command or as after it, or `verify` says that an action was
interrupted; an error is one line and true; the same command again ends as if nothing had been.
`python -m tests.injection --count 2000` prints a table; without `--count` every call is tried.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.forked import CONTEXT
from tests.killing import VICTIMS
from tests.scenes import Scene, Victim, preload, write_inputs

#: How many calls fail -> what follows the number of the first in strace's `when`, and the errors.
KINDS = {"once": ("", ("EIO", "ENOSPC", "EINTR")), "from then on": ("+", ("EIO", "ENOSPC")), "half": ("+2", ("EINTR",))}
#: Calls that look at files, change them, or get memory for them, for a library or for a thread.
CALLS = (
    *(
        "openat",
        "read",
        "pread64",
        "write",
        "pwrite64",
        "lseek",
        "close",
        "fsync",
        "fdatasync",
        "msync",
        "mmap",
        "flock",
    ),
    *("newfstatat", "fstat", "statx", "getdents64", "ftruncate", "fallocate", "copy_file_range", "sendfile"),
    *("rename", "renameat", "renameat2", "linkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir"),
    *("fchmod", "chmod", "fchmodat", "faccessat", "faccessat2", "access", "ioctl", "fcntl"),
)
#: How long a command may take.
_SECONDS = 60


@dataclass(frozen=True)
class Fault:
    """Which call fails, and how."""

    call: str
    number: int
    kind: str
    error: str

    def __str__(self) -> str:
        return f"{self.call} {self.number}, {self.kind}, {self.error}"

    @property
    def injection(self) -> str:
        """The value of strace's option `inject`."""
        return f"{self.call}:error={self.error}:when={self.number}{KINDS[self.kind][0]}"


def traced(scene: Scene, *options: str) -> int:
    """Runs a scene's command under strace; its exit code."""
    hold = CONTEXT.Lock()
    with hold:
        child = scene.start(scene.victim.command, hold)
        command = ["strace", "-f", "-p", str(child.pid), *options]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        line = tracer.stderr.readline()
        assert "attached" in line, line
    child.join(_SECONDS)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise AssertionError("it does not end")
    tracer.communicate()
    return child.exitcode


def calls_of(scene: Scene, log: Path) -> Counter[str]:
    """How often a command makes each system call."""
    scene.reset()
    assert traced(scene, "-o", str(log), "-e", "trace=" + ",".join(f"?{call}" for call in CALLS)) == 0
    found = re.findall(r"^\d+ +(\w+)\(", log.read_text(), re.MULTILINE)
    return Counter(found)


def faults_of(calls: Counter[str]) -> Iterator[Fault]:
    """Every fault of a command that makes these calls."""
    for call, count in calls.items():
        for kind, (_, errors) in KINDS.items():
            numbers = range(1, count + 1) if kind != "half" else range(1, 2)
            own = ("ENOMEM",) if call == "mmap" else errors
            yield from (Fault(call, number, kind, error) for number in numbers for error in own)


def inject(scene: Scene, fault: Fault) -> str:
    """Lets a call fail and checks everything; says what was found."""
    scene.reset()
    code = traced(scene, "-o", "/dev/null", "-e", f"trace={fault.call}", "-e", f"inject={fault.injection}")
    said = scene.said
    found = scene.look()
    before, after = scene.states[0], scene.states[-1]
    assert code in (0, 1, 120), f"exit code {code}: {said}"  # 120: what it said could not be written
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code or found.same(after), f"exit code 0: {said}"
    assert len(errors) <= 1, said
    if "nothing was changed" in said:
        assert found.same(before), said
    return ("an error, " if code else "") + scene.settle(clean=False)


def inject_repeatedly(
    victims: Sequence[Victim], inputs: Path, count: int | None, seed: int, work: Path
) -> tuple[Counter[str], list[str]]:
    """Lets calls of commands fail, `count` of all or each one: (how often what was found, what was wrong)."""
    preload(victims)
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    for victim in victims:
        scene = Scene(victim, inputs, work)
        faults = list(faults_of(calls_of(scene, work / "calls")))
        if count is not None:
            faults = random.Random(seed).sample(faults, min(len(faults), -(-count // len(victims))))
        for fault in faults:
            try:
                seen[f"{victim.name}: {inject(scene, fault)}"] += 1
            except AssertionError as error:
                wrong.append(f"{victim.name}, {fault}: {error}")
                print(wrong[-1], file=sys.stderr, flush=True)
    return seen, wrong


def main() -> int:
    """The full run, on small models; the exit code is 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, help="number of calls that fail; all without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME", help="one row of VICTIMS")
    options = parser.parse_args()
    if shutil.which("strace") is None:
        print("strace is not installed; nothing was tried")
        return 0
    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(dir=".") as folder:
        work = Path(folder).resolve()
        generator = torch.Generator().manual_seed(0)
        base = {f"layer.{i}.weight": torch.randn(96, 32, generator=generator).bfloat16() for i in range(4)}
        tuned = {name: (tensor + 0.1 * torch.randn(tensor.shape)).bfloat16() for name, tensor in base.items()}
        for name, tensors in (("base", base), ("finetune", tuned)):
            (work / name).mkdir()
            save_file(tensors, work / name / "model.safetensors", metadata={"format": "pt"})
        (work / "inputs").mkdir()
        write_inputs(work / "inputs", work / "base", work / "finetune")
        victims = [row for row in VICTIMS if not row.kept and options.only in (None, row.name)]
        seen, wrong = inject_repeatedly(victims, work / "inputs", options.count, options.seed, work)
    print(
        f"{sum(seen.values()) + len(wrong)} commands with failing calls, {len(wrong)} problems; what was found after:"
    )
    for outcome, times in sorted(seen.items()):
        print(f"  {times:5}  {outcome}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
