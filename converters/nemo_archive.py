"""`.nemo` archives: a tar file with the weights of NeMo as torch saves them, and a configuration.

Nothing is extracted but the weights, to a temporary folder; sizes are bounded by that of the archive.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import GzipFile
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import IO

from shiradelta.errors import SourceError
from shiradelta.io.recognise import Wanted
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.util.regular_file import open_regular
from shiradelta.util.text import brief

SUFFIX = ".nemo"
_WEIGHTS, _CONFIG = "model_weights.ckpt", "model_config.yaml"
_GZIP = b"\x1f\x8b"
#: Entries of an archive; weights have one file a tensor only in distributed checkpoints, which are not read.
_MOST_ENTRIES = 100_000
#: Bytes of a configuration, and of what a compressed archive holds for each of its own.
_MOST_CONFIG, _MOST_RATIO = 1 << 20, 64
_RANK = re.compile(r"(?:tp|mp)_rank_\d+(?:_pp_rank_\d+)?/" + re.escape(_WEIGHTS))
_LINE = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: +(?P<value>.*?))? *")


def is_archive(path: Path) -> bool:
    """Whether a source is an archive, by its name."""
    return path.suffix == SUFFIX and path.is_file()


def weights_in(path: Path) -> Checkpoint:
    """The tensors in an archive.

    Raises:
        SourceError: it is damaged, or holds no weights of one process.
        MissingDependencyError: torch is not installed, or too old.
    """
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / _WEIGHTS
        with _opened(path) as entries, _entry(path, entries, _WEIGHTS) as stored, open(file, "wb") as output:
            shutil.copyfileobj(stored, output)
        try:
            found = open_checkpoint(file, Wanted.SOURCE)  # maps the elements, which stay when the file has gone
        except SourceError as error:
            raise SourceError(str(error).replace(str(file), f"{path}: {_WEIGHTS}")) from None
    found.root = path
    return found


def alpha_in(path: Path) -> float | None:
    """The alpha in an archive's configuration, `peft.lora_tuning.alpha`; None if it does not say one.

    Raises:
        SourceError: the archive is damaged.
    """
    with _opened(path) as entries:
        if not any(_name(entry) == _CONFIG for entry in entries.getmembers()):
            return None
        with _entry(path, entries, _CONFIG) as stored:
            text = stored.read(_MOST_CONFIG).decode("utf-8", "replace")
    settings = _settings(text)
    value = settings.get("peft.lora_tuning.alpha", "")
    if re.fullmatch(r"\$\{[\w.]*\badapter_dim\}", value):
        value = settings.get("peft.lora_tuning.adapter_dim", "")
    return float(value) if re.fullmatch(r"\d{1,6}(?:\.\d{1,6})?", value) else None


def _settings(text: str) -> dict[str, str]:
    """The plain values of a configuration, by their keys joined with dots; one that is given twice has no value."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        indent = len(match["indent"])
        while above and above[-1][0] >= indent:
            above.pop()
        above.append((indent, match["key"]))
        name = ".".join(key for _, key in above)
        found[name] = "" if name in found else match["value"] or ""
    return found


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """An archive whose entries are known.

    Raises:
        SourceError: it is damaged, or none that NeMo writes.
    """
    try:
        with open_regular(path) as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            zipped = stream.read(2) == _GZIP
            stream.seek(0)
            bounded = _Bounded(stream, size * _MOST_RATIO) if zipped else stream
            with tarfile.open(fileobj=bounded, mode="r:") as entries:
                for number, _ in enumerate(entries):
                    if number >= _MOST_ENTRIES:
                        raise ValueError(f"it has more than {_MOST_ENTRIES:,} entries")
                yield entries
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.strerror:
            where = f"cannot be read, or copied to {gettempdir()}"
            raise SourceError(f"{path}: {where} ({error.strerror}); check the path, and the space there") from None
        what = brief(str(error), 100)
        raise SourceError(f"{path}: is no archive of NeMo, or damaged ({what}); get it again") from None


@contextmanager
def _entry(path: Path, entries: tarfile.TarFile, name: str) -> Iterator[IO[bytes]]:
    """An entry of an archive, which is a plain file.

    Raises:
        SourceError: it is not there, or another kind of entry.
    """
    named = [entry for entry in entries.getmembers() if _name(entry) == name]
    if not named:
        why = f"has no {name}"
        if any(_RANK.fullmatch(_name(entry)) for entry in entries.getmembers()):
            why = f"has the {name} of several ranks"
        raise SourceError(f"{path}: {why}; save it with NeMo as one file, of one rank")
    if len(named) > 1 or not named[0].isreg() or named[0].issparse():
        raise SourceError(f"{path}: {name} is in it twice, or is no plain file; get it again")
    stored = entries.extractfile(named[0])
    assert stored is not None
    with stored:
        yield stored


def _name(entry: tarfile.TarInfo) -> str:
    return entry.name.removeprefix("./")


class _Bounded(GzipFile):
    """What a compressed file holds, up to a number of bytes."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        super().__init__(fileobj=stream, mode="rb")
        self._most = most

    def read(self, size: int | None = -1) -> bytes:
        """As of any file.

        Raises:
            ValueError: it goes on beyond the bound.
        """
        self._check(self.tell() + (size or 0))
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file.

        Raises:
            ValueError: it is beyond the bound.
        """
        self._check(offset)
        return super().seek(offset, whence)

    def _check(self, place: int) -> None:
        if place > self._most:
            raise ValueError(f"it holds more than {_MOST_RATIO} times its size")
