"""libshd in other build systems: each package is built as its users build it, and used.  vcpkg itself is imitated."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import sys
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest

import shiradelta as sd
from tests.building import CC, LIBSHD, run
from tests.libshd.test_libshd import needs

ROOT = LIBSHD.parent
VERSION = re.findall(r'^#define SHD_VERSION "(.*)"', (LIBSHD / "include" / "shd.h").read_text(), re.MULTILINE)[0]
PACKAGING = LIBSHD / "packaging"
#: That a package can be built and used is shown in half the time so.
QUICKLY = "-DCMAKE_C_FLAGS_RELEASE=-O0"
posix = pytest.mark.skipif(CC is None or sys.platform == "win32", reason="no C compiler, or one with other options")


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    """A file with a tensor `w` of 512 float32 weights."""
    path = tmp_path / "style.shd"
    sd.save_delta(path, {"w": sd.TensorDelta((64, 8), [3, 70, 200], [0.5, -2.0, 8.0], "float32")}, values="f32")
    return path


def test_every_package_has_the_version_of_the_header():
    found = {
        "npm": json.loads((LIBSHD / "wasm" / "package.json").read_text())["version"],
        "cargo": tomllib.loads((LIBSHD / "Cargo.toml").read_text())["package"]["version"],
        "vcpkg": json.loads((PACKAGING / "vcpkg" / "shd" / "vcpkg.json").read_text())["version"],
        "readme": re.findall(r"`shd/([\d.]+)`", (LIBSHD / "README.md").read_text())[0],
    }
    assert set(found.values()) == {VERSION}, found
    tag = re.findall(r"GIT_TAG v([\d.]+) ", (LIBSHD / "README.md").read_text())
    assert tag == [sd.__version__]


# --- Rust ---


def test_the_bindings_for_rust_are_those_of_the_header():
    place = importlib.util.spec_from_file_location("bindings", LIBSHD / "rust" / "bindings.py")
    assert place is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)  # type: ignore[union-attr]
    written = (LIBSHD / "rust" / "bindings.rs").read_text()
    assert written == module.bindings(), "python libshd/rust/bindings.py writes them again"
    declared = set(re.findall(r"\b(shd_\w+)\(", (LIBSHD / "include" / "shd.h").read_text()))
    assert {name for name in declared if f"fn {name}(" not in written} <= {"shd_read_fn", "shd_zstd_fn"}


@pytest.mark.slow
@posix
@needs("cargo")
def test_the_crate_builds_offline_and_patches(delta: Path, tmp_path: Path):
    crate = tmp_path / "crate"
    shutil.copytree(LIBSHD, crate, ignore=shutil.ignore_patterns("build", "fuzz", "wasm", "target", "Cargo.lock"))
    environment = {**os.environ, "CARGO_TARGET_DIR": str(tmp_path / "target"), "SHD_TEST_FILE": str(delta)}
    said = run("cargo", "test", "--offline", "--test", "patch", cwd=crate, env=environment)
    assert "4 passed" in said


# --- CMake, vcpkg, Conan ---


@pytest.mark.slow
@posix
@needs("cmake")
def test_the_snippet_for_fetchcontent_links_the_library_alone(tmp_path: Path):
    (snippet,) = re.findall(r"```cmake\n(.*?)```", (LIBSHD / "README.md").read_text(), re.DOTALL)
    project = "cmake_minimum_required(VERSION 3.18)\nproject(example LANGUAGES C)\nadd_executable(main main.c)\n"
    (tmp_path / "CMakeLists.txt").write_text(project + snippet)
    shutil.copy(PACKAGING / "conan" / "test_package" / "test_package.c", tmp_path / "main.c")
    build = tmp_path / "build"
    options = [f"-DFETCHCONTENT_SOURCE_DIR_SHD={ROOT}", "-DFETCHCONTENT_QUIET=OFF", QUICKLY]
    run("cmake", "-S", tmp_path, "-B", build, *options)
    targets = run("cmake", "--build", build, "--target", "help")
    assert "shd_static" in targets
    assert not re.findall("shd_test|shd_bench", targets)
    run("cmake", "--build", build, "--target", "main", "--parallel", "2")
    assert f"libshd {VERSION}, " in run(build / "main")


#: The commands that the port calls, in CMake's own words.
VCPKG = """
set(CURRENT_PACKAGES_DIR "{packages}")
set(PORT shd)
set(VCPKG_LIBRARY_LINKAGE {linkage})
function(vcpkg_cmake_configure)
    cmake_parse_arguments(given "" "SOURCE_PATH" "OPTIONS" ${{ARGN}})
    execute_process(COMMAND ${{CMAKE_COMMAND}} -S ${{given_SOURCE_PATH}} -B {build} -DCMAKE_INSTALL_LIBDIR=lib {quickly}
        -DCMAKE_INSTALL_PREFIX={packages} ${{given_OPTIONS}} COMMAND_ERROR_IS_FATAL ANY)
endfunction()
function(vcpkg_cmake_install)
    execute_process(COMMAND ${{CMAKE_COMMAND}} --build {build} --target install COMMAND_ERROR_IS_FATAL ANY)
endfunction()
function(vcpkg_cmake_config_fixup)
    cmake_parse_arguments(given "" "PACKAGE_NAME;CONFIG_PATH" "" ${{ARGN}})
    if(NOT EXISTS "{packages}/${{given_CONFIG_PATH}}/${{given_PACKAGE_NAME}}Config.cmake")
        message(FATAL_ERROR "no configuration in ${{given_CONFIG_PATH}}")
    endif()
endfunction()
function(vcpkg_fixup_pkgconfig)
endfunction()
function(vcpkg_copy_pdbs)
endfunction()
function(vcpkg_install_copyright)
    cmake_parse_arguments(given "" "" "FILE_LIST" ${{ARGN}})
    file(INSTALL ${{given_FILE_LIST}} DESTINATION "{packages}/share/${{PORT}}" RENAME copyright)
endfunction()
include("{port}")
"""


@pytest.mark.slow
@posix
@needs("cmake")
@pytest.mark.parametrize(("linkage", "library"), [("dynamic", "libshd.so"), ("static", "libshd.a")])
def test_the_port_for_vcpkg_installs_one_kind_of_library(linkage: str, library: str, tmp_path: Path):
    port = PACKAGING / "vcpkg" / "shd"
    names = {"packages": tmp_path / "packages", "build": tmp_path / "build", "port": port / "portfile.cmake"}
    names["quickly"] = QUICKLY
    (tmp_path / "port.cmake").write_text(VCPKG.format(linkage=linkage, **names))
    run("cmake", "-P", tmp_path / "port.cmake")
    found = {path.name for path in (tmp_path / "packages").rglob("*") if path.is_file() or path.is_symlink()}
    assert {"shd.h", "shdConfig.cmake", "shd.pc", "copyright", "usage"} <= found
    libraries = {name.replace(".dylib", ".so") for name in found if name.startswith("libshd.")}
    assert {name for name in libraries if name.endswith((".so", ".a"))} == {library}


@pytest.mark.slow
@posix
@needs("cmake", "conan")
@pytest.mark.parametrize("shared", [False, True])
def test_the_recipe_for_conan_makes_a_package_that_links(shared: bool, tmp_path: Path):
    environment = {**os.environ, "CONAN_HOME": str(tmp_path / "conan")}
    run("conan", "profile", "detect", env=environment)
    recipe = PACKAGING / "conan"
    copied = tmp_path / "libshd"
    shutil.copytree(LIBSHD, copied, ignore=shutil.ignore_patterns("build", "wasm", "target", "fuzz"))
    shutil.copy(ROOT / "LICENSE", tmp_path)
    said = run(
        "conan", "create", copied / recipe.relative_to(LIBSHD), "-nr", "-o", f"shd/*:shared={shared}", env=environment
    )
    assert f"libshd {VERSION}, " in said


# --- npm ---


@pytest.fixture(scope="module")
def npm_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the package is installed from what `npm pack` makes."""
    folder = tmp_path_factory.mktemp("npm")
    shutil.copytree(LIBSHD, folder / "libshd", ignore=shutil.ignore_patterns("build", "target", "fuzz"))
    shutil.copy(ROOT / "LICENSE", folder)
    source, project = folder / "libshd" / "wasm", folder / "project"
    project.mkdir()
    said = run("npm", "pack", "--json", "--offline", cwd=source)
    packed = json.loads(said[said.index("[\n") :])  # what the build prints comes first
    names = {file["path"] for file in packed[0]["files"]}
    assert names == {
        "LICENSE", "README.md", "index.d.mts", "index.mjs", "package.json", "shd.d.mts", "shd.mjs", "shd.wasm",
    }  # fmt: skip
    run("npm", "init", "-y", cwd=project)
    run("npm", "install", "--offline", "--no-audit", source / packed[0]["filename"], cwd=project)
    return project


npm_tools = needs("clang", "wasm-ld", "node", "npm")


@pytest.mark.slow
@npm_tools
def test_the_example_of_the_npm_package_runs_in_node(npm_package: Path, delta: Path):
    (example,) = re.findall(r"```js\n(.*?)```", (LIBSHD / "wasm" / "README.md").read_text(), re.DOTALL)
    script = npm_package / "example.mjs"
    script.write_text(example.replace("64 * 64", "64 * 8").replace("style.shd", delta.as_posix()))
    assert run("node", script).split() == [
        "w",
        "add",
        "[",
        "64,",
        "8",
        "]",
        "3",
        str(float(np.float32(0.5) * np.float32(0.8))),
    ]


@pytest.mark.slow
@npm_tools
def test_the_npm_package_works_in_a_browser(npm_package: Path, delta: Path):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    shutil.copy(delta, npm_package)
    (npm_package / "index.html").write_text("<!doctype html><title>shd</title>")

    class Handler(http.server.SimpleHTTPRequestHandler):
        extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=npm_package))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """async () => {
        const { load, ShdError } = await import("/node_modules/shiradelta/index.mjs");
        const shd = await load();
        const file = new Uint8Array(await (await fetch("/style.shd")).arrayBuffer());
        const tensor = shd.open(file).get("w");
        const weights = shd.weights("float32", 512);
        const undo = tensor.apply(weights, 1);
        const patched = [...weights.array];
        tensor.revert(weights, undo);
        let reason;
        try { shd.open(new Uint8Array(256)); } catch (error) { reason = error instanceof ShdError && error.reason; }
        return [patched[3], patched[70], patched[200], weights.array.some((x) => x !== 0), reason];
    }"""
    try:
        with playwright.sync_playwright() as engine:
            browser = engine.chromium.launch(executable_path=program, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            assert page.evaluate(code) == [0.5, -2, 8, False, "bad_magic"]
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
