"""libshd without the package: its own tests, its footprint, and the programs that embed it, against NumPy bit for bit.

The conformance corpus goes through it in `test_vectors.py`.  What needs more than a C compiler is skipped where that is
not installed.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import shiradelta as sd
from shiradelta.backends.libshd.library import library as package_library
from shiradelta.format.codecs import VALUE_OPTIONS
from tests import BRIEF
from tests.building import CC, INCLUDE, LIBSHD, WARNINGS, dump, library, program, run, wasm

pytestmark = pytest.mark.skipif(CC is None, reason="no C compiler")

SHAPE = (96, 130)
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
LARGEST_LIBRARY = 110 * 1024

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the linker for what GNU's has")
dtypes = pytest.mark.parametrize("dtype", SHORT)


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


# --- its own tests ---


def environment() -> dict[str, str]:
    """In which libshd's own tests take as long as a run of these allows."""
    return {**os.environ, **({"SHD_TEST_BRIEF": "1"} if BRIEF else {})}


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
def test_own_tests_pass(sanitize: bool, tmp_path: Path):
    """The plain ones fail on any allocation in the library."""
    tests = sorted({*(LIBSHD / "tests").glob("*.c")} - {LIBSHD / "tests" / "dump.c"})
    options = ["-std=c11", "-O1", "-ffp-contract=off", "-DSHD_STATIC"]
    if sanitize:
        options += ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        probe = tmp_path / "probe.c"
        probe.write_text("int main(void) { return 0; }\n")
        try:
            run(CC, *options, probe, "-o", tmp_path / "probe")
            run(tmp_path / "probe")
        except AssertionError:
            pytest.skip("this compiler has no sanitizers")
        parts = [*sorted((LIBSHD / "src").glob("*.c")), *tests]
    else:
        parts = [*tests, library()]
        if sys.platform == "linux":
            options += ["-DWRAP_MALLOC", "-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc"]
    made = program(f"shd_test-{'sanitized' if sanitize else 'plain'}", *parts, options=options)
    assert run(made, env=environment()).endswith(" 0 failed\n")


@pytest.mark.slow
@needs("qemu-aarch64-static")
def test_own_tests_pass_on_aarch64_and_files_hold_the_same(tmp_path: Path):
    """By Zig's compiler, as the wheels are built, and in qemu: the NEON paths, where this machine has none."""
    pytest.importorskip("ziglang")
    compiler = (sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static", INCLUDE)
    flags = ("-std=c11", "-O2", "-ffp-contract=off", "-DSHD_STATIC")
    parts, dumper = sorted((LIBSHD / "src").glob("*.c")), LIBSHD / "tests" / "dump.c"
    tests = sorted({*(LIBSHD / "tests").glob("*.c")} - {dumper})
    for name, more in (("test", tests), ("dump", [dumper])):
        run(*compiler, *flags, *parts, *more, "-lm", "-o", tmp_path / name)
    assert run("qemu-aarch64-static", tmp_path / "test", env=environment()).endswith(" 0 failed\n")
    files = sorted((LIBSHD.parent / "spec" / "vectors").glob("*/*.shd"))
    assert len(files) > 500
    here = run(dump(), "--without-zstd", *files)
    assert run("qemu-aarch64-static", tmp_path / "dump", "--without-zstd", *files) == here


@pytest.mark.slow
@linux
@needs("nm", "strip")
def test_shared_library_is_small_and_needs_nothing(tmp_path: Path):
    shared = tmp_path / "libshd.so"
    run(CC, "-shared", *library().parent.glob("*.o"), "-o", shared)
    names = {
        kind: {line.split()[-1].split("@")[0] for line in run("nm", "-D", f"--{kind}-only", shared).splitlines()}
        for kind in ("defined", "undefined")
    }
    allowed = r"mem(cpy|move|set|cmp)|__stack_chk_fail|__cxa_finalize|__gmon_start__|_ITM_\w+"
    assert [name for name in names["undefined"] if not re.fullmatch(allowed, name)] == []
    header = (LIBSHD / "include" / "shd.h").read_text()
    assert names["defined"] == set(re.findall(r"^SHD_API [^;(]*?(\w+)\(", header, re.M))
    run("strip", shared)
    assert shared.stat().st_size <= LARGEST_LIBRARY


@linux
@needs("strip")
def test_library_of_the_package_is_small(tmp_path: Path):
    run("strip", "-o", tmp_path / "libshd.so", package_library()._name)
    assert (tmp_path / "libshd.so").stat().st_size <= LARGEST_LIBRARY


@pytest.mark.slow
@needs("cmake")
def test_cmake_builds_installs_and_is_found(tmp_path: Path):
    build, prefix, user = tmp_path / "build", tmp_path / "prefix", tmp_path / "user"
    user.mkdir()
    (user / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.15)\nproject(user C)\nfind_package(shd REQUIRED)\n"
        f"add_executable(patch {LIBSHD / 'examples' / 'patch_raw.c'})\ntarget_link_libraries(patch shd::shd)\n"
    )
    options = [f"-DCMAKE_INSTALL_PREFIX={prefix}", "-DCMAKE_C_FLAGS_RELEASE=-O1", "-DSHD_WERROR=ON"]  # in half the time
    run("cmake", "-S", LIBSHD, "-B", build, *options)
    run("cmake", "--build", build, "--parallel", "2")
    run("ctest", "--output-on-failure", cwd=build, env=environment())
    run("cmake", "--install", build)
    run("cmake", "-S", user, "-B", user / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", user / "build")
    assert "usage: patch_raw" in run(user / "build" / "patch", code=2)
    assert list(prefix.glob("lib*/pkgconfig/shd.pc"))


# --- what the programs are given, and what NumPy makes of it ---


def random_bits(dtype: str, count: int, seed: int = 0) -> np.ndarray:
    """Any bits: NaN, infinity and denormals too."""
    size = {"float32": 4, "int64": 8}.get(dtype, 2)
    return np.frombuffer(np.random.default_rng(seed).bytes(count * size), f"<u{size}")


def random_delta(dtype: str, seed: int, base: np.ndarray | None = None, op: str = "add") -> sd.TensorDelta:
    generator = np.random.default_rng(seed)
    positions = np.flatnonzero(generator.random(SHAPE[0] * SHAPE[1]) < 0.04)
    values = generator.standard_normal(positions.size).astype(np.float32)
    bits = values if op == "add" else random_bits(dtype, positions.size, seed)
    return sd.TensorDelta(SHAPE, positions, bits, dtype, op, None if base is None else base[positions])


def patched_by_numpy(delta: Path, name: str, weights: np.ndarray, dtype: str, strength: float = 1.0) -> np.ndarray:
    result = weights.copy()
    with sd.open_delta(delta, backend="numpy") as opened:
        opened[name].patch(result, dtype, strength)
    assert not np.array_equal(result, weights)
    return result


class Case:
    """A raw weight file, a delta for it, and the result."""

    def __init__(self, folder: Path, dtype: str, values: str = "int8", strength: float = 0.75) -> None:
        self.before = random_bits(dtype, SHAPE[0] * SHAPE[1])
        self.delta, self.weights = folder / "delta.shd", folder / "weights.bin"
        sd.save_delta(self.delta, {"w": random_delta(dtype, 1, self.before)}, values=values)
        self.before.tofile(self.weights)
        self.after = patched_by_numpy(self.delta, "w", self.before, dtype, strength)

    def now(self) -> np.ndarray:
        return np.fromfile(self.weights, self.before.dtype)


# --- C ---


@pytest.fixture(scope="module")
def patch_raw() -> Path:
    return program("patch_raw", LIBSHD / "examples" / "patch_raw.c", library())


@dtypes
@pytest.mark.parametrize("values", VALUE_OPTIONS)
def test_c_program_patches_and_reverts(dtype: str, values: str, patch_raw: Path, tmp_path: Path):
    case = Case(tmp_path, dtype, values)
    arguments = [case.delta, "w", case.weights, SHORT[dtype], tmp_path / "undo"]
    run(patch_raw, "apply", *arguments, "0.75")
    assert np.array_equal(case.now(), case.after)
    run(patch_raw, "revert", *arguments)
    assert np.array_equal(case.now(), case.before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"apply": "bf16 there"}, "there: cannot be written"),
        ({"apply": "f16 undo"}, "wrong_dtype"),
        ({"apply": "f32 undo"}, "is not of the tensor's size"),
        ({"apply": "bf16 undo nan"}, "bad_strength"),
        ({"apply": "bf16 undo 1x"}, "is no strength"),
        ({"revert": "bf16 there"}, "is not of this delta"),
    ],
)
def test_c_program_refuses_and_leaves_all_as_it_was(change, message, patch_raw: Path, tmp_path: Path):
    case = Case(tmp_path, "bfloat16")
    (tmp_path / "there").write_bytes(b"the way back")
    ((action, words),) = change.items()
    assert message in run(patch_raw, action, case.delta, "w", case.weights, *words.split(), code=1, cwd=tmp_path)
    assert np.array_equal(case.now(), case.before)
    assert (tmp_path / "there").read_bytes() == b"the way back"


def test_c_program_refuses_what_is_patched_already(patch_raw: Path, tmp_path: Path):
    case = Case(tmp_path, "bfloat16")
    run(patch_raw, "apply", case.delta, "w", case.weights, "bf16", tmp_path / "undo", "0.75")
    assert "or is patched already" in run(
        patch_raw, "apply", case.delta, "w", case.weights, "bf16", tmp_path / "undo2", code=1
    )
    assert np.array_equal(case.now(), case.after)


def test_readme_example_patches_a_buffer(tmp_path: Path):
    (example,) = re.findall(r"```c\n(#include.*?)```", (LIBSHD / "README.md").read_text(), re.S)
    (tmp_path / "readme.c").write_text(example)
    shared = tmp_path / "readme.so"
    run(CC, "-std=c11", *WARNINGS, INCLUDE, "-fPIC", "-shared", tmp_path / "readme.c", library(), "-o", shared)
    case = Case(tmp_path, "bfloat16", strength=1.0)
    data, weights, saved = case.delta.read_bytes(), case.before.copy(), np.empty(case.before.size, np.uint16)
    pointer, count = ctypes.c_void_p, ctypes.c_uint64
    patch = ctypes.CDLL(str(shared)).patch
    patch.argtypes = [ctypes.c_char_p, count, ctypes.c_char_p, count, pointer, count, pointer, count]
    assert patch(data, len(data), b"w", 1, weights.ctypes.data, weights.size, saved.ctypes.data, saved.size) == 0
    assert np.array_equal(weights, case.after)


# --- C++ ---


@pytest.fixture(scope="module")
def patch_safetensors() -> Path:
    source = LIBSHD / "examples" / "patch_safetensors.cpp"
    return program("patch_safetensors", source, library(), options=("-std=c++17", "-O1"), compiler="c++")


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.slow
@needs("c++")
def test_cpp_program_patches_a_model_and_reverts(patch_safetensors: Path, tmp_path: Path):
    """Tensors that lie at odd offsets, among them one that no delta is for and a name that JSON escapes."""
    kinds = {"q": "bfloat16", '\u00fc\U0001f600"': "float32", "half": "float16", "ids": "int64", "other": "bfloat16"}
    before = {name: random_bits(dtype, SHAPE[0] * SHAPE[1], i) for i, (name, dtype) in enumerate(kinds.items())}
    ops = {name: "set" if name == "ids" else "add" for name in kinds}
    deltas = {n: random_delta(t, i, before[n], ops[n]) for i, (n, t) in enumerate(kinds.items()) if n != "other"}
    delta, model = tmp_path / "delta.shd", tmp_path / "model.safetensors"
    sd.save_delta(delta, deltas, values="int4")

    def file(tensors: dict[str, np.ndarray]) -> bytes:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        data = b"\1\2\3"  # makes every other offset odd
        header["odd"] = {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}
        for name, bits in tensors.items():
            end = len(data) + bits.nbytes
            header[name] = {"dtype": SAFETENSORS[kinds[name]], "shape": SHAPE, "data_offsets": [len(data), end]}
            data += bits.tobytes()
        return safetensors(header, data)

    model.write_bytes(file(before))
    after = {
        name: patched_by_numpy(delta, name, bits, kinds[name]) if name in deltas else bits
        for name, bits in before.items()
    }
    run(patch_safetensors, "apply", model, delta, tmp_path / "undo")
    assert model.read_bytes() == file(after)
    assert "undo: is there already" in run(patch_safetensors, "apply", model, delta, tmp_path / "undo", code=1)
    assert "or is patched already" in run(patch_safetensors, "apply", model, delta, tmp_path / "undo2", code=1)
    assert not (tmp_path / "undo2").exists()
    assert model.read_bytes() == file(after)
    run(patch_safetensors, "revert", model, delta, tmp_path / "undo")
    assert model.read_bytes() == file(before)


def entry(**other: object) -> dict[str, object]:
    count = SHAPE[0] * SHAPE[1]
    return {"w": {"dtype": "BF16", "shape": SHAPE, "data_offsets": [0, 2 * count], **other}}


HOSTILE = {
    "empty": b"",
    "cut": b"\1\0\0\0",
    "header_over_the_end": struct.pack("<Q", 1 << 62) + b"{}",
    "no_json": safetensors(b"\0" * 9),
    "no_end": safetensors(b'{"w": {"dtype": "BF16'),
    "escape_at_the_end": safetensors(b'{"w\\'),
    "unicode_at_the_end": safetensors(b'{"w\\u00'),
    "surrogate_at_the_end": safetensors(b'{"w\\ud800\\u'),
    "deep": safetensors(b"[" * 100_000),
    "behind": safetensors(b"{}{}"),
    "twice": safetensors(json.dumps(entry())[:-1].encode() + b"," + json.dumps(entry())[1:].encode()),
    "number_too_large": safetensors(json.dumps(entry(shape=[1 << 64])).encode()),
    "negative": safetensors(entry(data_offsets=[-2, 0])),
    "offsets_over_the_end": safetensors(entry(data_offsets=[0, (1 << 64) - 1])),
    "offsets_swapped": safetensors(entry(data_offsets=[8, 0]), bytes(8)),
    "one_offset": safetensors(entry(data_offsets=[0])),
    "overlap": safetensors({**entry(data_offsets=[0, 6]), "v": entry(data_offsets=[2, 8])["w"]}, bytes(8)),
    "other_shape": safetensors(entry(shape=SHAPE[::-1]), bytes(2 * SHAPE[0] * SHAPE[1])),
    "too_few_bytes": safetensors(entry(data_offsets=[0, 2]), bytes(2)),
    "odd_bytes": safetensors(entry(data_offsets=[0, 2 * SHAPE[0] * SHAPE[1] + 1]), bytes(2 * SHAPE[0] * SHAPE[1] + 1)),
    "other_dtype": safetensors(entry(dtype="F16"), bytes(2 * SHAPE[0] * SHAPE[1])),
    "no_dtype": safetensors(entry(dtype="F6"), bytes(2 * SHAPE[0] * SHAPE[1])),
    "not_there": safetensors({}),
}


@pytest.mark.slow
@needs("c++")
@pytest.mark.parametrize("model", HOSTILE.values(), ids=HOSTILE.keys())
def test_cpp_program_refuses_other_models(model: bytes, patch_safetensors: Path, tmp_path: Path):
    case, path = Case(tmp_path, "bfloat16"), tmp_path / "model.safetensors"
    path.write_bytes(model)
    said = run(patch_safetensors, "apply", path, case.delta, tmp_path / "undo", code=1)
    assert said.startswith("patch_safetensors: ")
    assert path.read_bytes() == model
    assert not (tmp_path / "undo").exists()


# --- WebAssembly ---

WASM = LIBSHD / "wasm"
wasm_tools = needs("clang", "wasm-ld", "node")


@wasm_tools
@dtypes
def test_node_decodes_patches_and_reverts(dtype: str, tmp_path: Path):
    case = Case(tmp_path, dtype)
    printed = run("node", WASM / "example.mjs", wasm(), case.delta, "w", case.weights, dtype, tmp_path / "out", "0.75")
    assert np.array_equal(np.fromfile(tmp_path / "out", case.before.dtype), case.after)
    found = json.loads(printed)
    with sd.open_delta(case.delta, backend="numpy") as delta:
        tensor = delta["w"]
        assert found["positions"] == tensor.positions().tolist()
        assert np.array_equal(np.array(found["values"], np.float32), tensor.values())
    assert [found[key] for key in ("name", "dtype", "op", "shape")] == ["w", dtype, "add", list(SHAPE)]


@wasm_tools
def test_node_reads_the_corpus_as_all_readers_do(tmp_path: Path):
    """Reasons of what opening and loading refuse; zstd is not there, and the digest is not looked at."""
    script = tmp_path / "reasons.mjs"
    script.write_text(
        f"import {{ Shd }} from {json.dumps((WASM / 'shd.mjs').as_uri())};\n"
        "import { readFileSync } from 'node:fs';\n"
        "const [wasm, ...paths] = process.argv.slice(2);\n"
        "const shd = await Shd.instantiate(readFileSync(wasm));\n"
        "const reasons = paths.map((path) => {\n"
        "  shd.reset();\n"
        "  try { for (const tensor of shd.open(readFileSync(path)).values()) tensor.positions(); return 'accepted'; }\n"
        "  catch (error) { return error.reason ?? String(error); }\n"
        "});\n"
        "console.log(JSON.stringify(reasons));\n"
    )
    vectors = LIBSHD.parent / "spec" / "vectors"
    refused = json.loads((vectors / "invalid" / "reasons.json").read_text())
    expected = {vectors / "invalid" / f"{name}.shd": reason for name, reason in refused.items()}
    expected |= dict.fromkeys(sorted((vectors / "valid").glob("*.shd")), "accepted")
    found = dict(zip(expected, json.loads(run("node", script, wasm(), *expected)), strict=True))
    differing = {path.stem: (found[path], reason) for path, reason in expected.items() if found[path] != reason}
    excused: dict[str, Callable[[str, str], bool]] = {
        "zstd_unavailable": lambda name, reason: reason in ("accepted", "bad_zstd") or name.startswith("packed"),
        "accepted": lambda _, reason: reason == "digest_mismatch",
    }
    assert {n: each for n, each in differing.items() if not excused.get(each[0], lambda *_: False)(n, each[1])} == {}


def test_types_name_what_the_module_exports():
    """No TypeScript here: at least the names are the same."""
    module, types = ((WASM / name).read_text() for name in ("shd.mjs", "shd.d.mts"))
    assert set(re.findall(r"^export class (\w+)", module, re.M)) == set(re.findall(r"^export class (\w+)", types, re.M))
    public = re.findall(r"^  (?:static async |static )?(\w+)\(.*\) \{$", module.split("export class Shd {")[1], re.M)
    declared = re.findall(r"^  (?:static )?(\w+)\(", types.split("export class Shd {")[1], re.M)
    assert {name for name in public if name != "constructor"} == set(declared)
