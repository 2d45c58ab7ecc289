"""Other projects' ways to store a step: `pip install openzl zipnn fireworks-delta-compression zstd weightscope`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from benchmarks.lossless.steps import State, bits
from benchmarks.lossless.ways import Way, of_xor, split
from shiradelta.format.arithmetic import Array
from shiradelta.util.threads import THREADS

FIREWORKS = "fireworks_delta_compression"
#: Its formats of a tensor.
ARCS = ("arc_v1", "arc_v2", "arc_v3")


def by_zipnn(base: State, tuned: State) -> Way:
    """ZipNN, which has a mode for the difference of two files."""
    zipnn = importlib.import_module("zipnn")
    old = joined(base, base)

    def coder() -> Any:
        return zipnn.ZipNN(
            input_format="byte", bytearray_dtype="bfloat16", delta_compressed_type="byte", threads=THREADS
        )

    def encode() -> bytes:
        return bytes(coder().compress(joined(tuned, base), delta_second_data=old))

    def decode(stored: bytes) -> State:
        return split(np.frombuffer(coder().decompress(stored, delta_second_data=old), np.int16).copy(), base)

    return Way("zipnn, byte delta", encode, len, decode)


def joined(state: State, like: State) -> bytes:
    """All tensors' bytes, in the order of another state."""
    return b"".join(bits(state[key]).tobytes() for key in like)


def by_fireworks(base: State, tuned: State, folder: Path, layout: str, threads: int = THREADS) -> Way:
    """fireworks-delta-compression, a tensor on each of some threads."""
    fireworks = importlib.import_module(FIREWORKS)
    path = folder / layout

    def encode() -> Path:
        with ThreadPoolExecutor(threads) as executor:
            fireworks.delta_compress_dicts_to_file(
                src=dict(base), dst=dict(tuned), diff_file=str(path), compression_format=layout, executor=executor
            )
        return path

    def decode(stored: Path) -> State:
        with ThreadPoolExecutor(threads) as executor:
            found: State = fireworks.delta_decompress_dict_from_file(
                src=dict(base), diff_file=str(stored), compression_format=layout, executor=executor
            )
        return found

    return Way(f"fireworks {layout}, threads: {threads}", encode, os.path.getsize, decode)


def by_openzl(base: State, tuned: State) -> Way:
    """OpenZL's codec for numbers that are mostly 0: distances and values, each through its generic graph."""
    openzl = importlib.import_module("openzl.ext")

    def encode(mixed: Array) -> bytes:
        compressor = openzl.Compressor()
        compressor.set_parameter(openzl.CParam.FormatVersion, openzl.MAX_FORMAT_VERSION)
        compressor.set_parameter(openzl.CParam.CompressionLevel, 19)
        node, generic = compressor.get_node("zl.sparse_num_auto"), compressor.get_graph("zl.compress_generic")
        compressor.select_starting_graph(compressor.build_static_graph(node, [generic, generic]))
        context = openzl.CCtx()
        context.ref_compressor(compressor)
        return bytes(context.compress([openzl.Input(openzl.Type.Numeric, mixed)]))

    def decode(stored: bytes) -> Array:
        (found,) = openzl.DCtx().decompress(stored)
        return np.array(found.content.as_nparray()).view(np.uint16).reshape(-1)

    return of_xor("openzl sparse_num of the XOR", base, tuned, encode, decode)


def by_weightscope(folder: Path) -> Way:
    """weightscope's patch, from folder to folder; a threshold of 0 keeps every change."""
    export, apply = (importlib.import_module(f"weightscope.{name}") for name in ("export_patch", "apply_patch"))
    path, result = folder / "weightscope.wsp", folder / "weightscope.safetensors"

    def encode() -> Path:
        export.export_patch(str(folder / "base"), str(folder / "tuned"), path, threshold=0.0)
        return path

    def decode(stored: Path) -> State:
        apply.apply_patch(stored, str(folder / "base"), result)
        found: State = load_file(result)
        return found

    return Way("weightscope .wsp", encode, os.path.getsize, decode)


def fireworks(base: State, tuned: State, folder: Path) -> Iterator[Way | str]:
    """A way for each of its formats, or why there is none."""
    found: list[Callable[[], Way]] = [partial(by_fireworks, base, tuned, folder, layout) for layout in ARCS]
    # It gives up on the smaller of two codes where that takes longer, so the size depends on what else there is to do.
    found.append(partial(by_fireworks, base, tuned, folder, ARCS[-1], threads=1))
    yield from _installed({FIREWORKS: found})


def peers(base: State, tuned: State, folder: Path) -> Iterator[Way | str]:
    """A way for each peer, or why one is not there."""
    yield from fireworks(base, tuned, folder)
    yield from _installed(
        {
            "openzl": [partial(by_openzl, base, tuned)],
            "weightscope": [partial(by_weightscope, folder)],
            "zipnn": [partial(by_zipnn, base, tuned)],
        }
    )


def _installed(modules: dict[str, list[Callable[[], Way]]]) -> Iterator[Way | str]:
    for module, ways in modules.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            yield f"{module}: {error}"
        else:
            yield from (way() for way in ways)
