"""Files of tensors other than safetensors: GGUF, NumPy's `.npz`, pickles of PyTorch."""

from __future__ import annotations

import io
import math
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from shiradelta.format.registry import DTYPE_OF_SAFETENSORS
from tests.source_files import DEEP, Made


def _same(data: bytes) -> bytes:
    return data


@dataclass
class Gguf:
    """A GGUF file of version 3: tensors, and values by key."""

    tensors: dict[str, Made]
    values: dict[str, Any]
    #: Name of a tensor -> GGUF's type, where the dtype does not say it.
    kinds: dict[str, int] = field(default_factory=dict)
    #: (which field of the header, as a share of them; what stands there instead).
    damage: list[tuple[float, bytes]] = field(default_factory=list)

    def bytes(self) -> bytes:
        fields = [b"GGUF", struct.pack("<I", 3), struct.pack("<Q", len(self.tensors))]
        fields.append(struct.pack("<Q", len(self.values)))
        for key, value in self.values.items():
            fields += [*_text(key), *_value(value)]
        data = b""
        for name, (dtype, shape, raw) in self.tensors.items():
            kind = self.kinds.get(name, {"F32": 0, "F16": 1, "BF16": 30}.get(dtype, 99))
            fields += [*_text(name), struct.pack("<I", len(shape)), *(struct.pack("<Q", size) for size in shape[::-1])]
            fields += [struct.pack("<I", kind), struct.pack("<Q", len(data))]
            data += raw + bytes(-len(raw) % 32)
        for where, put in self.damage:
            at = int(where * len(fields))
            fields[at] = put[: len(fields[at])] if len(fields[at]) in (4, 8) else put
        head = b"".join(fields)
        return head + bytes(-len(head) % 32) + data


def _text(text: str) -> list[bytes]:
    held = text.encode("utf-8", "surrogatepass")
    return [struct.pack("<Q", len(held)), held]


def _value(value: Any) -> list[bytes]:
    """The type and the value; of what GGUF does not know, the text."""
    if isinstance(value, bool):
        return [struct.pack("<I", 7), bytes([value])]
    if isinstance(value, float):
        return [struct.pack("<I", 12), struct.pack("<d", value)]
    if isinstance(value, int) and 0 <= value < 1 << 64:
        return [struct.pack("<I", 10), struct.pack("<Q", value)]
    if isinstance(value, list):
        texts = [part for one in value for part in _text(str(one))]
        return [struct.pack("<I", 9), struct.pack("<I", 8), struct.pack("<Q", len(value)), *texts]
    with suppress(ValueError):  # an integer of more digits than Python writes
        return [struct.pack("<I", 8), *_text(str(value))]
    return [struct.pack("<I", 8), *_text("9" * 5000)]


#: Dtypes in NumPy's words; a dtype that is not here stands for itself.
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"}


@dataclass
class Npz:
    """NumPy's archive of arrays."""

    tensors: dict[str, Made]
    compressed: bool = False
    #: Changes the header of each array.
    damage: list[Callable[[dict[str, Any]], Any]] = field(default_factory=list)
    #: Changes the archive.
    after: Callable[[bytes], bytes] = _same

    def bytes(self) -> bytes:
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED if self.compressed else zipfile.ZIP_STORED) as archive:
            for name, (dtype, shape, raw) in self.tensors.items():
                descr = _NUMPY.get(
                    dtype, f"|V{DTYPE_OF_SAFETENSORS[dtype].size}" if dtype in DTYPE_OF_SAFETENSORS else dtype
                )
                header: Any = {"descr": descr, "fortran_order": False, "shape": tuple(shape)}
                for change in self.damage:
                    header = change(header)
                _put(archive, f"{name}.npy", _npy(header, raw))
        return self.after(held.getvalue())


def _npy(header: Any, raw: bytes) -> bytes:
    try:
        text = repr(header).encode("utf-8", "surrogatepass").replace(repr(DEEP).encode(), b"[" * 999 + b"]" * 999)
    except ValueError:  # an integer of more digits than Python writes
        text = b"{'shape': (" + b"9" * 5000 + b",)}"
    version = (
        b"\x01\x00" + struct.pack("<H", len(text))
        if len(text) < 1 << 16
        else b"\x02\x00" + struct.pack("<I", len(text))
    )
    return b"\x93NUMPY" + version + text + raw


def _put(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Writes an entry, under another name where an archive cannot have that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        try:
            archive.writestr(zipfile.ZipInfo(name), data, archive.compression)
        except (ValueError, UnicodeError, struct.error, IndexError):
            archive.writestr(zipfile.ZipInfo("x.npy"), data, archive.compression)


@dataclass
class Pickle:
    """What torch.save writes of tensors by name."""

    tensors: dict[str, Made]
    #: Of the tensors: "strided", or one of torch.sparse.
    layout: str = "strided"
    legacy: bool = False
    #: Changes an entry of the archive: (name, its bytes) -> its bytes.
    damage: list[Callable[[str, bytes], bytes]] = field(default_factory=list)
    #: Changes the file.
    after: Callable[[bytes], bytes] = _same

    def bytes(self) -> bytes:
        import torch

        held = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layouts in beta
            tensors = {name: self._tensor(made) for name, made in self.tensors.items()}
            torch.save(tensors, held, _use_new_zipfile_serialization=not self.legacy)
        data = held.getvalue()
        return self.after(self._rewritten(data) if self.damage and not self.legacy else data)

    def _tensor(self, made: Made) -> Any:
        import torch

        dtype, shape, raw = made
        kind = getattr(torch, DTYPE_OF_SAFETENSORS[dtype].name, torch.uint8)
        try:
            flat = torch.frombuffer(bytearray(raw), dtype=kind) if raw else torch.empty(0, dtype=kind)
            tensor = flat.reshape(shape) if math.prod(shape) == flat.numel() else flat
            return (
                tensor if self.layout == "strided" else tensor.to_sparse(layout=getattr(torch, f"sparse_{self.layout}"))
            )
        except (RuntimeError, TypeError, ValueError, OverflowError, IndexError):  # torch has no such tensor
            return torch.ones(3)

    def _rewritten(self, data: bytes) -> bytes:
        held = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(held, "w", zipfile.ZIP_STORED) as new:
            for entry in old.infolist():
                content = old.read(entry)
                for change in self.damage:
                    content = change(entry.filename, content)
                new.writestr(zipfile.ZipInfo(entry.filename), content)
        return held.getvalue()


@dataclass
class Tar:
    """A tar file, as `.nemo` archives are: tensors in a pickle, and other entries."""

    tensors: dict[str, Made]
    others: dict[str, bytes]
    zipped: bool = False
    #: Change the entries: (name, bytes, changes of tarfile's entry).
    damage: list[Callable[[list[tuple[str, bytes, dict[str, Any]]]], None]] = field(default_factory=list)

    def bytes(self) -> bytes:
        entries = [(name, data, dict[str, Any]()) for name, data in self.others.items()]
        entries.append(("./model_weights.ckpt", Pickle(self.tensors).bytes(), {}))
        for change in self.damage:
            change(entries)
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz" if self.zipped else "w:") as made:
            for name, data, about in entries:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                for key, value in about.items():
                    setattr(entry, key, value)
                with suppress(OSError, ValueError, OverflowError):  # it has less than it says, or cannot be
                    made.addfile(entry, io.BytesIO(data))
        return stream.getvalue()
