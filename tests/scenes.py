"""Commands that write, each in a folder and a process of its own, and what the folder may be after one was stopped."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Lock
from pathlib import Path

import numpy as np

import shiradelta
from shiradelta import TensorDelta
from shiradelta.folder.verification import VerifyReport
from tests import forked
from tests.forked import CONTEXT

#: What ends a process from outside.
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if os.name != "nt" else ()
#: What commands that train load; with it each begins in milliseconds.
_TRAINING = ["shiradelta.train.run", "shiradelta.fit.run", "transformers.models.bert.modeling_bert"]


@dataclass(frozen=True)
class Victim:
    """A command that writes.

    Attributes:
        name: what it is called.
        command: the arguments of the command line; "{a}" is a file of the inputs, "model" a copy of the base that may
            be changed, "out..." what is written.
        before: commands that run first.
        halfway: a command that gives the one state between before and after that is whole, too.
        kept: the file of an unfinished run, which stays until the run is finished.
        weight: its share of all signals.
    """

    name: str
    command: str
    before: tuple[str, ...] = ()
    halfway: str = ""
    kept: str = ""
    weight: int = 4

    @property
    def changes_model(self) -> bool:
        """Whether it works on a model's folder in place."""
        return "model" in self.command.split()


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


@dataclass(frozen=True)
class Look:
    """What is in a folder: its files without temporaries, what `verify` says of the model, the journal's files."""

    files: dict[str, bytes]
    model: tuple[str, int]
    journal: list[str]

    def same(self, other: Look) -> bool:
        """Whether all but the journal's files are the same."""
        return (self.files, self.model) == (other.files, other.model)


def is_temporary(name: str) -> bool:
    """Whether a path is that of a temporary, or in one."""
    return any(part.startswith(".") and part.endswith(".tmp") for part in Path(name).parts)


class Scene:
    """A victim in a folder of its own, with the states that it may be found in.

    Args:
        victim: the row.
        inputs: the folder of what the commands read.
        work: where the folder is made.
    """

    def __init__(self, victim: Victim, inputs: Path, work: Path) -> None:
        self.victim, self._inputs, self.folder = victim, inputs, work / "folder"
        self._template = work / f"template {victim.name}"
        self._template.mkdir()
        if victim.changes_model:
            shutil.copytree(inputs / "model", self._template / "model")
        for command in victim.before:
            run(self._arguments(command, self._template))
        self.states = []
        spans = []
        for command in ("", victim.halfway, victim.command, victim.command):
            self.reset()
            start = time.perf_counter()
            if command:
                child = self.start(command)
                start = time.perf_counter()
                child.join()
                assert child.exitcode == 0, self.said
            spans.append(time.perf_counter() - start)
            self.states.append(self.look())
        self.seconds = min(spans[2:])

    def _arguments(self, command: str, folder: Path) -> list[str]:
        """The words of a command with whole paths."""
        named = {path.stem: str(path) for path in self._inputs.iterdir()}
        own = ("model", "out", "out.shd", "out.sig", "out.safetensors")
        return [str(folder / word) if word in own else word.format_map(named) for word in command.split()]

    @property
    def said(self) -> str:
        """What the command has printed."""
        return self.folder.with_suffix(".said").read_text()

    def reset(self) -> None:
        """Makes the folder as it is before the command."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._template, self.folder)

    def start(self, command: str, hold: Lock | None = None) -> BaseProcess:
        """Runs a command in a process of its own, and returns when it makes its first file.

        Args:
            command: the command.
            hold: a lock that the process waits for before it begins; with it, this returns when it waits.
        """
        writing, tell = CONTEXT.Pipe(duplex=False)
        said = str(self.folder.with_suffix(".said"))
        child: BaseProcess = CONTEXT.Process(
            target=_work, args=(self._arguments(command, self.folder), said, tell, hold)
        )
        child.start()
        tell.close()
        writing.recv()
        return child

    def look(self) -> Look:
        """What is in the folder; `verify` must change nothing."""
        found = {
            name: data
            for name, data in contents(self.folder).items()
            if not is_temporary(name) and name != self.victim.kept
        }
        if not self.victim.changes_model:
            return Look(found, ("", 0), [])
        report = shiradelta.verify(self.folder / "model")
        assert found.items() <= contents(self.folder).items()
        own = [path.name for path in (self.folder / "model" / ".shiradelta").rglob("*") if path.is_file()]
        # An apply that is taken back may have recorded the base's digests, by which `verify` knows it then.
        state = "interrupted" if report.interrupted else report.state.replace("unknown", "base")
        return Look(found, (state, len(report.applied)), sorted({*own} - {"lock", "state.json"}))

    def settle(self, *, clean: bool) -> str:
        """Checks everything after a command was stopped or failed; says what was found.

        Args:
            clean: it could take away what it had made; otherwise temporaries and an interrupted action may be left.
        """
        assert "Traceback" not in self.said or "Exception ignored" in self.said, self.said
        found = self.look()
        before, after = self.states[0], self.states[-1]
        left = sorted(str(path) for path in self.folder.rglob("*") if is_temporary(str(path)))
        kept = bool(self.victim.kept) and (self.folder / self.victim.kept).exists()
        if found.model[0] == "interrupted":
            outcome = "interrupted"
        else:
            outcome = "before" if found.same(before) else "after" if found.same(after) else "halfway"
            assert any(found.same(state) for state in self.states), (found.model, sorted(found.files))
        if clean:
            assert not left, left
            assert found in self.states, (found.model, found.journal)
        if outcome != "after" or kept:
            run(self._arguments(self.victim.command, self.folder))
            assert self.look() == after, "the same command again ends otherwise"
        if self.victim.changes_model and self.victim.name != "commit":
            for _ in shiradelta.verify(self.folder / "model").applied:
                shiradelta.revert(self.folder / "model")
            assert contents(self.folder / "model") == contents(self._inputs / "model")
        return outcome + (", a state to go on from" if kept else "") + (", a temporary left" if left else "")


def run(arguments: Sequence[str]) -> None:
    """Runs a command in a process of its own, which has to succeed."""
    child = CONTEXT.Process(target=_work, args=(arguments, os.devnull))
    child.start()
    child.join()
    assert child.exitcode == 0, arguments


def _work(arguments: Sequence[str], said: str, tell: Connection | None = None, hold: Lock | None = None) -> None:
    """The process that runs a command."""
    from shiradelta.cli import main

    if "torch" in sys.modules:  # a command that trains; loading torch takes seconds
        from shiradelta.nonzeros import unfinished

        unfinished.SAVE_EVERY = -1  # seconds: after each step
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    sys.stdout = sys.stderr = open(said, "w")  # noqa: SIM115 - until the process ends
    if hold is not None and tell is not None:
        tell.send(None)
        hold.acquire()
    elif tell is not None:
        sys.addaudithook(partial(_tell_of_file, tell))
    code: object = 1
    try:
        main([*arguments])
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:  # before the command line has begun, or after it
        pass
    except BaseException:
        traceback.print_exc()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 0)  # what forked it would end in its own way


def _tell_of_file(tell: Connection, event: str, given: tuple[object, ...]) -> None:
    """Says when a process makes its first file, as a hook of the interpreter's events."""
    if event == "open" and isinstance(given[2], int) and given[2] & os.O_CREAT and ".pyc" not in str(given[0]):
        with suppress(OSError):  # said before
            tell.send(None)
            tell.close()


def preload(victims: Sequence[Victim]) -> None:
    """Lets the processes of commands begin with everything imported; called before the first one."""
    forked.preload(*(_TRAINING if any(victim.kept for victim in victims) else []))


def write_inputs(root: Path, model: Path, source: Path) -> None:
    """Puts what the commands read into a folder, all but what trains: the base, deltas, a key.

    Args:
        root: the folder, which is empty.
        model: the base.
        source: what is converted.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    # Without a configuration: transformers, which knows a class's names, would be loaded by each process.
    for name, path in (("model", model), ("source", source)):
        shutil.copytree(path, root / name, ignore=shutil.ignore_patterns("config.json"))
    for name, sparsity in (("a", 0.05), ("b", 0.02)):
        shiradelta.convert(source, root / f"{name}.shd", base=model, sparsity=sparsity)
    with shiradelta.open_delta(root / "b.shd") as delta:
        changed, dropped = [(name, tensor.shape, tensor.dtype) for name, tensor in delta.items()][:2]
    tensors = {
        "added.weight": TensorDelta((2, 8), None, np.arange(16, dtype=np.uint16), "bfloat16", "new"),
        dropped[0]: TensorDelta(dropped[1], None, [], dropped[2], "drop"),
        changed[0]: TensorDelta(changed[1], [1, 2], [1.0, -1.0], changed[2]),
    }
    shiradelta.save_delta(root / "whole.shd", tensors, values="f32")
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    (root / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (root / "key.pem").chmod(0o600)
